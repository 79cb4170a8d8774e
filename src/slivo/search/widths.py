"""Widths of all axes from a few numbers: how much sensitive axes are spared, dear ones cut, early or late ones kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from typing import Any

import numpy as np

from slivo.errors import TargetError
from slivo.graph import Graph
from slivo.prune import select
from slivo.prune.ranks import Group, rank
from slivo.recipe.schema import Prune

SECTIONS = 3
"""Parts of the network, from the input to the output, whose axes may be cut more or less than those of others."""

_HALVINGS = 40


@dataclass(frozen=True)
class Shape:
    """How a cut is spread over the axes; all at 0 and 1 keeps the same share of each.

    Args:
        sensitivity: The exponent of an axis's damage in the share of it that stays, 0 or above.
        cost: The exponent of its cost, which counts against it, 0 or above.
        tilt: The factor of each section after the first.
    """

    sensitivity: float = 0.0
    cost: float = 0.0
    tilt: tuple[float, ...] = (1.0,) * (SECTIONS - 1)


def groups_of(graph: Graph, part: Prune) -> list[Group]:
    """Return the axes that a prune stage may cut, in the order of the network; those that keep equal sizes are one."""
    axes = [axis for axis in select(graph, only=part.only, exclude=part.exclude) if not axis.routed]
    scores = {axis.name: np.ones(axis.size) for axis in axes}
    return rank(graph, scores, part.min_width, part.round_to)


def name_of(group: Group) -> str:
    """Return what to call a group: its first axis."""
    return group.axes[0].name


def sizes(
    graph: Graph, groups: Sequence[Group], damages: Mapping[str, float], shape: Shape, limits: Mapping[str, int]
) -> dict[str, int]:
    """Return the size of each axis, the largest of this shape that keep to the limits.

    The share of a group that stays is ``λ · (d/d̄)^sensitivity · (c/c̄)^-cost · tilt``, at most 1 and at least what the
    group's least width says; d is its damage, c its MACs, bars are geometric means, and λ is found by bisection.

    Args:
        graph: The traced network.
        groups: From `groups_of`.
        damages: By the group's name, how much the network suffers when it alone is cut; see `slivo.search.sensitivity`.
        shape: How the cut is spread.
        limits: The most ``macs`` and ``params`` that may stay.

    Raises:
        TargetError: If the least widths are above the limits.
    """
    weights = _weights(groups, damages, shape)

    def sized(level: float) -> dict[str, int]:
        shares = np.exp(np.clip(level + weights, -50, 0))
        widths = [_width(group, share) for group, share in zip(groups, shares.tolist(), strict=True)]
        return {axis.name: width for group, width in zip(groups, widths, strict=True) for axis in group.axes}

    def fits(level: float) -> bool:
        macs, params = graph.count(sized(level))
        counted = {"macs": macs, "params": params}
        return all(counted[name] <= limit for name, limit in limits.items())

    low, high = -60.0 - float(weights.max()), 1.0 - float(weights.min())
    if not fits(low):
        macs, params = graph.count(sized(low))
        raise TargetError(
            f"the least widths leave {macs:,} MACs and {params:,} parameters, more than the target allows"
        )
    if fits(high):
        return sized(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return sized(low)


def _weights(groups: Sequence[Group], damages: Mapping[str, float], shape: Shape) -> np.ndarray[Any, Any]:
    """Return the logarithm of each group's share, but for the level."""
    damage = np.array([damages[name_of(group)] for group in groups])
    cost = np.array([float(sum(axis.macs for axis in group.axes)) for group in groups])
    section = np.arange(len(groups)) * SECTIONS // max(1, len(groups))
    tilt = np.log(np.array((1.0, *shape.tilt)))[section]
    return np.asarray(shape.sensitivity * _logs(damage) - shape.cost * _logs(cost) + tilt)


def _logs(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return logarithms around their mean; what is next to nothing counts as a ten-thousandth of the largest."""
    largest = float(values.max())
    if largest <= 0:
        return np.zeros(len(values))
    logs = np.log(np.maximum(values, 1e-4 * largest))
    return np.asarray(logs - logs.mean())


def _width(group: Group, share: float) -> int:
    kept = int(share * group.size + 1e-9)
    if kept < group.size:
        kept = kept // group.multiple * group.multiple
    return min(group.size, max(group.least, kept))


def written(widths: Mapping[str, int], macs: int, whole: int) -> dict[str, Any]:
    """Return what a prune stage must say so that it leaves these widths, whatever its criterion.

    Args:
        widths: From `sizes`.
        macs: What they leave.
        whole: MACs of the network as a run measures them.
    """
    return {
        "scope": "uniform",
        "keep": {"macs": min(1.0, (macs + 0.5) / whole)},
        "min_width": {escape(name): width for name, width in widths.items()},
        "round_to": 1,
    }
