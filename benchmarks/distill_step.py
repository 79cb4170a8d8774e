"""What does a teacher cost, live and from a cache? Steps of a training, timed in turns on the same batches.

Usage: python benchmarks/distill_step.py [--batch 32] [--steps 20] [--clock wall|cpu] [--json FILE]

Student is a ResNet-20 and teacher a ResNet-56 for images of 32x32, which are random. A step reads a batch, runs forward
and backward, and changes the weights. In turns, so that whatever else the machine does meets all alike:

- plain: the student alone, on labels
- teacher: its forward pass alone
- live: a distillation step that runs the teacher
- first: one that runs the teacher and keeps what it says
- warm: one that takes it from the disk

Two lessons: logits, and logits with a feature map (kept in float16). Bars: warm takes at most 1.10 of plain, and live
at most 1.05 of plain and teacher together, medians of both. One thread. ``--clock cpu`` times the processor instead of
the wall clock, on which other work on the machine does not count.

A cache compares one of its answers with the teacher's at its batches 1, 2, 4, 8 and so on. This falls into steps that
are timed here, but the median step does not show it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cifar import Block
from coverage import machine
from slivo import losses
from slivo.distill import Term, Views, cached, distillation, fill
from slivo.distill.teacher import frozen
from slivo.distill.views import ordered
from slivo.tasks import classification, loader

# By the place in the teacher that each loss looks at.
LESSONS = {
    "logits": {"": losses.kd(weight=0.9)},
    "logits and a feature map": {"": losses.kd(weight=0.9), "layer2": losses.hint(at="layer2", weight=1.0)},
}
WARM_BAR, LIVE_BAR = 1.10, 1.05
Batch = tuple[Tensor, ...]
Step = Callable[[], object]


class ResNet(nn.Module):
    """A residual network for small images, of ``6 * blocks + 2`` layers."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        stages = []
        for inputs, width, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
            rest = (Block(width, width, 1) for _ in range(blocks - 1))
            stages.append(nn.Sequential(Block(inputs, width, stride), *rest))
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="of each kind")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    heads = ("lesson", "plain, ms", "teacher", "live", "first", "warm", "warm / plain", "live / (plain + teacher)")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    rows = []
    for lesson, terms in LESSONS.items():
        row = measured(terms, options.batch, options.steps, options.clock)
        rows.append({"lesson": lesson, **row})
        cells = (f"{row['ms'][kind]['median']:.1f}" for kind in ("plain", "teacher", "live", "first", "warm"))
        print(f"| {lesson} | {' | '.join(cells)} | {row['warm_ratio']:.3f} | {row['live_ratio']:.3f} |", flush=True)
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        found = {"machine": machine(), "settings": settings, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    missed = [row["lesson"] for row in rows if row["warm_ratio"] > WARM_BAR or row["live_ratio"] > LIVE_BAR]
    if missed:
        print(f"missed: {', '.join(missed)}")
    return 1 if missed else 0


def measured(terms: Mapping[str, Term], batch_size: int, steps: int, clock: str) -> dict[str, Any]:
    """Return medians and quartiles of each kind of step in milliseconds, and the ratios that the bars are about."""
    now = time.perf_counter if clock == "wall" else time.process_time
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        kinds = made(terms, batch_size, steps + 1, Path(folder))
        for turn in range(steps + 1):
            order = list(kinds)
            for kind in order[turn % len(order) :] + order[: turn % len(order)]:
                started = now()
                kinds[kind]()
                if turn:  # the first of each warms up
                    times.setdefault(kind, []).append(1000 * (now() - started))
    ms = {
        kind: dict(zip(("q1", "median", "q3"), statistics.quantiles(each, n=4), strict=True))
        for kind, each in times.items()
    }
    median = {kind: each["median"] for kind, each in ms.items()}
    return {
        "ms": ms,
        "warm_ratio": median["warm"] / median["plain"],
        "live_ratio": median["live"] / (median["plain"] + median["teacher"]),
    }


def made(terms: Mapping[str, Term], batch_size: int, steps: int, folder: Path) -> dict[str, Step]:
    """Return the kinds of step, each with a student of its own and with batches for so many steps."""
    torch.manual_seed(0)
    size = batch_size * steps
    data = TensorDataset(torch.randn(size, 3, 32, 32), torch.randint(10, (size,)))
    names = [str(index) for index in range(10)]
    task = classification("random", data, data, data, classes=names, example_inputs=(data.tensors[0][:2],))
    teacher = ResNet(9).eval()
    views = Views(data)
    new, full = (cached(teacher, views, folder / name, taps=terms) for name in ("new", "full"))
    fill(full, forward, batch_size=batch_size)
    ordinary = lambda: iter(loader(task, "train", batch_size=batch_size))  # noqa: E731
    keyed = lambda: iter(ordered(views, range(size), batch_size=batch_size))  # noqa: E731

    def distilled(source: Any, batches: Iterator[Batch]) -> Step:
        objective = distillation(source, forward, task.loss, terms.values())
        return stepping(lambda student, batch: sum(objective(student, batch).values()), batches)

    return {
        "plain": stepping(lambda student, batch: task.loss(student(batch[0]), batch), ordinary()),
        "teacher": lambda: alone(teacher, data.tensors[0][:batch_size]),
        "live": distilled(teacher, ordinary()),
        "first": distilled(new, keyed()),
        "warm": distilled(full, keyed()),
    }


def stepping(loss: Callable[[nn.Module, Batch], Any], batches: Iterator[Batch]) -> Step:
    """Return a step of a fresh student's training."""
    student = ResNet(3).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        batch = next(batches)
        optimizer.zero_grad(set_to_none=True)
        loss(student, batch).backward()
        optimizer.step()

    return step


def alone(teacher: nn.Module, inputs: Tensor) -> Tensor:
    with frozen(teacher):
        logits: Tensor = teacher(inputs)
        return logits


def forward(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(batch[0])
    return logits


if __name__ == "__main__":
    sys.exit(main())
