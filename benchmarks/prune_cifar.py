"""How accurate is a pruned network at equal cost? slivo and a peer, with the same data, epochs and optimizer.

Usage: python benchmarks/prune_cifar.py --data DIR [--peer torch-pruning] [--checkpoint DIR] [--json FILE]

DIR holds ``cifar10_jpeg_{train,test}.npz`` and ``cifar10_jpeg_resnet56.safetensors``; decoding them takes Pillow. The
other networks (``--network vit-tiny mobilenet-v2``, which take timm and torchvision) are trained here first. To
choose by: ``--judge even`` judges by every other test image, and what was chosen is then measured by the rest
(``--judge odd``). ``--held-out N`` leaves that many training images out of training, and judges by them; but the given
weights were trained on them, too, which favors what imitates the dense network.
A run that was broken off goes on from its ``--checkpoint`` folder.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import slivo
from cifar import Images, accuracy, batches, decode, normalize, resnet56, some
from slivo.distill import distillation
from slivo.measure import cost
from slivo.prune import cut, reestimate, refit, surgeon
from slivo.train import OptimizerSpec, fit

BATCH = 128
METHODS = ("slivo", "slivo+kd", "torch-pruning", "torch-pruning+kd")
JUDGES = {"all": (0, 1), "even": (0, 2), "odd": (1, 2)}
COLUMNS = ("cut", "batch norm", "refit", "tuned")

Row = dict[str, Any]


@dataclass(frozen=True)
class Network:
    """What is pruned, how its training goes, and how slivo cuts it.

    Attributes:
        make: Makes it, untrained.
        dense: How it is trained first; None if its weights are given.
        tuning: How it is trained after the cut, by either tool.
        distilling: How it is trained with slivo and the dense model as teacher.
        hints: Globs of modules whose outputs are to be the teacher's, then.
        prune: Options of `slivo.prune`.
        fixed: Which modules the peer is told to leave as they are.
    """

    make: Callable[[], nn.Module]
    dense: OptimizerSpec | None
    tuning: OptimizerSpec
    distilling: OptimizerSpec
    hints: Sequence[str]
    prune: Mapping[str, Any]
    fixed: Callable[[nn.Module], list[nn.Module]]


def _resnet56() -> nn.Module:
    from cifar import ResNet56

    return ResNet56()


def _vit_tiny() -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10)


def _mobilenet_v2() -> nn.Module:
    from torchvision.models import mobilenet_v2

    model = mobilenet_v2(num_classes=10)
    model.features[0][0].stride = model.features[2].conv[1][0].stride = (1, 1)  # for small images
    return model


def _outside_blocks(model: nn.Module) -> list[nn.Module]:
    """Return all layers but the first of each block: the peer's cut of a padded residual stream does not run."""
    layers = {name: each for name, each in model.named_modules() if isinstance(each, nn.Conv2d | nn.Linear)}
    return [each for name, each in layers.items() if not (name.startswith("layer") and name.endswith("conv1"))]


def _heads(model: nn.Module) -> list[nn.Module]:
    return [each for each in model.modules() if isinstance(each, nn.Linear) and each.out_features == 10]


SGD, GENTLE = OptimizerSpec(lr=0.05), OptimizerSpec(lr=0.02)
STAGES = ("layer1", "layer2", "layer3")
ADAM = OptimizerSpec("adamw", lr=5e-4, weight_decay=0.05)
INNER = {"criterion": "surgeon", "only": ["layer*.conv1"]}
ISOMORPHIC = {"criterion": "taylor", "scope": "isomorphic"}
NETWORKS = {
    "resnet56": Network(_resnet56, None, SGD, GENTLE, STAGES, INNER, _outside_blocks),
    "mobilenet-v2": Network(_mobilenet_v2, OptimizerSpec(lr=0.1), SGD, GENTLE, (), {"criterion": "surgeon"}, _heads),
    "vit-tiny": Network(_vit_tiny, replace(ADAM, lr=1e-3), ADAM, ADAM, (), ISOMORPHIC, _heads),
}


