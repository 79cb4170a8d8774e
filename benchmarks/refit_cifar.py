"""How accurate is a network right after the cut, without any training? ResNet-56 on CIFAR-10, by criterion and mending.

Usage: python benchmarks/refit_cifar.py --data DIR [--criteria l2 taylor] [--widths inner all] [--json FILE]

DIR holds ``cifar10_jpeg_{train,test}.npz`` and ``cifar10_jpeg_resnet56.safetensors``; decoding them takes Pillow.
Calibration takes unlabelled training images, chosen at random; only criteria of the gradient see labels, of the same
images. With ``--held-out`` accuracy is that on other training images, to choose settings by.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import slivo
from cifar import Images, accuracy, decode, normalize, resnet56
from slivo.prune import cut, reestimate, refit, surgeon

WIDTHS: dict[str, list[str]] = {"inner": ["layer*.conv1"], "all": []}
"""What is cut: the channels inside the blocks alone, or those of the residual stream, too."""


def smaller(model: nn.Module, criterion: str, widths: str, given: Images, faster: float) -> nn.Module:
    """Cut the model by one criterion, or by what `surgeon` says of several positions at once."""
    x, y = given
    keep, only = slivo.Budget(macs=1 / faster), WIDTHS[widths]
    if criterion == "surgeon":
        return cut(model, x[:2], surgeon(model, x[:2], keep=keep, batches=x.split(128), only=only))
    return slivo.prune(
        model, x[:2], keep=keep, criterion=criterion, only=only,
        batches=list(zip(x.split(64), y.split(64), strict=True)),
        loss=lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1]),
    )  # fmt: skip


def row(
    model: nn.Module, criterion: str, widths: str, given: Images, options: Any, judge: Callable[[nn.Module], float]
) -> dict[str, Any]:
    """Cut the model by one criterion, mend it in every way, and judge each."""
    found: dict[str, Any] = {"criterion": criterion, "widths": widths}
    start = time.perf_counter()
    small = smaller(model, criterion, widths, given, options.faster)
    found["seconds to cut"] = time.perf_counter() - start
    batches = list(given[0].split(128))
    start = time.perf_counter()
    mended = refit(small, model, batches, ridge=options.ridge)
    found["seconds"] = time.perf_counter() - start
    found["refit"] = judge(mended)
    found["cut"] = judge(small)
    found["batch norm"] = judge(reestimate(small, batches))
    found["refit, then batch norm"] = judge(reestimate(mended, batches))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--criteria", nargs="+", default=["surgeon", "l2", "fpgm", "taylor", "random"])
    parser.add_argument("--widths", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--samples", type=int, default=512, help="unlabelled training images")
    parser.add_argument("--faster", type=float, default=2.56, help="how many times fewer MACs")
    parser.add_argument("--ridge", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", type=int, default=10_000, help="images to measure accuracy on, chosen at random")
    parser.add_argument("--held-out", action="store_true", help="measure on other training images")
    parser.add_argument("--bf16", action="store_true", help="measure in bfloat16, faster on processors that have it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    order = np.random.default_rng(options.seed).permutation(50_000)
    pixels, labels = decode(options.data, "train", order[: options.samples].tolist())
    given = normalize(pixels).contiguous(memory_format=torch.channels_last), labels
    if options.held_out:
        test = decode(options.data, "train", order[-options.test :].tolist())
    else:
        chosen = np.random.default_rng(0).permutation(10_000)[: options.test]
        test = decode(options.data, "test", np.sort(chosen).tolist())
    model = resnet56(options.data)

    def judge(net: nn.Module) -> float:
        return accuracy(net, test, bf16=options.bf16)

    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{options.faster} x fewer MACs, {options.samples} samples, accuracy on {options.test} images")
    columns = ["cut", "batch norm", "refit", "refit, then batch norm"]
    print("| widths | criterion | " + " | ".join(columns) + " | s to refit |")
    print("|---" * (len(columns) + 3) + "|")
    rows = []
    for widths in options.widths:
        for criterion in options.criteria:
            torch.manual_seed(options.seed)
            found = row(model, criterion, widths, given, options, judge)
            rows.append(found)
            cells = " | ".join(f"{found[column]:.1%}" for column in columns)
            print(f"| {widths} | {criterion} | {cells} | {found['seconds']:.0f} |", flush=True)
    if options.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
