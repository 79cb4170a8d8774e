"""Allocation: which positions of which axes go so that a budget is hit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slivo.errors import TargetError
from slivo.graph import Graph
from slivo.measure.budget import COUNTED, Budget
from slivo.options import MinWidth
from slivo.prune.ranks import Group, Scope, Scores, gone_of, rank, removals


def allocate(
    graph: Graph,
    scores: Scores,
    budget: Budget,
    *,
    scope: Scope = "global",
    min_width: MinWidth = 0.1,
    round_to: int = 1,
) -> dict[str, list[int]]:
    """Choose the positions that stay so that the budget is met, and missed by less than one step.

    A step gives back to an axis that is cut its most important position, and to axes that must keep equal sizes with
    it theirs; with ``round_to``, as many as there are up to the next multiple, or to the whole axis. What is left is
    counted on the graph and never above the budget; no step fits in any more. So wherever some step is that small, the
    budget is hit within 1 %.

    Args:
        graph: The traced model.
        scores: The axes that may be cut, and the importance of each of their positions.
        budget: What may stay; without latency, which takes a model to measure (`slivo.prune`).
        scope: ``global`` ranks all positions of all axes together and removes the least important; ``uniform``
            keeps the same share of every axis; ``isomorphic`` removes the same share of each class of axes that
            are alike (`slivo.prune.ranks.alike`), and within a class the least important (Fang, Ma, Mi, Wang 2024,
            "Isomorphic Pruning for Vision Models", arXiv:2407.04616).
        min_width: Least size of an axis that is cut: a share of its size, or a count (an int). A tenth by default,
            so that no layer collapses whatever its scores. Or a mapping, ``{"layer1.*": 0.5, "head": 16, "*": 0.1}``:
            globs over axis names and paths of modules that write them, of which the first that matches an axis
            decides; a tenth where none does. Axes that must keep equal sizes have the largest of theirs. No axis goes
            below one position.
        round_to: Sizes that change become multiples of this, for hardware that likes them (8, 16, 32), and of what
            the axis itself asks for (`slivo.graph.Axis`).

    Returns:
        For each axis that is cut, by name, the positions that stay, ascending.

    Raises:
        TargetError: If the budget cannot be met; says what the least possible is.
        SlivoError: If a glob of ``min_width`` matches no axis.
    """
    if budget.timed:
        raise TargetError("the budget has a latency, which is measured on a model: use slivo.prune, or its plan")
    groups = rank(graph, scores, min_width, round_to)
    removed = removals(graph, groups, scope)
    limits = budget.limits(count(graph, {}, budget))
    needed = fewest(graph, groups, removed, budget, limits)
    return kept_by(groups, refill(graph, groups, gone_of(groups, removed[:needed]), budget, limits))


def count(graph: Graph, sizes: Mapping[str, int], budget: Budget) -> dict[str, int]:
    """Count what a budget speaks of, when axes have other sizes."""
    macs, params = graph.count(sizes)
    found = {"macs": macs, "params": params}
    return found if budget.bytes is None else {**found, "bytes": graph.count_bytes(sizes)}


def kept_by(groups: Sequence[Group], gone: Sequence[int]) -> dict[str, list[int]]:
    """Return for each axis that is cut the positions that stay when so many ranks of each group go."""
    return {name: kept for group, many in zip(groups, gone, strict=True) for name, kept in group.kept(many).items()}


def fewest(
    graph: Graph, groups: Sequence[Group], removed: Sequence[int], budget: Budget, limits: Mapping[str, int]
) -> int:
    """Return how many removals it takes, in their order, to keep to the limits.

    Raises:
        TargetError: If all of them do not.
    """
    low, high = 0, len(removed)
    least = left(graph, groups, gone_of(groups, removed), budget)
    if not within(least, limits):
        raise _unmet(count(graph, {}, budget), least, limits)
    while low < high:
        middle = (low + high) // 2
        if within(left(graph, groups, gone_of(groups, removed[:middle]), budget), limits):
            high = middle
        else:
            low = middle + 1
    return low


def refill(
    graph: Graph, groups: Sequence[Group], gone: list[int], budget: Budget, limits: Mapping[str, int]
) -> list[int]:
    """Give back the most important positions that still fit, so that the budget is used up."""
    # Giving back only gets dearer as others are given back: a group that did not fit once never will.
    candidates = {number for number, many in enumerate(gone) if many}
    while candidates:
        best = max(candidates, key=lambda number: (groups[number].scores[gone[number] - 1], -number))
        trial = [*gone]
        trial[best] = groups[best].step(gone[best])
        if within(left(graph, groups, trial, budget), limits):
            gone = trial
        if gone is not trial or not gone[best]:
            candidates.discard(best)
    return gone


def left(graph: Graph, groups: Sequence[Group], gone: Sequence[int], budget: Budget) -> dict[str, int]:
    """Count what is left when so many ranks of each group go."""
    sizes = {
        axis.name: group.size - many for group, many in zip(groups, gone, strict=True) if many for axis in group.axes
    }
    return count(graph, sizes, budget)


def within(found: Mapping[str, int], limits: Mapping[str, int]) -> bool:
    """Tell whether what is counted keeps to the limits."""
    return all(found[name] <= limit for name, limit in limits.items())


def _unmet(whole: Mapping[str, int], found: Mapping[str, int], limits: Mapping[str, int]) -> TargetError:
    told = [
        f"{COUNTED[name]} {limit:,} asked for, {found[name]:,} ({found[name] / whole[name]:.1%} of {whole[name]:,}) is "
        "the least"
        for name, limit in limits.items()
        if found[name] > limit
    ]
    return TargetError(
        f"the budget cannot be met: {'; '.join(told)}. Allow more, lower min_width or round_to, or leave fewer layers "
        "out"
    )