@dataclass(frozen=True)
class Setting:
    """What all methods of a run share."""

    network: Network
    model: nn.Module
    train: Images
    test: Images
    options: argparse.Namespace
    faster: float
    seed: int
    folder: Path | None

    def file(self, name: str) -> Path | None:
        """Return where something is kept, if there is a place."""
        return None if self.folder is None else self.folder / name

    def calibration(self) -> Images:
        """Return a few hundred training images, chosen at random."""
        chosen = np.random.default_rng(self.seed).permutation(len(self.train[1]))[: self.options.samples]
        x = normalize(self.train[0][chosen])
        return x.contiguous(memory_format=torch.channels_last), self.train[1][chosen]


def tune(setting: Setting, model: nn.Module, method: str, checkpoint: Path | None) -> list[dict[str, Any]]:
    """Train a model in place: by labels alone the same for both tools; else with the dense model as teacher, too.

    The peer has no distillation: it is given the usual one, on logits, and the rest as without.
    """
    options, network = setting.options, setting.network
    spec = network.distilling if method == "slivo+kd" else network.tuning
    loader = batches(setting.train, BATCH)
    objective: Any = labels
    extra: list[nn.Parameter] = []
    if method.endswith("+kd"):
        teacher = copy.deepcopy(setting.model).to(memory_format=torch.channels_last)
        hints = options.hint if options.hint is not None else network.hints if method == "slivo+kd" else ()
        terms = [slivo.losses.kd(temperature=options.temperature, weight=options.kd_weight)]
        terms += [slivo.losses.hint(at=place, weight=options.hint_weight) for place in hints]
        objective = distillation(teacher, forward, loss, terms, label_weight=1 - options.kd_weight)
        extra = objective.prepare(model, normalized(setting.train, 2), seed=setting.seed).parameters()
    return fit(
        model, loader, objective, epochs=options.epochs, optimizer=replace(spec, lr=options.lr or spec.lr),
        seed=setting.seed, checkpoint=checkpoint, on_epoch=said, extra_parameters=extra,
    )  # fmt: skip


def said(row: Mapping[str, Any]) -> None:
    print(f"  epoch {row['epoch']}: loss {row['loss']:.3f}, {row['seconds']:.0f} s", flush=True)


def normalized(images: Images, count: int) -> Images:
    return normalize(images[0][:count]), images[1][:count]


def loss(output: Tensor, batch: Images) -> Tensor:
    return nn.functional.cross_entropy(output, batch[1])


def forward(model: nn.Module, batch: Images) -> Tensor:
    return model(batch[0])


def labels(model: nn.Module, batch: Images) -> dict[str, Tensor]:
    return {"labels": loss(model(batch[0]), batch)}


def cut_by_slivo(setting: Setting) -> tuple[nn.Module, Row]:
    """Return the cut and refitted model, and what is known of it; from its file if it is there."""
    file = setting.file("slivo")
    if file is not None and file.exists():
        return slivo.load(file, factory=setting.network.make), json.loads((file / "row.json").read_text("utf-8"))
    x, y = setting.calibration()
    unlabelled = list(x.split(BATCH))
    options = {**setting.network.prune, **chosen(setting.options)}
    keep = slivo.Budget(macs=1 / setting.faster)
    start = time.perf_counter()
    torch.manual_seed(setting.seed)
    if options.get("criterion") == "surgeon":
        options.pop("criterion")
        small = cut(setting.model, x[:2], surgeon(setting.model, x[:2], keep=keep, batches=unlabelled, **options))
    else:
        labelled = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
        small = slivo.prune(
            setting.model, x[:2], keep=keep, **options, batches=labelled,
            loss=lambda model, batch: loss(model(batch[0]), batch),
        )  # fmt: skip
    row: Row = {"cut": accuracy(small, setting.test), "seconds to cut": time.perf_counter() - start}
    row["batch norm"] = accuracy(reestimate(small, unlabelled), setting.test)
    start = time.perf_counter()
    small = refit(small, setting.model, unlabelled, ridge=setting.options.ridge)
    row["seconds to refit"] = time.perf_counter() - start
    row["refit"] = accuracy(small, setting.test)
    if file is not None:
        slivo.save(small, file)
        (file / "row.json").write_text(json.dumps(row), encoding="utf-8")
    return small, row


