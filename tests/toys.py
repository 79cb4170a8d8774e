"""A task, networks and recipes that take a second, for tests of whole runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from slivo.tasks import Task, classification


def task(samples: int = 96, features: int = 12) -> Task:
    """Points around three centers, far enough apart to be told from one another."""
    generator = torch.Generator().manual_seed(7)
    centers = 2 * torch.randn(3, features, generator=generator)

    def split(count: int) -> TensorDataset:
        labels = torch.arange(count) % 3
        return TensorDataset(centers[labels] + 0.5 * torch.randn(count, features, generator=generator), labels)

    example = torch.randn(2, features, generator=generator)
    return classification("points", split(samples), split(30), split(45), classes="abc", example_inputs=(example,))


def other_task() -> Task:
    """A task of the same kind that `net` does not fit."""
    return task(features=5)


class Net(nn.Module):
    """Three linear layers with norm and dropout: buffers that move, and randomness in training."""

    def __init__(self, width: int, features: int = 12) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(features, width), nn.BatchNorm1d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x)))
        return out


def net(width: int = 16) -> Net:
    return Net(width)


class Guesser(nn.Module):
    """Takes everything for the first class, which is right for a third of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 3)
        with torch.no_grad():
            self.head.bias.copy_(torch.tensor([100.0, 0.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out


def recipe(*stages: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """Return a recipe on the toy task."""
    return {
        "name": "toy",
        "task": {"kind": "image-classification", "data": "toys:task"},
        "teacher": {"model": "toys:net", "fit": {"epochs": 3, "batch_size": 16, "optimizer": {"lr": 0.05}}},
        "target": {"macs": 0.5},
        "stages": list(stages),
        **parts,
    }


KD = {"losses": [{"kd": {"temperature": 2.0, "weight": 0.9}}], "epochs": 2, "batch_size": 16}
PRUNE = {"criterion": "taylor", "schedule": {"steps": 2}, "recover": KD}
WITH_ADAPTER = {"losses": ["kd", {"hint": {"at": "second", "weight": 0.1}}], "epochs": 2, "batch_size": 16}
ALL_KINDS = ({"prune": PRUNE}, {"finetune": {"epochs": 1}}, {"distill": WITH_ADAPTER}, {"quantize": {}})
