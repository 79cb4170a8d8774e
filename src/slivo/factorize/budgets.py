"""Budgets of a whole model, held by the ranks of its layers: what is counted, and latency as it is measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from slivo import edits
from slivo.edits.factorize import Factorize, Factors
from slivo.errors import TargetError
from slivo.factorize.ladder import Ladder, allocate, cost
from slivo.factorize.sites import Site
from slivo.graph import ExampleInputs
from slivo.measure import Timer, clock
from slivo.measure.budget import COUNTED, Budget
from slivo.measure.cost import count_macs, count_params, size_bytes
from slivo.measure.latency import Timing, compare

Chosen = dict[str, Factors | None]

_TIMINGS = 7  # halvings of what stays, on the way to a latency

_log = logging.getLogger("slivo")


def chosen_by_budget(
    model: nn.Module,
    example_inputs: ExampleInputs,
    keep: Budget,
    sites: Mapping[str, Site],
    fixed: Mapping[str, Factors],
    ladders: Sequence[Ladder],
    timer: Timer | None,
) -> Chosen:
    """Choose the ranks of all layers that are free, so that the whole model keeps to a budget.

    Args:
        model: The whole model, as it is.
        example_inputs: Of the model.
        keep: What may stay.
        sites: All layers that could be factorized.
        fixed: The factors of those that have theirs.
        ladders: What the others could become, with costs as `slivo.factorize.lowrank.counted` orders them.
        timer: Times models for a budget of latency.

    Raises:
        TargetError: If the budget cannot be met.
    """
    measures: dict[str, Callable[[], int]] = {
        "macs": lambda: count_macs(model, example_inputs),
        "params": lambda: count_params(model),
        "bytes": lambda: size_bytes(model),
    }
    names = [name for name in COUNTED if getattr(keep, name) is not None]
    whole = {name: measures[name]() for name in names}
    limits = keep.limits(whole)
    saved = [
        sum(cost(site, None, [name])[0] - cost(site, fixed.get(site.name), [name])[0] for site in sites.values())
        for name in names
    ]
    # What may be spent on the free layers: the limit, less what everything else costs.
    spare = [sum(float(each.costs[-1][at]) for each in ladders) for at in range(len(names))]
    room = {
        name: limits[name] - (whole[name] - less - rest) for name, less, rest in zip(names, saved, spare, strict=True)
    }
    if not keep.timed:
        return _named(ladders, allocate(ladders, room))
    return _in_time(model, keep, fixed, ladders, room, timer or clock(example_inputs))


def _named(ladders: Sequence[Ladder], chosen: Sequence[Factors | None]) -> Chosen:
    return {each.name: factors for each, factors in zip(ladders, chosen, strict=True)}


def _in_time(
    model: nn.Module,
    keep: Budget,
    fixed: Mapping[str, Factors],
    ladders: Sequence[Ladder],
    room: Mapping[str, float],
    timer: Timer,
) -> Chosen:
    """Halve the way between what is least and what fits, until a model as large as possible is fast enough."""
    most = [sum(float(each.costs[-1][at]) for each in ladders) for at in range(ladders[0].costs.shape[1])]
    least = [sum(float(each.costs[0][at]) for each in ladders) for at in range(ladders[0].costs.shape[1])]
    tops = list(room.values()) or most
    if room:
        allocate(ladders, room)  # which says what is wrong with it

    def at(share: float) -> Chosen:
        limits = [low + share * (min(top, high) - low) for low, top, high in zip(least, tops, most, strict=True)]
        return _named(ladders, allocate(ladders, dict(zip(room or ("macs",), limits, strict=True))))

    def timed(chosen: Chosen) -> Timing:
        held = {name: factors for name, factors in chosen.items() if factors is not None}
        small = edits.apply(model, Factorize({**fixed, **held}))
        with torch.no_grad():
            for name in {**fixed, **held}:
                for parameter in small.get_submodule(name).parameters():
                    parameter.nan_to_num_()
        return compare(timer, model, small)

    def holds(timing: Timing) -> bool:
        return timing.ms <= keep.latency_ms if keep.latency_ms is not None else timing.share <= (keep.latency or 1.0)

    if holds(timed(at(1.0))):
        return at(1.0)
    fastest = timed(at(0.0))
    if not holds(fastest):
        asked = f"{keep.latency_ms} ms" if keep.latency_ms is not None else f"{keep.latency:.1%}"
        raise TargetError(
            f"the budget cannot be met by factorizing: latency {asked} asked for, {fastest.ms:.3g} ms "
            f"({fastest.share:.1%}) is what the least ranks take. Allow more, or prune first"
        )
    low, high = 0.0, 1.0
    for _ in range(_TIMINGS):
        middle = (low + high) / 2
        if holds(timed(at(middle))):
            low = middle
        else:
            high = middle
    return at(low)
