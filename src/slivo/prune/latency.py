"""Latency budgets: what widths cost in time is measured, and so is whether the cut model is as fast as it must be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import exp, lcm, log

import numpy as np
from numpy.typing import NDArray
from torch import nn

from slivo.errors import TargetError
from slivo.graph import Graph
from slivo.measure import Timer
from slivo.measure.budget import Budget
from slivo.measure.latency import Rounds, Timing, compare, rounds, verdict
from slivo.options import MinWidth
from slivo.prune.budget import count, fewest, kept_by, left, refill, within
from slivo.prune.ranks import Group, Scope, Scores, alike, gone_of, rank, removals

Kept = Mapping[str, Sequence[int]]
Time = Callable[[Sequence[int]], Timing]
"""Times the model of which so many ranks of each group are gone."""

_WIDTHS = 3  # that each kind of axis is timed at, below its full width
_NEAR, _FAR = 0.95, 0.99  # of the target: below the one it is missed, above the other the next timing may miss it
_AIM, _SKIPS = 0.975, 3
_BLOCKS = (16, 8)  # channels that kernels compute at once, as a rule

_log = logging.getLogger("slivo")


@dataclass(frozen=True)
class Curve:
    """What the width of a group costs: the logarithm of the latency's share at some widths, ascending."""

    widths: NDArray[np.float64]
    logs: NDArray[np.float64]

    def __call__(self, widths: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Return the logarithm of the share at other widths; between those measured it is interpolated."""
        return np.asarray(np.interp(widths, self.widths, self.logs))


def fit(
    graph: Graph,
    scores: Scores,
    budget: Budget,
    model: nn.Module,
    cut: Callable[[Kept], nn.Module],
    timer: Timer,
    *,
    scope: Scope = "global",
    min_width: MinWidth = 0.1,
    round_to: int = 1,
) -> dict[str, list[int]]:
    """Choose the positions that stay so that the cut model, timed, keeps to a latency, and to the budget's counts.

    Positions go in the order of their score per millisecond that they save, as the table of `curves` has it. How many
    must go is found by timing cut models: the table proposes a number, what is measured corrects the table and
    brackets the number, and every other time the bracket is halved, so that an ill table costs time and no more.

    Args:
        graph: The traced model.
        scores: The axes that may be cut, and the importance of each of their positions.
        budget: What may stay, latency included.
        model: The uncut model.
        cut: Makes a cut model of what is kept of each axis.
        timer: Returns the milliseconds of one call of a model.
        scope: As in `slivo.prune.allocate`; ``uniform`` takes no heed of the time that an axis saves.
        min_width: As there.
        round_to: As there; multiples of what the hardware computes at once (8, 16) make every step save time.

    Returns:
        For each axis that is cut, by name, the positions that stay, ascending. The model cut so was timed in turns
        with the uncut one, twice: when it was found, and again once it was chosen, because what is chosen for being
        fast may have been lucky. The median of all of these rounds was no more than the target. It was at least 95 %
        of the target when it was found, unless the budget's counts ask for more to go, or single steps change the
        latency by more than that. Widths are rounded up to multiples of 16 or 8 if that keeps to the budget, too:
        kernels compute so many channels at once, and half-filled blocks take the time of full ones. Where that makes
        the model much faster than it must be, such multiples alone are chosen from.

    Raises:
        TargetError: If the budget cannot be met; says what the least measured is.

    Source: Yang et al. 2018, "NetAdapt", arXiv:1804.03230 (tables of measured latency, empirical check of what is
    adapted); Shen et al. 2021, "HALP", arXiv:2110.10811 (importance per latency as a knapsack).
    """
    kept, near = _fitted(graph, scores, budget, model, cut, timer, scope, min_width, round_to)
    for block in (each for each in _BLOCKS if round_to % each):
        if near >= _NEAR:
            break
        # Full blocks are so much faster than what was found that there is room for more of them.
        with suppress(TargetError):
            step = lcm(round_to, block)
            other, nearer = _fitted(graph, scores, budget, model, cut, timer, scope, min_width, step)
            kept, near = (other, nearer) if nearer > near else (kept, near)
    return kept


def _fitted(
    graph: Graph,
    scores: Scores,
    budget: Budget,
    model: nn.Module,
    cut: Callable[[Kept], nn.Module],
    timer: Timer,
    scope: Scope,
    min_width: MinWidth,
    round_to: int,
) -> tuple[dict[str, list[int]], float]:
    """Return what `fit` does for one multiple of positions, and its latency relative to the target; 1 if counts bind.

    Raises:
        TargetError: As there.
    """
    groups = rank(graph, scores, min_width, round_to)
    known: dict[tuple[int, ...], Rounds] = {}

    def small(gone: Sequence[int]) -> nn.Module:
        return cut(kept_by(groups, gone)) if any(gone) else model

    def time(gone: Sequence[int], *, again: bool = False) -> Timing:
        """Time a cut model once, or with more rounds: what is chosen for being fast may have been lucky."""
        found = known.setdefault(tuple(gone), [])
        if again or not found:
            found += rounds(timer, model, small(gone))
        timing = verdict(found)
        return timing if any(gone) else replace(timing, share=1.0)

    def slow(gone: Sequence[int], *, again: bool = False) -> float:
        return _relative(time(gone, again=again), budget)

    low, needed = [0] * len(groups), 0
    limits = budget.limits(count(graph, {}, budget))
    if not limits and slow(low) <= 1:
        return {}, 1.0
    table = curves(graph, groups, lambda gone: compare(timer, model, small(gone), rough=True))
    removed = removals(graph, _priced(groups, table), scope)
    if limits:
        needed = fewest(graph, groups, removed, budget, limits)
        low = gone_of(groups, removed[:needed])
        for gone in (refill(graph, groups, low, budget, limits), low):
            if slow(gone) <= 1 and slow(gone, again=True) <= 1:  # it is the counts that bind
                return kept_by(groups, gone), 1.0
    while True:
        gone = _hit(groups, table, removed, needed, slow)
        if slow(gone) > 1:
            raise _unmet(time(gone), time([0] * len(groups)), budget)
        if slow(gone, again=True) <= 1:
            break
    for block in _BLOCKS:
        wider = _filled(groups, gone, block)
        if within(left(graph, groups, wider, budget), limits) and slow(wider) <= 1 and slow(wider, again=True) <= 1:
            gone = wider
            break
    _log.info("latency %.3g ms, %.1f %% of what it was", time(gone).ms, 100 * time(gone).share)
    return kept_by(groups, gone), slow(gone)


def curves(graph: Graph, groups: Sequence[Group], time: Time) -> list[Curve]:
    """Measure what widths cost: cut models are timed at three widths of each kind of group.

    Groups are of one kind if their axes are alike, of equal size and cost, such as the inner widths of the blocks of
    one stage. They are cut together, which a clock sees better than one cut alone, and share what it saves. Shares of
    several groups multiply: the time of an operator is about a product of the widths on its sides.

    Args:
        graph: The traced model.
        groups: The groups.
        time: Times the model of which so many ranks of each group are gone.

    Returns:
        For each group a curve that never falls with the width: what noise makes cheaper is as dear as what is
        narrower.
    """
    kinds: dict[object, list[int]] = {}
    for number, group in enumerate(groups):
        axes = sorted((alike(graph, axis), axis.size, axis.macs, axis.params) for axis in group.axes)
        kinds.setdefault((tuple(axes), group.least, group.multiple), []).append(number)
    found: dict[int, Curve] = {}
    for numbers in kinds.values():
        group = groups[numbers[0]]
        widths = _widths(group)
        logs = [
            log(time([group.size - width if number in numbers else 0 for number in range(len(groups))]).share)
            / len(numbers)
            for width in widths
        ]
        rising = np.minimum.accumulate([0.0, *logs[::-1]])[::-1]
        found |= dict.fromkeys(numbers, Curve(np.array([*widths, group.size], dtype=np.float64), rising))
    return [found[number] for number in range(len(groups))]


def _widths(group: Group) -> list[int]:
    """Return the widths at which a group is timed, ascending: the least, and others evenly between it and the whole."""
    wanted = np.linspace(group.least, group.size, _WIDTHS, endpoint=False)
    step = lcm(8, group.multiple) if group.size >= 16 else group.multiple  # where kernels have no half-filled blocks
    snapped = {max(group.least, int(width) // step * step) for width in wanted[1:]}
    return sorted({group.least, *snapped} - {group.size})


def _priced(groups: Sequence[Group], table: Sequence[Curve]) -> list[Group]:
    """Return the groups with each rank's score divided by what it saves: the drop of the latency's logarithm."""
    saved = [np.diff(curve(np.arange(group.size + 1.0)))[::-1] for group, curve in zip(groups, table, strict=True)]
    # What saves nothing goes last, and not never: where it is the only thing left to cut, it is cut.
    least = 1e-3 * max((float(each.max()) for each in saved), default=0.0) or 1.0
    return [replace(g, scores=g.scores / np.maximum(each, least)) for g, each in zip(groups, saved, strict=True)]


def _hit(
    groups: Sequence[Group],
    table: Sequence[Curve],
    removed: Sequence[int],
    low: int,
    slow: Callable[[list[int]], float],
) -> list[int]:
    """Return how many ranks of each group go so that the model is fast enough, and as little faster as can be.

    Where a single step of the order is what misses the target by too much, its group is left out from there on, and
    others go in its place; three times at most.

    Args:
        groups: The groups.
        table: What their widths cost.
        removed: Groups in the order in which their ranks go.
        low: How many removals are too few.
        slow: Measures the latency, relative to the target.
    """

    def gone(number: int) -> list[int]:
        return gone_of(groups, order[:number])

    def guess(number: int) -> float:
        return exp(sum(float(c(g.size - many)) for c, g, many in zip(table, groups, gone(number), strict=True) if many))

    order, best = [*removed], [0] * len(groups)
    for tries in range(1 + _SKIPS):
        number = _search(low, len(order), guess, lambda number: slow(gone(number)))
        found = slow(gone(number))
        if tries == 0 or slow(best) < found <= 1:
            best = gone(number)
        if found > 1 or slow(best) >= _NEAR:
            break
        low, step = number - 1, order[number - 1]
        order = [*order[:low], *(each for each in order[low:] if each != step)]
    return best


def _search(low: int, high: int, guess: Callable[[int], float], measure: Callable[[int], float]) -> int:
    """Return how many removals bring the latency under the target, 1, and as close to it as can be.

    Args:
        low: A number that is too few.
        high: The largest there is; whether it is enough is not known.
        guess: What the latency is after so many removals, but for a factor, by the table; never rises.
        measure: What it is.
    """
    scale, tries = measure(low) / guess(low), 0
    while high - low > 1:
        number = (low + high) // 2 if tries % 2 else _first(low, high, guess, _AIM / scale)
        number = min(max(number, low + 1), high - 1)
        found = measure(number)
        if found > 1:
            low = number
        else:
            high = number
            if _NEAR <= found <= _FAR:
                return number
        scale, tries = found / guess(number), tries + 1
    return high


def _first(low: int, high: int, guess: Callable[[int], float], aim: float) -> int:
    """Return the first number above one bound that is guessed to be fast enough; the other bound if there is none."""
    low += 1
    while low < high:
        middle = (low + high) // 2
        if guess(middle) <= aim:
            high = middle
        else:
            low = middle + 1
    return low


def _filled(groups: Sequence[Group], gone: Sequence[int], block: int) -> list[int]:
    """Return how many ranks go if widths are rounded up to a multiple, which may cost nothing."""
    return [
        group.size - min(group.size, -(-(group.size - many) // (step := lcm(block, group.multiple))) * step)
        for group, many in zip(groups, gone, strict=True)
    ]


def _relative(timing: Timing, budget: Budget) -> float:
    """Return a latency relative to the target."""
    if budget.latency is not None:
        return timing.share / budget.latency
    assert budget.latency_ms is not None
    return timing.ms / budget.latency_ms


def _unmet(least: Timing, whole: Timing, budget: Budget) -> TargetError:
    asked = f"{budget.latency:.1%}" if budget.latency is not None else f"{budget.latency_ms:.3g} ms"
    return TargetError(
        f"the budget cannot be met: latency {asked} asked for, {least.ms:.3g} ms ({least.share:.1%} of {whole.ms:.3g} "
        "ms) is the least measured. Allow more, lower min_width or round_to, or leave fewer layers out"
    )