def chosen(options: argparse.Namespace) -> dict[str, Any]:
    """Return options of the cut that the command line says."""
    said = {name: getattr(options, name) for name in ("criterion", "scope", "only", "exclude", "round_to", "min_width")}
    return {name: value for name, value in said.items() if value is not None}


def cut_by_peer(setting: Setting) -> tuple[nn.Module, Row]:
    """Return the model cut by Torch-Pruning: all layers compete by the norm of their groups, as in its README."""
    import torch_pruning

    x = setting.calibration()[0]
    limit = cost(setting.model, x[:1]).macs / setting.faster

    def pruned(ratio: float) -> nn.Module:
        model = setting.network.make()
        model.load_state_dict(setting.model.state_dict())
        attention = [each for each in model.modules() if hasattr(each, "qkv") and hasattr(each, "num_heads")]
        pruner = torch_pruning.pruner.BasePruner(
            model.eval(), x[:1], importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio, global_pruning=True, ignored_layers=setting.network.fixed(model),
            num_heads={each.qkv: each.num_heads for each in attention}, prune_head_dims=True,
        )  # fmt: skip
        pruner.step()
        for each in attention:
            each.num_heads = pruner.num_heads[each.qkv]
            each.head_dim = each.qkv.out_features // (3 * each.num_heads)
            each.attn_dim = each.num_heads * each.head_dim
        return model

    # It takes a share of the channels, and no MACs: the smallest share that saves enough is searched for.
    start = time.perf_counter()
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        if cost(pruned(middle), x[:1]).macs <= limit:
            high = middle
        else:
            low = middle
    small = pruned(high)
    row: Row = {"cut": accuracy(small, setting.test), "seconds to cut": time.perf_counter() - start}
    row["batch norm"] = accuracy(reestimate(small, list(x.split(BATCH))), setting.test)
    return small, row


def measure(setting: Setting, method: str) -> Row:
    """Cut by one method, tune, and judge after each step; what was done before is read from its file."""
    file = setting.file(f"{method}.json")
    if file is not None and file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    small, found = cut_by_slivo(setting) if method.startswith("slivo") else cut_by_peer(setting)
    x = setting.test[0][:1].float()
    before, after = cost(setting.model, x), cost(small, x)
    row: Row = {"method": method, "seed": setting.seed, "faster": before.macs / after.macs, **found}
    row["params"] = after.params / before.params
    shown = {name: f"{row[name]:.2%}" for name in COLUMNS if name in row}
    print(f"  {method}, seed {setting.seed}, {row['faster']:.3f} x: {shown}", flush=True)
    if setting.options.epochs:
        row["history"] = tune(setting, small, method, setting.file(f"{method}.ckpt"))
        row["seconds to tune"] = sum(epoch["seconds"] for epoch in row["history"])
        row["tuned"] = accuracy(small, setting.test)
    if file is not None:
        file.write_text(json.dumps(row, indent=1), encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in small.state_dict().items()}, f"{file}.safetensors")
    return row


def dense(name: str, options: argparse.Namespace, train: Images) -> nn.Module:
    """Return the network as it is before the cut, trained here if its weights are not given."""
    network = NETWORKS[name]
    if network.dense is None:
        return resnet56(options.data)
    torch.manual_seed(0)
    model = network.make()
    file = None if options.checkpoint is None else options.checkpoint / f"{name}.safetensors"
    if file is not None and file.exists():
        model.load_state_dict(load_file(file))
        return model.eval()
    fit(
        model, batches(train, BATCH), labels, epochs=options.dense_epochs, optimizer=network.dense,
        checkpoint=file and file.with_suffix(".ckpt"), on_epoch=lambda row: print(f"  {name}: {row}", flush=True),
    )  # fmt: skip
    if file is not None:
        save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, file)
    return model


