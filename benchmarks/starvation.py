"""Does global ranking starve a layer, if scores of different layers are not made to compare?

Usage: python benchmarks/starvation.py [--data DIR] [--keep 0.5]

For each criterion that divides scores by their mean on the axis: the share that the narrowest axis keeps at a budget of
MACs with this and without, and on how many axes fewer than a tenth is left. `small_cnn` trained on the digits, and with
``--data`` also ResNet-56 on CIFAR-10 (files as for `refit_cifar.py`).
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slivo
from cifar import decode, normalize, resnet56
from pressure_digits import train
from slivo.prune import criteria, plan
from slivo.tasks import loader
from slivo.tasks.digits import digits
from slivo.zoo import small_cnn

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def networks(options: argparse.Namespace) -> dict[str, tuple[nn.Module, Batches]]:
    """Return trained networks, each with labelled batches."""
    task = digits()
    torch.manual_seed(0)
    small = train(small_cnn(width=24), task, 12, 0.1, 0)
    found: dict[str, tuple[nn.Module, Any]] = {
        "small_cnn": (small, list(loader(task, "train", batch_size=128, seed=0))[:2])
    }
    if options.data:
        pixels, labels = decode(options.data, "train", range(64))
        found["ResNet-56"] = (resnet56(options.data), [(normalize(pixels), labels)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--keep", type=float, default=0.5, help="share of the MACs that stays")
    parser.add_argument("--only", nargs="+", default=[n for n in criteria.names() if criteria.resolve(n).relative])
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        "| network | criterion | narrowest axis | as it is | axes below a tenth | as it is |\n|---|---|---|---|---|---|"
    )
    for network, (model, batches) in networks(options).items():
        graph = slivo.trace(model, batches[0][0][:2])
        for name in options.only:
            cells = []
            for relative in (True, False):
                goal = plan(
                    model, batches[0][0][:2], keep=slivo.Budget(macs=options.keep), min_width=1, graph=graph,
                    criterion=replace(criteria.resolve(name), relative=relative), batches=batches,
                    loss=lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1]),
                )  # fmt: skip
                shares = [len(kept) / goal.sizes[axis] for axis, kept in goal.keep.items()]
                cells.append((f"{min(shares):.0%}", f"{sum(share < 0.1 for share in shares)} of {len(shares)}"))
            (ours, less), (plain, lost) = cells
            print(f"| {network} | `{name}` | {ours} | {plain} | {less} | {lost} |", flush=True)


if __name__ == "__main__":
    main()
