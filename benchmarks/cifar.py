"""CIFAR-10 for benchmarks: its images, networks for them, batches to train on, and accuracy.

The folder holds ``cifar10_jpeg_{train,test}.npz`` and ``cifar10_jpeg_resnet56.safetensors``; decoding takes Pillow.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

Images = tuple[Tensor, Tensor]
"""Pixels, uint8 or normalized, shape (samples, 3, 32, 32), and labels."""

MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

MARGIN = 4
"""Pixels by which a crop may be off center."""


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


class ResNet(nn.Module):
    """Three stages of so many blocks: 3 make a ResNet-20, 9 a ResNet-56."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(inputs: int, width: int, stride: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(Block(inputs, width, stride), *(Block(width, width, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, shape (batch, 3, 32, 32)."""
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.linear(x.mean((2, 3)))


class ResNet56(ResNet):
    """The network whose weights are given."""

    def __init__(self) -> None:
        super().__init__(9)


def resnet56(folder: Path) -> ResNet56:
    """Return the network with the weights given."""
    model = ResNet56().eval()
    model.load_state_dict(load_file(folder / "cifar10_jpeg_resnet56.safetensors"))
    return model


def decode(folder: Path, split: str, chosen: Sequence[int] | None = None) -> Images:
    """Return pixels, uint8, and labels of a split, ``train`` or ``test``: all or those chosen."""
    from PIL import Image

    with np.load(folder / f"cifar10_jpeg_{split}.npz") as file:
        data, offsets, labels = file["jpeg"], file["offset"], file["label"].astype(np.int64)
    chosen = range(len(labels)) if chosen is None else chosen
    raw = [Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB") for i in chosen]
    pixels = torch.from_numpy(np.stack([np.asarray(each) for each in raw])).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(labels[list(chosen)])


def some(images: Images, count: int | None) -> Images:
    """Return so many images, always the same, of all classes; all if None. In the files they lie by class."""
    if count is None:
        return images
    chosen = torch.randperm(len(images[1]), generator=torch.Generator().manual_seed(0))[:count]
    return images[0][chosen], images[1][chosen]


def normalize(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - MEAN[:, None, None]) / DEVIATION[:, None, None]


class Crops(Dataset[Images]):
    """Images for training, cropped at random from a black margin and flipped half of the time, a batch at once."""

    def __init__(self, images: Images) -> None:
        self.pixels, self.labels = nn.functional.pad(images[0], (MARGIN,) * 4), images[1]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, chosen: list[int]) -> Images:
        count, size = len(chosen), self.pixels.shape[-1] - 2 * MARGIN
        rows = torch.randint(2 * MARGIN + 1, (count, 1)) + torch.arange(size)
        columns = torch.randint(2 * MARGIN + 1, (count, 1)) + torch.arange(size)
        columns = torch.where(torch.rand(count, 1) < 0.5, columns, columns.flip(1))
        index = torch.tensor(chosen)
        x = self.pixels[index[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return normalize(x).contiguous(memory_format=torch.channels_last), self.labels[index]


def batches(images: Images, size: int) -> DataLoader[Images]:
    """Return batches to train on, in an order and with crops that `slivo.train.fit` seeds."""
    return DataLoader(
        Crops(images), batch_size=size, shuffle=True, generator=torch.Generator(), collate_fn=lambda batch: batch
    )


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, *, bf16: bool = False) -> float:
    """Return the share of images that a model classifies as labelled; it is left in evaluation mode."""
    model.eval()
    right = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for pixels, labels in zip(*(each.split(500) for each in images), strict=True):
            x = normalize(pixels) if pixels.dtype == torch.uint8 else pixels
            right += int((model(x.contiguous(memory_format=torch.channels_last)).argmax(1) == labels).sum())
    return right / len(images[1])
