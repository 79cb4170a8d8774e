"""How much does each way of distilling help? A ResNet-56 teaches a ResNet-20, all under one budget.

Usage: python benchmarks/distill_cifar.py --data DIR [--methods ...] [--epochs 10] [--seeds 0 1 2] [--train N]
[--checkpoint DIR] [--json FILE] [--peer torchdistill]

DIR holds ``cifar10_jpeg_{train,test}.npz`` and ``cifar10_jpeg_resnet56.safetensors``; decoding them takes Pillow. Every
method trains the same student with the same images in the same order and the same optimizer; accuracy is that of the
last epoch on all test images. ``scratch`` has the labels alone. A run that was broken off goes on from
``--checkpoint``. The peer's loss is its own class, in the same loop.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, stdev
from typing import Any

import torch
from torch import Tensor, nn

from cifar import Images, ResNet, accuracy, batches, decode, normalize, resnet56, some
from slivo import losses
from slivo.distill import Ramp, Term, distillation, inherit, propose, self_taught
from slivo.train import OptimizerSpec, fit

BATCH = 128
STAGES = ("layer1", "layer2", "layer3")
LAST = "layer3"
ALL = {stage: stage for stage in STAGES}

Row = dict[str, Any]


def kd(**options: Any) -> Term:
    return losses.kd(**{"temperature": 4.0, "weight": 0.9, **options})


METHODS: Mapping[str, Callable[[nn.Module, nn.Module, Tensor], Sequence[Term]]] = {
    "kd": lambda *_: [kd()],
    "dkd": lambda *_: [losses.dkd(weight=0.9)],
    "dist": lambda *_: [losses.dist(weight=0.9)],
    "standardized kd": lambda *_: [losses.standardized_kd(weight=0.9)],
    "kd, temperature 8 to 2": lambda *_: [kd(temperature=Ramp(8.0, 2.0))],
    "kd, hint": lambda *_: [kd(), losses.hint(at="layer*")],
    "kd, hint of the last stage": lambda *_: [kd(), losses.hint(at=LAST)],
    "kd, hint of proposed pairs": lambda s, t, x: [kd(), losses.hint(at=propose(s, t, x, count=4).at)],
    "kd, attention transfer": lambda *_: [kd(), losses.attention_transfer(at="layer*")],
    "kd, nst": lambda *_: [kd(), losses.nst(at=LAST)],
    "kd, pkt": lambda *_: [kd(), losses.pkt(at=LAST)],
    "kd, sp": lambda *_: [kd(), losses.sp(at=LAST)],
    "kd, cka": lambda *_: [kd(), losses.cka(at=LAST)],
    "kd, rkd": lambda *_: [kd(), losses.rkd_distance(at=LAST)],
    "kd, correlation congruence": lambda *_: [kd(), losses.correlation_congruence(at=LAST)],
    "kd, ickd": lambda *_: [kd(), losses.ickd(at=LAST)],
    "kd, ab": lambda *_: [kd(), losses.ab(at="layer*")],
    "kd, ofd": lambda *_: [kd(), losses.ofd(at="layer*")],
    "kd, fsp": lambda *_: [kd(), losses.fsp(at=ALL)],
    "kd, review": lambda *_: [kd(), losses.review(at=ALL)],
    "kd, vid": lambda *_: [kd(), losses.vid(at="layer*")],
    "kd, crd": lambda *_: [kd(), losses.crd(at=LAST)],
}
"""Terms by name of the method, from student, teacher and a batch of images."""

LITERATURE = {
    "kd": 1.60, "dkd": 2.91, "dist": 2.69, "standardized kd": 2.37, "kd, hint": 0.15, "kd, attention transfer": 1.49,
    "kd, nst": 0.54, "kd, pkt": 1.28, "kd, sp": 0.61, "kd, rkd": 0.55, "kd, correlation congruence": 0.57,
    "kd, ab": 0.41, "kd, ofd": 1.92, "kd, fsp": 0.89, "kd, review": 2.83, "kd, vid": 1.32, "kd, crd": 2.10,
}  # fmt: skip
"""Points over 69.06 % from scratch, CIFAR-100, the same pair of networks, 240 epochs; losses on activations without kd.

