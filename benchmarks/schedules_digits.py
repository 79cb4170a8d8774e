"""In how many steps, and by which schedule? `small_cnn` on the digits, with as much training in all.

Usage: python benchmarks/schedules_digits.py [--keep 0.1] [--epochs 8] [--seeds 0 1 2]

The last rows are controlled by validation: they may lose one point, and say how small the network became.
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
from typing import Any

import torch
from torch import nn

import slivo
from pressure_digits import train
from slivo.graph.copies import duplicate
from slivo.measure import quality
from slivo.prune import iterate
from slivo.tasks import Task, forward, loader
from slivo.tasks.digits import digits
from slivo.zoo import small_cnn

ROWS: dict[str, dict[str, Any]] = {
    "one shot": {"steps": 1},
    "linear, 4 steps": {"kind": "linear", "steps": 4},
    "exponential, 4 steps": {"kind": "exponential", "steps": 4},
    "cubic, 4 steps": {"kind": "cubic", "steps": 4},
    "exponential, 4 steps, max_drop 0.01": {"kind": "exponential", "steps": 4, "max_drop": 0.01, "halvings": 2},
    "one shot, max_drop 0.01": {"steps": 1, "max_drop": 0.01, "halvings": 2},
}


def row(model: nn.Module, task: Task, options: argparse.Namespace, seed: int, given: Any) -> tuple[float, float, int]:
    """Return the accuracy on the test images, the share of the MACs that stayed, and the number of trainings."""
    batches = list(loader(task, "train", batch_size=128, seed=seed))[:4]
    cutter = functools.partial(
        slivo.prune, criterion="taylor", batches=batches,
        loss=lambda net, batch: task.loss(forward(task, net, batch), batch),
    )  # fmt: skip
    found = iterate(
        duplicate(model),
        task.example_inputs,
        keep=slivo.Budget(macs=options.keep),
        recover=lambda net: train(net, task, options.epochs // given["steps"], 0.05, seed),
        validate=lambda net: quality(net, task, "val")[task.primary],
        prune=cutter,
        **given,
    )
    left = slivo.trace(found.model, task.example_inputs).macs / slivo.trace(model, task.example_inputs).macs
    return quality(found.model, task, "test")[task.primary], left, len(found.trials)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.1, help="share of the MACs that stays")
    parser.add_argument("--epochs", type=int, default=8, help="of recovery, in all")
    parser.add_argument("--width", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    task = digits()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    models = []
    for seed in options.seeds:
        torch.manual_seed(seed)
        models.append(train(small_cnn(width=options.width), task, 12, 0.1, seed))
    dense = statistics.median(quality(model, task, "test")[task.primary] for model in models)
    print(f"small_cnn(width={options.width}), {dense:.1%}; {options.keep:.0%} of the MACs asked, seeds {options.seeds}")
    print("| schedule | accuracy | MACs left | trainings |\n|---|---|---|---|")
    for name, given in ROWS.items():
        rows = [row(model, task, options, seed, given) for model, seed in zip(models, options.seeds, strict=True)]
        accuracy, left, count = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"| {name} | {accuracy:.1%} | {left:.1%} | {count:.0f} |", flush=True)


if __name__ == "__main__":
    main()
