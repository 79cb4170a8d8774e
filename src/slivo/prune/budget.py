"""Budgets: how much of a model stays, and which positions of which axes go so that the budget is hit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Integral

from slivo.errors import TargetError
from slivo.graph import Graph
from slivo.prune.options import MinWidth, is_number, said
from slivo.prune.ranks import Group, Scope, Scores, gone_of, rank, removals

COUNTED = {"macs": "MACs", "params": "parameters", "bytes": "bytes"}
"""What a budget can say that is counted, and not measured; and how it is called."""


@dataclass(frozen=True)
class Budget:
    """What may stay of a model. Each entry but ``latency_ms`` is a share: a float above 0 and up to 1.0.

    What is counted may be given as an absolute count in its place: an int. If there are several entries, all of them
    are held.

    Args:
        macs: Multiply-accumulates per sample; a share or a count.
        params: Parameters; a share or a count.
        bytes: Bytes of the model's tensors, parameters and buffers in their dtypes, as a safetensors file; a share or
            a count. What `slivo.inspect` says and `slivo.save` writes.
        latency: Share of the time of one call, measured (`slivo.prune`).
        latency_ms: Milliseconds of one call, measured; in place of ``latency``.

    Raises:
        TargetError: If nothing is given, or a value is no share and no count.

    Example:
        >>> Budget(macs=0.5).limits({"macs": 1000, "params": 70})
        {'macs': 500}
        >>> Budget(macs=0.5, params=20).limits({"macs": 1000, "params": 70})
        {'macs': 500, 'params': 20}
    """

    macs: float | int | None = None
    params: float | int | None = None
    bytes: float | int | None = None
    latency: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given:
            raise TargetError(
                "a budget needs macs=…, params=…, bytes=… or latency=…; a share (0.5 keeps half) or, but for latency, "
                "a count"
            )
        if self.latency is not None and self.latency_ms is not None:
            raise TargetError("a budget has latency, a share, and latency_ms, milliseconds; give one of them")
        for name, value in given.items():
            if name == "latency_ms":
                if not is_number(value) or not isfinite(value) or value <= 0:
                    raise TargetError(f"budget latency_ms is {said(value)}; milliseconds, a number above 0")
            elif name == "latency":
                if not is_number(value) or isinstance(value, Integral) or not 0 < value <= 1:
                    raise TargetError(
                        f"budget latency is {said(value)}; a share above 0 and up to 1.0 (0.5 halves the time), or "
                        "milliseconds as latency_ms=…"
                    )
            elif not is_number(value) or not (0 < value <= 1 or (value > 0 and isinstance(value, Integral))):
                raise TargetError(
                    f"budget {name} is {said(value)}; a share above 0 and up to 1.0 (0.5 keeps half) or a count, an int"
                )

    @property
    def timed(self) -> bool:
        """Whether there is a latency to keep to."""
        return self.latency is not None or self.latency_ms is not None

    def limits(self, whole: Mapping[str, int]) -> dict[str, int]:
        """Return the largest count allowed of each thing that is counted and that the budget speaks of.

        Args:
            whole: What the model has now: ``macs``, ``params`` and ``bytes``, as far as the budget speaks of them.

        Raises:
            TargetError: If it is to keep a share of nothing.
        """
        given = {name: getattr(self, name) for name in COUNTED}
        for name, share in given.items():
            if share is not None and not isinstance(share, Integral) and share < 1 and not whole[name]:
                raise TargetError(
                    f"the budget keeps {share} of the {COUNTED[name]}, but on these inputs the model has none; give "
                    f"{'params' if name == 'macs' else 'macs'}=… in its place"
                )
        return {
            name: int(value) if isinstance(value, Integral) else int(value * whole[name])
            for name, value in given.items()
            if value is not None
        }


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
