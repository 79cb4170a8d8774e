"""How accurate is a network right after the cut, without any training? ResNet-56 on CIFAR-10, by criterion and mending.

Usage: python benchmarks/refit_cifar.py --data DIR [--criteria l2 taylor] [--widths inner all] [--json FILE]

DIR holds ``cifar10_jpeg_{train,test}.npz`` and ``cifar10_jpeg_resnet56.safetensors``; decoding them takes Pillow.
Calibration takes unlabelled training images, chosen at random; only criteria of the gradient see labels, of the same
images. With ``--held-out`` accuracy is that on other training images, to choose settings by.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import slivo
from slivo.prune import reestimate, refit

WIDTHS: dict[str, list[str]] = {"inner": ["layer*.conv1"], "all": []}
"""What is cut: the channels inside the blocks alone, or those of the residual stream, too."""


class Block(nn.Module):
    """Two convolutions and a shortcut that is padded where the width doubles (option A)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.more = stride, (width - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Add what the block computes to what it was given."""
        shortcut = x
        if self.stride > 1:
            shortcut = x[:, :, :: self.stride, :: self.stride]
            shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, self.more, self.more))
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + shortcut).relu()


class ResNet56(nn.Module):
    """The network whose weights are measured."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1)
        self.layer2 = self._stage(16, 32, 2)
        self.layer3 = self._stage(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(inputs: int, width: int, stride: int) -> nn.Sequential:
        return nn.Sequential(Block(inputs, width, stride), *(Block(width, width, 1) for _ in range(8)))

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, shape (batch, 3, 32, 32)."""
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.linear(x.mean((2, 3)))


def images(folder: Path, split: str, chosen: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Decode and normalize images of a split, all or those chosen."""
    from PIL import Image

    with np.load(folder / f"cifar10_jpeg_{split}.npz") as file:
        data, offsets, labels = file["jpeg"], file["offset"], file["label"].astype(np.int64)
    chosen = range(len(labels)) if chosen is None else chosen
    raw = [Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB") for i in chosen]
    pixels = torch.from_numpy(np.stack([np.asarray(each) for each in raw])).permute(0, 3, 1, 2).float() / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels - mean[:, None, None]) / deviation[:, None, None], torch.from_numpy(labels[list(chosen)])


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, *, bf16: bool) -> float:
    model = model.eval().to(memory_format=torch.channels_last)
    right = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for part, labels in zip(x.split(500), y.split(500), strict=True):
            right += int((model(part.contiguous(memory_format=torch.channels_last)).argmax(1) == labels).sum())
    return right / len(x)


def row(model: nn.Module, criterion: str, widths: str, given: tuple[Tensor, Tensor], options: Any, judge: Any) -> Any:
    """Cut the model by one criterion, mend it in every way, and judge each."""
    x, y = given
    labelled = list(zip(x.split(64), y.split(64), strict=True))
    small = slivo.prune(
        model, x[:2], keep=slivo.Budget(macs=1 / options.faster), criterion=criterion, only=WIDTHS[widths],
        batches=labelled, loss=lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1]),
    )  # fmt: skip
    batches = list(x.split(128))
    found: dict[str, Any] = {"criterion": criterion, "widths": widths}
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
    parser.add_argument("--criteria", nargs="+", default=["l2", "fpgm", "taylor", "random"])
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
    given = images(options.data, "train", order[: options.samples].tolist())
    if options.held_out:
        x, y = images(options.data, "train", order[-options.test :].tolist())
    else:
        chosen = np.random.default_rng(0).permutation(10_000)[: options.test]
        x, y = images(options.data, "test", np.sort(chosen).tolist())
    model = ResNet56().eval()
    model.load_state_dict(load_file(options.data / "cifar10_jpeg_resnet56.safetensors"))

    def judge(net: nn.Module) -> float:
        return accuracy(net, x, y, bf16=options.bf16)

    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{options.faster} x fewer MACs, {options.samples} samples, accuracy on {len(x)} images")
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
