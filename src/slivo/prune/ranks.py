"""Ranks: which positions of which axes go before which others, and down to which width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, lcm
from numbers import Integral
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from slivo.errors import SlivoError, TargetError
from slivo.graph import Axis, Graph
from slivo.options import MinWidth, check_widths, matches, places

Scope = Literal["global", "uniform", "isomorphic"]
Scores = Mapping[str, NDArray[np.float64]]
"""For each axis, by name, the importance of each position."""

Role = tuple[tuple[int, tuple[int, ...], int, bool, bool], ...]
"""What an axis is to the weights that it lies on; see `alike`."""

_LEAST = 0.1  # of an axis that no glob matches


@dataclass(frozen=True)
class Group:
    """Axes that are cut together, rank by rank: one axis, or several that must keep equal sizes.

    Args:
        axes: The axes, all of one size.
        order: For each axis its positions, the least important first.
        scores: For each rank the sum of its positions' scores.
        least: The smallest width; reached only if all that may go is gone.
        multiple: What a width that changes is a multiple of.
    """

    axes: tuple[Axis, ...]
    order: tuple[NDArray[np.int64], ...]
    scores: NDArray[np.float64]
    least: int
    multiple: int

    @property
    def size(self) -> int:
        """The width before the cut."""
        return self.axes[0].size

    def kept(self, gone: int) -> dict[str, list[int]]:
        """Return the positions that stay when the ``gone`` least important ranks go."""
        return {
            axis.name: sorted(order[gone:].tolist()) for axis, order in zip(self.axes, self.order, strict=True) if gone
        }

    def step(self, gone: int) -> int:
        """Return how many ranks go once the next step is given back: up to the next multiple, or to the whole axis."""
        return self.size - min(self.size, ((self.size - gone) // self.multiple + 1) * self.multiple)


def rank(graph: Graph, scores: Scores, min_width: MinWidth, round_to: int) -> list[Group]:
    """Put the positions of each axis in order, and axes that keep equal sizes together.

    Raises:
        TargetError: If a width is no width.
        SlivoError: If a glob over widths matches no axis of the model.
    """
    check_widths(min_width, round_to)
    sets: dict[str, frozenset[str]] = {name: frozenset([name]) for name in scores}
    for tie in graph.ties:
        joined = frozenset().union(*(sets.get(name, frozenset([name])) for name in tie))
        for name in joined:
            sets[name] = joined
    widths = _widths(graph, min_width)
    groups = []
    for names in dict.fromkeys(sets.values()):
        if not names <= scores.keys():
            continue  # tied to an axis that must stay
        axes = tuple(graph[name] for name in sorted(names))
        order = tuple(np.argsort(scores[axis.name], kind="stable") for axis in axes)
        ranked = np.sum([scores[axis.name][ranks] for axis, ranks in zip(axes, order, strict=True)], axis=0)
        multiple = lcm(round_to, *(axis.multiple for axis in axes))
        least = ceil(max(max(widths[axis.name], axis.least) for axis in axes) / multiple) * multiple
        groups.append(Group(axes, order, ranked, min(least, axes[0].size), multiple))
    return groups


def _widths(graph: Graph, min_width: MinWidth) -> dict[str, int]:
    """Return for each axis its least width as a count; of several globs the first that matches the axis decides."""
    globs = min_width if isinstance(min_width, Mapping) else {"*": min_width}
    found: dict[str, float | int] = {}
    for glob, width in globs.items():
        matched = [axis.name for axis in graph.axes if matches(glob, places(axis, readers=False))]
        if not matched and isinstance(min_width, Mapping):
            modules = sorted({name.rpartition(".")[0] for name in graph.parameters})
            raise SlivoError(
                f"min_width: {glob!r} matches no axis and no module that writes one; there are "
                f"{', '.join(modules[:8])} …"
            )
        for name in matched:
            found.setdefault(name, width)
    widths = ((axis, found.get(axis.name, _LEAST)) for axis in graph.axes)
    return {axis.name: int(width) if isinstance(width, Integral) else ceil(width * axis.size) for axis, width in widths}


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


def removals(graph: Graph, groups: Sequence[Group], scope: Scope) -> list[int]:
    """Return group numbers, one for each rank that may go, in the order in which they go.

    Raises:
        TargetError: If the scope is none.
    """
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


def gone_of(groups: Sequence[Group], removed: Sequence[int]) -> list[int]:
    """Return for each group how many ranks go; kept sizes that change are rounded down to a multiple."""
    counts = np.bincount(np.asarray(removed, dtype=np.int64), minlength=len(groups))
    gone = []
    for group, count in zip(groups, counts.tolist(), strict=True):
        kept = max(group.least, (group.size - count) // group.multiple * group.multiple) if count else group.size
        gone.append(group.size - kept)
    return gone