def table(rows: Sequence[Row]) -> str:
    """Return the means over seeds as a table, with the spread of what was tuned."""
    lines = ["| method | x fewer MACs | parameters left | cut | batch norm | refit | fine-tuned |", "|---" * 7 + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        cells = [f"{statistics.mean(row['faster'] for row in mine):.2f}"]
        cells.append(f"{statistics.mean(row['params'] for row in mine):.0%}")
        for name in COLUMNS:
            values = [row[name] for row in mine if name in row]
            spread = f" ± {statistics.stdev(values) * 100:.2f}" if name == "tuned" and len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2%}{spread}" if values else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer", choices=["torch-pruning"], help="also measure it: pip install torch-pruning")
    parser.add_argument("--network", nargs="+", choices=list(NETWORKS), default=["resnet56"])
    parser.add_argument("--faster", nargs="+", type=float, default=[2.56], help="how many times fewer MACs")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="all of slivo's and the peer's if not given")
    parser.add_argument("--epochs", type=int, default=6, help="of training after the cut; 0 for none")
    parser.add_argument("--dense-epochs", type=int, default=30, help="for networks that are trained here")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=512, help="training images for criteria, refit and batch norms")
    parser.add_argument("--train", type=int, help="training images; all if not given")
    parser.add_argument("--held-out", type=int, default=0, help="leave out training images, and measure on them")
    parser.add_argument("--judge", choices=list(JUDGES), default="all", help="test images by which methods are judged")
    parser.add_argument("--lr", type=float, help="peak learning rate after the cut")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--kd-weight", type=float, default=0.9, help="of the teacher's word; labels have the rest")
    parser.add_argument("--hint", nargs="*", help="globs of modules whose outputs are to be the teacher's")
    parser.add_argument("--hint-weight", type=float, default=16.0)
    parser.add_argument("--ridge", type=float, default=1e-3)
    for name in ("criterion", "scope"):
        parser.add_argument(f"--{name}", help="of slivo's cut, in place of the network's own")
    for name in ("only", "exclude"):
        parser.add_argument(f"--{name}", nargs="*", help="globs of slivo's cut, in place of the network's own")
    parser.add_argument("--round-to", type=int)
    parser.add_argument("--min-width", type=float)
    parser.add_argument("--checkpoint", type=Path, help="folder to go on from")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse()
    methods = options.methods or [each for each in METHODS if options.peer or each.startswith("slivo")]
    train = decode(options.data, "train")
    if options.held_out:
        order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(0))
        out, rest = order[: options.held_out], order[options.held_out :]
        test, train = (train[0][out], train[1][out]), (train[0][rest], train[1][rest])
    else:
        start, step = JUDGES[options.judge]
        test = decode(options.data, "test", range(start, 10_000, step))
    train = some(train, options.train)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows: list[Row] = []
    for name in options.network:
        model = dense(name, options, train)
        print(f"{name}: {accuracy(model, test):.2%} of {len(test[1])} images before the cut", flush=True)
        for faster in options.faster:
            here: list[Row] = []
            for seed in options.seeds:
                folder = options.checkpoint and options.checkpoint / f"{name}-{faster}-{seed}"
                if folder is not None:
                    folder.mkdir(parents=True, exist_ok=True)
                setting = Setting(NETWORKS[name], model, train, test, options, faster, seed, folder)
                here += [measure(setting, method) for method in methods]
            print(f"\n{name}, {faster} x fewer MACs, {options.epochs} epochs, seeds {options.seeds}\n{table(here)}\n")
            rows += [{"network": name, **row} for row in here]
    if options.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
