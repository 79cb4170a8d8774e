"""Is pruning with distillation better than either alone? ResNet-56 on CIFAR-10, all strategies at the same cost.

Usage: python benchmarks/strategies.py --data DIR [--strategies ...] [--train N] [--epochs 12] [--seeds 0 1 2]
[--checkpoint DIR] [--json FILE]

DIR holds ``cifar10_jpeg_{train,test}.npz`` and ``cifar10_jpeg_resnet56.safetensors``; decoding them takes Pillow. Each
strategy is a recipe, run by `slivo.compress` with the same teacher, images, and epochs in all, to the same share of the
teacher's MACs; parameters and bytes are printed beside. Accuracy is that of the last epoch, on test images. A run that
was broken off goes on from ``--checkpoint``. The first two are the single prongs; ``finetune`` has labels alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import slivo
from cifar import Crops, Images, accuracy, decode, normalize, resnet56, some
from slivo.tasks import Task, classification

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

Row = dict[str, Any]


class Still(Dataset[Images]):
    """Images as they are, a batch at once."""

    def __init__(self, images: Images) -> None:
        self.pixels, self.labels = images

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, chosen: list[int]) -> Images:
        index = torch.tensor(chosen)
        return normalize(self.pixels[index]).contiguous(memory_format=torch.channels_last), self.labels[index]


def task(train: Images, val: Images, test: Images) -> Task:
    example: Tensor = normalize(train[0][:2])
    return classification(
        "cifar-10", Crops(train), Still(val), Still(test), classes=CLASSES, example_inputs=(example,),
        collate=lambda batch: batch,
    )  # fmt: skip


def recipe(name: str, epochs: int, macs: float) -> dict[str, Any]:
    """Return a strategy as a recipe in which the student is trained for so many epochs in all."""
    hint = {"hint": {"at": "layer*", "weight": 8.0}}
    kd = {"losses": [{"kd": {"temperature": 4.0, "weight": 0.9}}], "batch_size": 128}
    both = {**kd, "losses": [*kd["losses"], hint]}
    gentle, fresh = {"lr": 0.02}, {"lr": 0.1}
    own = {"model": "cifar:ResNet", "args": {"blocks": 3}}  # a ResNet-20: 0.325 of the teacher's MACs
    cut = {"criterion": "taylor", "only": ["layer*.conv1*"], "keep": {"macs": macs}, "refit": True}

    def taught(count: int, part: Mapping[str, Any] = both, optimizer: Mapping[str, Any] = gentle) -> dict[str, Any]:
        return {"distill": {**part, "epochs": count, "optimizer": dict(optimizer)}}

    half = {**cut, "keep": {"macs": macs**0.5}}
    third = {**cut, "keep": {"macs": macs ** (1 / 3)}}
    made: dict[str, dict[str, Any]] = {
        "prune, finetune": {
            "stages": [{"prune": cut}, {"finetune": {"epochs": epochs, "batch_size": 128, "optimizer": gentle}}]
        },
        "distill": {"student": own, "stages": [taught(epochs, kd, fresh)]},
        "prune-then-distill": {"stages": [{"prune": cut}, taught(epochs)]},
        "prune, distill, prune, distill": {
            "stages": [{"prune": half}, taught(epochs // 2), {"prune": half}, taught(epochs - epochs // 2)]
        },
        "alternate": {"stages": [{"repeat": {"times": 3, "stages": [{"prune": third}, taught(epochs // 3)]}}]},
        "layered": {
            "target": {"macs": macs},
            "stages": [{"layers": {"groups": 3, "stages": [{"prune": {**cut, "keep": None}}, taught(epochs // 3)]}}],
        },
        "joint": {
            "stages": [{"joint": {**both, "epochs": epochs, "prune": {**cut, "refit": False}, "optimizer": gentle}}]
        },
        "pruned-teacher": {
            "student": own,
            "stages": [{"prune": half}, taught(epochs // 3), {"teach": True}, taught(epochs - epochs // 3, kd, fresh)],
        },
        "low-rank-then-distill": {"stages": [{"factorize": {"keep": {"macs": macs}}}, taught(epochs)]},
        "drop, prune, distill": {
            "stages": [
                {"drop": {"keep": {"macs": macs**0.3}}},
                {"prune": {**cut, "keep": {"macs": macs**0.7}}},
                taught(epochs),
            ]
        },
    }
    for stage in made["layered"]["stages"][0]["layers"]["stages"]:
        if "prune" in stage:
            stage["prune"] = {
                key: value for key, value in stage["prune"].items() if value is not None and key != "only"
            }
    return {"name": name, **made[name]}


STRATEGIES = [
    "prune, finetune", "distill", "prune-then-distill", "prune, distill, prune, distill", "alternate", "layered",
    "joint", "pruned-teacher", "low-rank-then-distill", "drop, prune, distill",
]  # fmt: skip


def measure(name: str, data: Task, model: torch.nn.Module, options: argparse.Namespace, seed: int) -> Row:
    """Run one strategy and say what it came to; from its folder if it is there."""
    out = options.checkpoint and options.checkpoint / f"{name.replace(', ', '-')}-{seed}"
    result = slivo.compress(
        model, data, recipe(name, options.epochs, options.macs), seed=seed, out=out,
        resume=out is not None and (out / "run.json").exists(),
    )  # fmt: skip
    teacher, student = result.summary["teacher"], result.summary["student"]
    row: Row = {"strategy": name, "seed": seed, "accuracy": student["accuracy"], "teacher": teacher["accuracy"]}
    row |= {key: student[key] / teacher[key] for key in ("macs", "params", "bytes")}
    row["seconds"] = result.summary["seconds"]
    cells = ", ".join(f"{key} {row[key]:.2%}" for key in ("accuracy", "macs", "params", "bytes"))
    print(f"  {name}, seed {seed}: {cells}, {row['seconds']:.0f} s", flush=True)
    return row


def table(rows: Sequence[Row]) -> str:
    lines = ["| strategy | accuracy | MACs | parameters | bytes | s |", "|---" * 6 + "|"]
    for name in dict.fromkeys(row["strategy"] for row in rows):
        mine = [row for row in rows if row["strategy"] == name]
        found = [row["accuracy"] for row in mine]
        spread = f" ± {stdev(found) * 100:.2f}" if len(found) > 1 else ""
        costs = " | ".join(f"{mean(row[key] for row in mine):.1%}" for key in ("macs", "params", "bytes"))
        lines.append(f"| {name} | {mean(found):.2%}{spread} | {costs} | {mean(row['seconds'] for row in mine):.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--epochs", type=int, default=12, help="of training in all, for each; a multiple of 3")
    parser.add_argument("--macs", type=float, default=0.325, help="share of the teacher's; a ResNet-20 has 0.325")
    parser.add_argument("--train", type=int, help="training images; all if not given")
    parser.add_argument("--val", type=int, default=1000, help="training images to validate by, which are left out")
    parser.add_argument("--test", type=int, help="test images; all if not given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--checkpoint", type=Path, help="folder to go on from")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    whole, test = some(decode(options.data, "train"), 50_000), some(decode(options.data, "test"), options.test)
    count = options.train or len(whole[1]) - options.val
    val = whole[0][-options.val :], whole[1][-options.val :]
    data, model = task((whole[0][:count], whole[1][:count]), val, test), resnet56(options.data)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"teacher: {accuracy(model, val):.2%} of the images to validate by; {count:,} to train on", flush=True)
    rows = [measure(name, data, model, options, seed) for seed in options.seeds for name in options.strategies]
    print(f"\n{options.epochs} epochs in all, seeds {options.seeds}, {len(test[1]):,} test images\n{table(rows)}")
    if options.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