From Tian, Krishnan, Isola 2020, arXiv:1910.10699, table 1; Zhao et al. 2022, arXiv:2203.08679 (dkd); Huang et al. 2022,
arXiv:2205.10536 (dist); Sun et al. 2024, arXiv:2403.01427 (standardized, with kd); Chen et al. 2021, arXiv:2104.09044
(review, and ofd as measured there).
"""

INHERITED = "kd, hint, first weights of the teacher"
OTHERS = ("scratch", "self-taught", INHERITED)


def forward(model: nn.Module, batch: Images) -> Tensor:
    return model(batch[0])


def loss(output: Tensor, batch: Images) -> Tensor:
    return nn.functional.cross_entropy(output, batch[1])


def labels(model: nn.Module, batch: Images) -> dict[str, Tensor]:
    return {"labels": loss(forward(model, batch), batch)}


def objective(method: str, student: nn.Module, teacher: nn.Module, train: Images, seed: int) -> tuple[Any, list[Any]]:
    """Return what a method trains by, and what is trained along."""
    x = normalize(train[0][:BATCH])
    if method == "scratch":
        return labels, []
    if method == "self-taught":
        taught = self_taught(forward, loss, STAGES).prepare(student, (x, train[1][:BATCH]), seed=seed)
        return taught, taught.parameters()
    if method == "torchdistill":
        return peer(teacher), []
    terms = METHODS["kd, hint" if method == INHERITED else method](student, teacher, x)
    made = distillation(teacher, forward, loss, terms, label_weight=0.1)
    made.prepare(student, (x, train[1][:BATCH]), seed=seed)
    return made, made.parameters()


def peer(teacher: nn.Module) -> Callable[[nn.Module, Images], dict[str, Tensor]]:
    """Return the peer's loss on logits, of the weights of ``kd``."""
    from torchdistill.losses.mid_level import KDLoss

    said: dict[str, dict[str, Any]] = {"student": {}, "teacher": {}}
    criterion = KDLoss("linear", "output", "linear", "output", temperature=4.0, alpha=0.1, beta=0.9)

    def both(model: nn.Module, batch: Images) -> dict[str, Tensor]:
        with torch.no_grad():
            said["teacher"] = {"linear": {"output": teacher.eval()(batch[0])}}
        said["student"] = {"linear": {"output": model(batch[0])}}
        return {"torchdistill": criterion(said["student"], said["teacher"], batch[1])}

    return both


def measure(
    method: str, options: argparse.Namespace, teacher: nn.Module, train: Images, test: Images, seed: int
) -> Row:
    """Train one student and judge it; from its file if it is there."""
    folder = options.checkpoint and options.checkpoint / f"{method.replace(' ', '-')}-{seed}"
    file = folder and folder.with_suffix(".json")
    if file is not None and file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    torch.manual_seed(seed)
    student: nn.Module = ResNet(3)
    if method == INHERITED:
        student = inherit(student, teacher).model
    made, extra = objective(method, student, teacher, train, seed)
    history = fit(
        student, batches(train, BATCH), made, epochs=options.epochs, optimizer=OptimizerSpec(lr=options.lr), seed=seed,
        checkpoint=folder and folder.with_suffix(".ckpt"), extra_parameters=extra,
        on_epoch=lambda row: print(f"  {method} {seed}, epoch {row['epoch']}: {row['seconds']:.0f} s", flush=True),
    )  # fmt: skip
    row = {"method": method, "seed": seed, "accuracy": accuracy(student, test), "history": history}
    if file is not None:
        file.write_text(json.dumps(row), encoding="utf-8")
    return row


def table(rows: Sequence[Row]) -> str:
    """Return medians over seeds, what a method is ahead of others by, and of scratch in the literature."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row["accuracy"])
    medians = {method: median(values) for method, values in found.items()}
    lines = [
        "| method | accuracy, median | spread | over scratch | over kd | literature, over scratch |",
        "|---" * 6 + "|",
    ]
    for method, value in sorted(medians.items(), key=lambda item: -item[1]):
        spread = f"{100 * stdev(found[method]):.2f}" if len(found[method]) > 1 else ""
        over = [f"{100 * (value - medians[other]):+.2f}" if other in medians else "" for other in ("scratch", "kd")]
        said = f"{LITERATURE[method]:+.2f}" if method in LITERATURE else ""
        lines.append(f"| {method} | {value:.2%} | {spread} | {over[0]} | {over[1]} | {said} |")
    return "\n".join(lines)


def main() -> None:
    known = (*OTHERS, *METHODS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--methods", nargs="+", choices=known, default=list(known), metavar="METHOD", help=f"of {known}"
    )
    parser.add_argument("--peer", choices=["torchdistill"], help="also measure its loss: pip install torchdistill")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--train", type=int, help="training images; all if not given")
    parser.add_argument("--test", type=int, help="test images; all if not given")
    parser.add_argument("--checkpoint", type=Path, help="folder to go on from")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    train, test = some(decode(options.data, "train"), options.train), some(decode(options.data, "test"), options.test)
    if options.checkpoint:
        options.checkpoint.mkdir(parents=True, exist_ok=True)
    teacher = resnet56(options.data).to(memory_format=torch.channels_last)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"teacher: {accuracy(teacher, test):.2%} of {len(test[1])} images", flush=True)
    methods = [*options.methods, *([options.peer] if options.peer else [])]
    rows = [measure(method, options, teacher, train, test, seed) for seed in options.seeds for method in methods]
    print(f"\n{options.epochs} epochs of {len(train[1])} images, seeds {options.seeds}\n{table(rows)}")
    if options.json:
        options.json.write_text(json.dumps({"epochs": options.epochs, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
