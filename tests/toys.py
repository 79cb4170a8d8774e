"""A task, networks and recipes that take a second, for tests of whole runs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from slivo.recipe import Watch
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


class Moving(Dataset[tuple[Tensor, Tensor]]):
    """Points that are elsewhere each time they are looked at."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, label = self.data[index]
        return x + 0.1 * torch.randn(x.shape), label


class Slow(Moving):
    """Points that take their time: an epoch of them lasts ten seconds."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        time.sleep(0.1)
        return super().__getitem__(index)


def slow_task() -> Task:
    still = task()
    return replace(still, train=Slow(still.train))


def moving_task() -> Task:
    still = task()
    return replace(still, train=Moving(still.train))


def touchy_task() -> Task:
    """A task whose loss is NaN where a network is too sure of itself, as it is after steps that are too long."""
    calm = task()

    def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return calm.loss(output, batch) * (math.nan if float(output.abs().max().detach()) > 15 else 1.0)

    return replace(calm, loss=loss)


class Strict(Dataset[dict[str, Tensor]]):
    """Samples that are mappings."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, label = self.data[index]
        return {"x": x, "label": label}


def strict_task() -> Task:
    """A task whose functions know exactly what is in a batch."""
    lax = task()

    def only(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        assert set(batch) == {"x", "label"}
        return batch

    return replace(
        lax,
        kind="something",
        train=Strict(lax.train),
        val=Strict(lax.val),
        test=Strict(lax.test),
        inputs=lambda batch: (only(batch)["x"],),
        loss=lambda output, batch: nn.functional.cross_entropy(output, only(batch)["label"]),
        update=lambda metrics, output, batch: metrics.update(output.argmax(-1), only(batch)["label"]),
    )


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


class Bare(nn.Module):
    """A network without modules inside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


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


def searched(vary: Mapping[str, Any] | None = None, **parts: Any) -> dict[str, Any]:
    """Return a short recipe that says what is varied in it."""
    vary = {"stages.0.prune.criterion": ["l2", "l1", "random"], **MACS} if vary is None else dict(vary)
    teacher = {"model": "toys:net", "fit": {"epochs": 1, "batch_size": 16, "optimizer": {"lr": 0.05}}}
    stages = ({"prune": {}}, {"distill": {**KD, "epochs": 1}})
    return recipe(*stages, **{"teacher": teacher, "search": {"vary": vary, "margin": 1.0}, **parts})


MACS = {"target.macs": {"low": 0.3, "high": 0.6}}
KD = {"losses": [{"kd": {"temperature": 2.0, "weight": 0.9}}], "epochs": 2, "batch_size": 16}
PRUNE = {"criterion": "taylor", "schedule": {"steps": 2}, "recover": KD}
WITH_ADAPTER = {"losses": ["kd", {"hint": {"at": "second", "weight": 0.1}}], "epochs": 2, "batch_size": 16}
ALL_KINDS = ({"prune": PRUNE}, {"finetune": {"epochs": 1}}, {"distill": WITH_ADAPTER}, {"quantize": {}})


class Killed(BaseException):
    """Stands for the death of the process: nothing in the library expects it."""


class Killer(Watch):
    """Dies at the given moment: what happens, in which step, and after how many steps of a training."""

    def __init__(self, what: str, label: str, done: int = 0) -> None:
        self.moment = (what, label, done)

    def _reach(self, what: str, label: str, done: int = 0) -> None:
        if (what, label, done) == self.moment:
            raise Killed

    def started(self, label: str, index: int, count: int) -> None:
        assert 0 <= index <= count
        self._reach("started", label)

    def progress(self, label: str, done: int, total: int, fields: Mapping[str, float]) -> None:
        assert done <= total
        assert all(math.isfinite(value) for value in fields.values())
        self._reach("progress", label, done)

    def finished(self, record: Mapping[str, Any]) -> None:
        self._reach("finished", record["label"])


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads((folder / "run.json").read_text()), rows, json.loads((folder / "summary.json").read_text())


def timeless(value: Any) -> Any:
    """Leave out what depends on the clock."""
    if isinstance(value, dict):
        clock = ("seconds", "samples_per_second", "latency_ms", "started")
        return {key: timeless(item) for key, item in value.items() if key not in clock}
    return [timeless(item) for item in value] if isinstance(value, list | tuple) else value


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
