"""Pareto fronts: what nothing else beats in all respects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slivo.search.record import Row


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Tell whether one is as good as the other in all respects and better in one; the first is to be high, others low.

    Example:
        >>> dominates((0.9, 10), (0.9, 20)), dominates((0.9, 10), (0.95, 20)), dominates((0.9, 10), (0.9, 10))
        (True, False, False)
    """
    ours, theirs = (-one[0], *one[1:]), (-other[0], *other[1:])
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))


def front(rows: Sequence[Row]) -> list[Row]:
    """Return the finished trials that no other dominates, the cheapest first; of equals the one that came first."""
    done = [row for row in rows if row.values]
    found: list[Row] = []
    for row in done:
        beaten = any(dominates(other.values, row.values) for other in done)
        if not beaten and not any(other.values == row.values for other in found):
            found.append(row)
    return sorted(found, key=lambda row: (row.values[1:], -row.values[0]))


def best(rows: Sequence[Row], target: Mapping[str, Any]) -> Row | None:
    """Return the trial of the front to take, judged on validation data.

    Args:
        rows: All trials.
        target: What the recipe asks for. With ``max_drop`` it is the cheapest trial that meets the target; without, the
            one of the best quality that does; if none does, the one of the best quality.

    Returns:
        The trial, or None if none has finished.
    """
    ahead = front(rows)
    meeting = [row for row in ahead if not row.misses]
    if meeting and "max_drop" in target:
        return meeting[0]
    return max(meeting or ahead, key=lambda row: (row.values[0], -row.values[1]), default=None)
