"""Confusion matrices as tables, and what two of them say about each class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slivo.report.records import Run

LARGEST = 24
"""More classes than this make no table that a person reads; the classes that moved most are listed in any case."""

_LISTED = 8

Matrix = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Cell:
    """A count, and its share of the row (the true class), by which it is shaded."""

    count: str
    share: float
    hit: bool
    hint: str


@dataclass(frozen=True)
class Table:
    """A confusion matrix to print."""

    name: str
    classes: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]

    @property
    def upright(self) -> bool:
        """Whether the names fit above their columns, or must be turned."""
        return max(map(len, self.classes)) <= 3


@dataclass(frozen=True)
class Moved:
    """A class, and the share of it that teacher and student recognize."""

    name: str
    samples: str
    teacher: str
    student: str
    change: str


def tables(run: Run) -> tuple[Table, ...]:
    """Return the confusion matrices that there are and that are small enough to read."""
    if run.confusion is None:
        return ()
    pairs = (("Teacher", run.confusion.teacher), ("Student", run.confusion.student))
    return tuple(_table(name, matrix, run) for name, matrix in pairs if matrix and len(matrix) <= LARGEST)


def names(run: Run, size: int) -> tuple[str, ...]:
    """Return a name for each class; its number where the run gives none."""
    given = [str(name) for name in run.classes]
    return tuple(given[i] if i < len(given) else str(i) for i in range(size))


def _table(name: str, matrix: Matrix, run: Run) -> Table:
    classes = names(run, len(matrix))
    rows = []
    for i, row in enumerate(matrix):
        total = sum(row) or 1.0
        cells = tuple(
            Cell(f"{n:g}" if n else "", round(n / total, 4), i == j, f"{classes[i]} read as {classes[j]}: {n:g}")
            for j, n in enumerate(row[: len(classes)])
        )
        rows.append((classes[i], cells))
    return Table(name, classes, tuple(rows))


def moved(run: Run) -> tuple[Moved, ...]:
    """Return the classes whose recall changed most between teacher and student, largest change first."""
    if run.confusion is None or not run.confusion.teacher or not run.confusion.student:
        return ()
    before, after = _recall(run.confusion.teacher), _recall(run.confusion.student)
    classes = names(run, min(len(before), len(after)))
    changes = [(after[i] - before[i], i) for i in range(len(classes))]
    largest = sorted(changes, key=lambda item: (-abs(item[0]), item[1]))[:_LISTED]
    return tuple(
        Moved(
            classes[i],
            f"{sum(run.confusion.teacher[i]):g}",
            f"{100 * before[i]:.1f} %",
            f"{100 * after[i]:.1f} %",
            f"{100 * delta:+.1f} points".replace("-", "−"),
        )
        for delta, i in largest
        if delta
    )


def _recall(matrix: Matrix) -> list[float]:
    return [row[i] / total if i < len(row) and (total := sum(row)) else 0.0 for i, row in enumerate(matrix)]
