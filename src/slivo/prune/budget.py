"""Budgets: how much of a model stays, and which positions of which axes go so that the budget is hit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, lcm
from numbers import Integral, Real
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from slivo.errors import TargetError
from slivo.graph import Axis, Graph
from slivo.prune.options import check_widths, said

Scope = Literal["global", "uniform", "isomorphic"]
Scores = Mapping[str, NDArray[np.float64]]
"""For each axis, by name, the importance of each position."""

Role = tuple[tuple[int, tuple[int, ...], int, bool, bool], ...]
"""What an axis is to the weights that it lies on; see `alike`."""


@dataclass(frozen=True)
class Budget:
    """What may stay of a model. Each entry is a share (a float up to 1.0) or an absolute count (an int).

    Args:
        macs: Multiply-accumulates per sample.
        params: Parameters.

    Raises:
        TargetError: If nothing is given, or a value is no share and no count.

    Example:
        >>> Budget(macs=0.5).limits(macs=1000, params=70)
        (500, 70)
        >>> Budget(macs=0.5, params=20).limits(macs=1000, params=70)
        (500, 20)
    """

    macs: float | int | None = None
    params: float | int | None = None

    def __post_init__(self) -> None:
        if self.macs is None and self.params is None:
            raise TargetError("a budget needs macs=… or params=…; a share (0.5 keeps half) or a count")
        for name, value in (("macs", self.macs), ("params", self.params)):
            if value is not None and not _is_limit(value):
                raise TargetError(
                    f"budget {name} is {said(value)}; a share above 0 and up to 1.0 (0.5 keeps half) or a count, an int"
                )

    def limits(self, *, macs: int, params: int) -> tuple[int, int]:
        """Return the largest MACs and parameters allowed, for a model that has so many now.

        Raises:
            TargetError: If it is to keep a share of nothing.
        """
        for name, share, whole in (("MACs", self.macs, macs), ("parameters", self.params, params)):
            if not whole and share is not None and not isinstance(share, Integral) and share < 1:
                raise TargetError(
                    f"the budget keeps {share} of the {name}, but on these inputs the model has none; give "
                    f"{'params' if name == 'MACs' else 'macs'}=… in its place"
                )
        return _limit(self.macs, macs), _limit(self.params, params)


def check_budget(keep: object) -> None:
    """Look whether something is a budget.

    Raises:
        TargetError: If it is not; says how one is written.

    Example:
        >>> check_budget(0.5)
        Traceback (most recent call last):
            ...
        slivo.errors.TargetError: keep is 0.5, no Budget; say what may stay of what: keep=Budget(macs=0.5)
    """
    if not isinstance(keep, Budget):
        share = keep if isinstance(keep, float) and 0 < keep <= 1 else 0.5
        raise TargetError(f"keep is {said(keep)}, no Budget; say what may stay of what: keep=Budget(macs={share})")


def _is_limit(value: object) -> bool:
    """Tell a share or a count, numpy's included, from what is neither."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return float(value) > 0 and (isinstance(value, Integral) or float(value) <= 1)


def _limit(value: float | int | None, whole: int) -> int:
    if value is None:
        return whole
    return int(value) if isinstance(value, Integral) else int(value * whole)


@dataclass(frozen=True)
class _Group:
    """Axes that are cut together, rank by rank: one axis, or several that must keep equal sizes."""

    axes: tuple[Axis, ...]
    order: tuple[NDArray[np.int64], ...]
    scores: NDArray[np.float64]
    least: int
    multiple: int

    @property
    def size(self) -> int:
        return self.axes[0].size

    def kept(self, gone: int) -> dict[str, list[int]]:
        """Positions that stay when the ``gone`` least important ranks go."""
        return {
            axis.name: sorted(order[gone:].tolist()) for axis, order in zip(self.axes, self.order, strict=True) if gone
        }


