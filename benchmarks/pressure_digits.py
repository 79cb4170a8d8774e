"""What does a cut cost after training under pressure? `small_cnn` on the digits, by kind of pressure.

Usage: python benchmarks/pressure_digits.py [--keep 0.3] [--epochs 16] [--seeds 0 1 2]

Each network is trained for as many epochs, then cut to the share of MACs and measured without any more training; then
trained for a quarter of the epochs more. Accuracy on the test images, median over the seeds.
"""

from __future__ import annotations

import argparse
import glob
import platform
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import nn

import slivo
from slivo.measure import quality
from slivo.prune import cut, plan, pressure
from slivo.prune.invariance import counted
from slivo.tasks import Task, forward, loader
from slivo.tasks.digits import digits
from slivo.train import Hook, OptimizerSpec, fit
from slivo.zoo import small_cnn

PRESSURES: dict[str, tuple[str, Callable[..., Sequence[Hook]]]] = {
    "none": ("l2", lambda **_: []),
    "none ": ("bn_scale", lambda **_: []),
    "slimming(0.1)": ("bn_scale", lambda **_: [pressure.slimming(0.1)]),
    "slimming(0.3)": ("bn_scale", lambda **_: [pressure.slimming(0.3)]),
    "group_lasso(0.003)": ("l2", lambda graph, **_: [pressure.group_lasso(graph, 0.003)]),
    "group_lasso(0.01)": ("l2", lambda graph, **_: [pressure.group_lasso(graph, 0.01)]),
    "greg": ("plan", lambda **given: [pressure.greg(**given)]),
    "hspg": ("plan", lambda **given: [pressure.hspg(**given)]),
}
"""What it is called, the criterion of the cut afterwards (``plan``: what was chosen beforehand), and its hooks."""


def train(model: nn.Module, task: Task, epochs: int, lr: float, seed: int, hooks: Sequence[Hook] = ()) -> nn.Module:
    """Train in place by the task's own loss."""
    fit(
        model,
        loader(task, "train", batch_size=64, seed=seed),
        lambda net, batch: {"labels": task.loss(forward(task, net, batch), batch)},
        epochs=epochs,
        optimizer=OptimizerSpec(lr=lr),
        hooks=hooks,
        seed=seed,
    )
    return model


def row(name: str, task: Task, options: argparse.Namespace, seed: int) -> list[float]:
    """Return the accuracy before the cut, after it, and after more training."""
    criterion, make = PRESSURES[name]
    torch.manual_seed(seed)
    model, keep = small_cnn(width=options.width), slivo.Budget(macs=options.keep)
    train(model, task, options.epochs // 2, 0.1, seed)
    graph = slivo.trace(model, task.example_inputs)
    leave = [glob.escape(axis) for axis in counted(graph)]
    batches = list(loader(task, "train", batch_size=128, seed=seed))[:4]
    goal = plan(
        model, task.example_inputs, keep=keep, criterion="taylor", exclude=leave, graph=graph, batches=batches,
        loss=lambda net, batch: task.loss(forward(task, net, batch), batch),
    )  # fmt: skip
    train(model, task, options.epochs - options.epochs // 2, 0.05, seed, make(graph=graph, plan=goal))
    if criterion != "plan":
        goal = plan(model, task.example_inputs, keep=keep, criterion=criterion, graph=graph)
    small = cut(model, task.example_inputs, goal, graph=graph)
    found = [quality(each, task, "test")[task.primary] for each in (model, small)]
    return [*found, quality(train(small, task, options.epochs // 4, 0.02, seed), task, "test")[task.primary]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.3, help="share of the MACs that stays")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(PRESSURES))
    options = parser.parse_args()
    task = digits()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"small_cnn(width={options.width}), {options.epochs} epochs, {options.keep:.0%} of the MACs, {options.seeds}")
    print("| pressure | cut by | before the cut | after it | trained on |\n|---|---|---|---|---|")
    for name in options.only:
        rows = [row(name, task, options, seed) for seed in options.seeds]
        cells = " | ".join(f"{statistics.median(column):.1%}" for column in zip(*rows, strict=True))
        print(f"| `{name.strip()}` | `{PRESSURES[name][0]}` | {cells} |", flush=True)


if __name__ == "__main__":
    main()
