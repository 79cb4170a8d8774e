"""Does a trial of seconds tell which teacher suits a student? Ranks of `rank_teachers` against real distillations.

Usage: python benchmarks/rank_teachers.py [--epochs 6] [--seeds 0 1 2] [--json FILE]

Teachers of the digits: networks of several widths after few and many epochs, one trained on wrong labels in part, one
that is too sure of itself, one untrained. The student is a narrow network with random weights. Each teacher's place by
the trial is compared with its place by the test accuracy of a student that it really taught,
and so is its place by its own accuracy. Rank correlations are Spearman's.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import slivo
from pressure_digits import train
from slivo.distill import rank_teachers
from slivo.measure import quality
from slivo.tasks import Task, classification, loader
from slivo.tasks.digits import digits
from slivo.train import OptimizerSpec
from slivo.zoo import small_cnn


class Sure(nn.Module):
    """A model whose logits are so many times as large."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.factor * self.model(x)


def wrong(task: Task, share: float) -> Task:
    """Return the task with a share of its training labels drawn anew."""
    images, labels = tensors(task, "train")
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(len(labels), generator=generator) < share
    labels = torch.where(drawn, torch.randint(10, labels.shape, generator=generator), labels)
    parts = [TensorDataset(*tensors(task, split)) for split in ("val", "test")]
    given = (images[:2],)
    return classification("wrong", TensorDataset(images, labels), *parts, classes="0123456789", example_inputs=given)


def tensors(task: Task, split: str) -> tuple[Tensor, Tensor]:
    found = list(loader(task, split, batch_size=4096))
    return torch.cat([batch[0] for batch in found]), torch.cat([batch[1] for batch in found])


def teachers(task: Task) -> dict[str, nn.Module]:
    def made(width: int, epochs: int, data: Task = task) -> nn.Module:
        torch.manual_seed(0)
        model = small_cnn(width=width)
        return (train(model, data, epochs, 0.05, 0) if epochs else model).eval()

    wide = made(24, 16)
    return {
        "width 8, 2 epochs": made(8, 2),
        "width 8, 16 epochs": made(8, 16),
        "width 16, 4 epochs": made(16, 4),
        "width 24, 16 epochs": wide,
        "width 24, too sure": Sure(copy.deepcopy(wide), 6.0),
        "width 16, half of the labels wrong": made(16, 8, wrong(task, 0.5)),
        "untrained": made(16, 0),
    }


def spearman(one: list[float], other: list[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, help="training images that the trial has; all if not given")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    task = digits()
    candidates = teachers(task)
    batch = tuple(each[: options.samples] for each in tensors(task, "train"))
    images, labels = tensors(task, "test")
    rows: dict[str, dict[str, list[float]]] = {name: {"score": [], "loss": [], "accuracy": []} for name in candidates}
    seconds = 0.0
    for seed in options.seeds:
        torch.manual_seed(seed)
        student = small_cnn(width=4)
        start = time.perf_counter()
        for rank in rank_teachers(student, candidates, batch, seed=seed):
            rows[rank.name]["score"].append(rank.score)
        seconds += time.perf_counter() - start
        for name, teacher in candidates.items():
            terms = [slivo.losses.kd(weight=0.9)]
            spec = OptimizerSpec(lr=0.05)
            taught = slivo.distill(student, teacher, task, terms, epochs=options.epochs, optimizer=spec, seed=seed)
            with torch.no_grad():
                said = taught.model(images)
            rows[name]["loss"].append(float(F.cross_entropy(said, labels)))
            rows[name]["accuracy"].append(float((said.argmax(1) == labels).double().mean()))
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| teacher | its accuracy | score of the trial | student's test loss | student's accuracy |")
    print("|---" * 5 + "|")
    own = {name: quality(teacher, task, "test")["accuracy"] for name, teacher in candidates.items()}
    for name, row in sorted(rows.items(), key=lambda item: -mean(item[1]["score"])):
        score, loss, accuracy = (mean(row[column]) for column in ("score", "loss", "accuracy"))
        print(f"| {name} | {own[name]:.1%} | {score:.3f} | {loss:.3f} | {accuracy:.1%} |")
    real = [mean(rows[name]["accuracy"]) for name in candidates]
    by_score = spearman([mean(rows[name]["score"]) for name in candidates], real)
    by_accuracy = spearman([own[name] for name in candidates], real)
    print(f"\nrank correlation with the student's accuracy: trial {by_score:.2f}, own accuracy {by_accuracy:.2f}")
    print(f"{seconds / len(options.seeds):.1f} s a ranking of {len(candidates)} teachers")
    if options.json:
        found = {"rows": rows, "own": own, "trial": by_score, "accuracy": by_accuracy, "seconds": seconds}
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