def allocate(
    graph: Graph,
    scores: Scores,
    budget: Budget,
    *,
    scope: Scope = "global",
    min_width: float | int = 0.1,
    round_to: int = 1,
) -> dict[str, list[int]]:
    """Choose the positions that stay so that the budget is met, and missed by no more than one step.

    Args:
        graph: The traced model.
        scores: The axes that may be cut, and the importance of each of their positions.
        budget: What may stay.
        scope: ``global`` ranks all positions of all axes together and removes the least important; ``uniform``
            keeps the same share of every axis; ``isomorphic`` removes the same share of each class of axes that
            are alike (`alike`), and within a class the least important (Fang, Ma, Mi, Wang 2024, "Isomorphic Pruning
            for Vision Models", arXiv:2407.04616).
        min_width: Least size of an axis that is cut: a share of its size, or a count (an int). A tenth by default,
            so that no layer collapses whatever its scores.
        round_to: Sizes that change become multiples of this, for hardware that likes them (8, 16, 32), and of what
            the axis itself asks for (`slivo.graph.Axis`).

    Returns:
        For each axis that is cut, by name, the positions that stay, ascending.

    Raises:
        TargetError: If the budget cannot be met; says what the least possible is.
    """
    groups = _groups(graph, scores, min_width, round_to)
    limits = budget.limits(macs=graph.macs, params=graph.params)
    removed = _removals(graph, groups, scope)
    low, high = 0, len(removed)
    least = _count(graph, groups, _cut(groups, removed))
    if not _within(least, limits):
        raise _unmet(graph, least, limits)
    while low < high:
        middle = (low + high) // 2
        if _within(_count(graph, groups, _cut(groups, removed[:middle])), limits):
            high = middle
        else:
            low = middle + 1
    gone = _refill(graph, groups, _cut(groups, removed[:low]), limits)
    return {name: kept for group, count in zip(groups, gone, strict=True) for name, kept in group.kept(count).items()}


def _groups(graph: Graph, scores: Scores, min_width: float | int, round_to: int) -> list[_Group]:
    check_widths(min_width, round_to)
    sets: dict[str, frozenset[str]] = {name: frozenset([name]) for name in scores}
    for tie in graph.ties:
        joined = frozenset().union(*(sets.get(name, frozenset([name])) for name in tie))
        for name in joined:
            sets[name] = joined
    groups = []
    for names in dict.fromkeys(sets.values()):
        if not names <= scores.keys():
            continue  # tied to an axis that must stay
        axes = tuple(graph[name] for name in sorted(names))
        order = tuple(np.argsort(scores[axis.name], kind="stable") for axis in axes)
        ranked = np.sum([scores[axis.name][ranks] for axis, ranks in zip(axes, order, strict=True)], axis=0)
        least = min_width if isinstance(min_width, Integral) else ceil(min_width * axes[0].size)
        multiple = lcm(round_to, *(axis.multiple for axis in axes))
        least = ceil(max(least, *(axis.least for axis in axes)) / multiple) * multiple
        groups.append(_Group(axes, order, ranked, min(least, axes[0].size), multiple))
    return groups


def alike(graph: Graph, axis: Axis) -> Role:
    """Return what an axis is to the weights that it lies on: axes for which this is equal compete in one class.

    Args:
        graph: The traced model.
        axis: One of its axes.

    Returns:
        For each parameter on the axis, sorted: its number of dimensions, its kernel's size, which dimension lies on the
        axis, whether the parameter reads it, and whether a position has several entries of it. Widths do not matter:
        stages of a network are alike although later ones are wider.

    Example:
        >>> import slivo, torch
        >>> layers = [torch.nn.Linear(4, 8), torch.nn.Linear(8, 6), torch.nn.Linear(6, 2)]
        >>> graph = slivo.trace(torch.nn.Sequential(*layers), torch.randn(2, 4))
        >>> alike(graph, graph["0 out"]) == alike(graph, graph["1 out"])
        True
    """
    found = []
    for member in axis.members:
        if member.tensor in graph.parameters:
            shape = [term.size for term in graph.inference.tensors[member.tensor]]
            found.append((len(shape), tuple(shape[2:]), member.dim, member.reads, member.index.shape[1] > 1))
    return tuple(sorted(found))


def _removals(graph: Graph, groups: Sequence[_Group], scope: Scope) -> list[int]:
    """Return group numbers, one for each position that goes, in the order in which they go."""
    if scope == "uniform":
        classes: list[list[int]] = [[number] for number in range(len(groups))]
    elif scope == "global":
        classes = [[*range(len(groups))]]
    elif scope == "isomorphic":
        found: dict[tuple[Role, ...], list[int]] = {}
        for number, group in enumerate(groups):
            found.setdefault(tuple(sorted(alike(graph, axis) for axis in group.axes)), []).append(number)
        classes = [*found.values()]
    else:
        raise TargetError(f"scope is {scope!r}; 'global', 'uniform' or 'isomorphic'")
    shares = []
    for numbers in classes:
        whole = sum(groups[number].size for number in numbers)
        # The ranks of a group go in order even where scores are equal or not numbers; sorting is stable.
        ranked = sorted(
            (score, number)
            for number in numbers
            for score in np.maximum.accumulate(groups[number].scores)[
                : groups[number].size - groups[number].least
            ].tolist()
        )
        shares += [(rank / whole, number) for rank, (_, number) in enumerate(ranked, start=1)]
    return [number for _, number in sorted(shares)]


def _cut(groups: Sequence[_Group], removed: Sequence[int]) -> list[int]:
    """Return for each group how many ranks go; kept sizes that change are rounded down to a multiple."""
    counts = np.bincount(np.asarray(removed, dtype=np.int64), minlength=len(groups))
    gone = []
    for group, count in zip(groups, counts.tolist(), strict=True):
        kept = max(group.least, (group.size - count) // group.multiple * group.multiple) if count else group.size
        gone.append(group.size - kept)
    return gone


def _count(graph: Graph, groups: Sequence[_Group], gone: Sequence[int]) -> tuple[int, int]:
    """Return the MACs and parameters left when so many ranks of each group go."""
    return graph.count(
        {
            axis.name: group.size - count
            for group, count in zip(groups, gone, strict=True)
            if count
            for axis in group.axes
        }
    )


def _refill(graph: Graph, groups: Sequence[_Group], gone: list[int], limits: tuple[int, int]) -> list[int]:
    """Give back the most important positions that still fit, so that the budget is used up."""
    # Giving back only gets dearer as others are given back: a group that did not fit once never will.
    candidates = {number for number, count in enumerate(gone) if count}
    while candidates:
        best = max(candidates, key=lambda number: (groups[number].scores[gone[number] - 1], -number))
        size, multiple = groups[best].size, groups[best].multiple
        larger = min(size, ((size - gone[best]) // multiple + 1) * multiple)
        trial = [*gone]
        trial[best] = size - larger
        if _within(_count(graph, groups, trial), limits):
            gone = trial
        if gone is not trial or not gone[best]:
            candidates.discard(best)
    return gone


def _within(found: tuple[int, int], limits: tuple[int, int]) -> bool:
    return found[0] <= limits[0] and found[1] <= limits[1]


def _unmet(graph: Graph, found: tuple[int, int], limits: tuple[int, int]) -> TargetError:
    told = [
        f"{name} {limit:,} asked for, {count:,} ({count / total:.1%} of {total:,}) is the least"
        for name, limit, count, total in zip(
            ("MACs", "parameters"), limits, found, (graph.macs, graph.params), strict=True
        )
        if count > limit
    ]
    return TargetError(
        f"the budget cannot be met: {'; '.join(told)}. Allow more, lower min_width or round_to, or leave fewer layers "
        "out"
    )
