"""Ladders: the ranks that a layer could get, what each costs and loses, and which of them a model can afford."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import nn

from slivo.edits.factorize import Factors, Kind
from slivo.errors import TargetError
from slivo.factorize.sites import Site
from slivo.factorize.solve import Basis, Ranks, losses
from slivo.measure.budget import COUNTED

Method = Literal["auto", "channel", "spatial", "tucker2", "cp"]
METHODS = get_args(Method)
Floats = NDArray[np.float64]

_HEADER = 120  # bytes at most that a file says of one tensor, besides its name
_HALVINGS = 80


@dataclass(frozen=True)
class Ladder:
    """What could become of one layer, from the cheapest to the layer as it is; each loses less than those before it.

    Args:
        name: Of the layer.
        choices: The factors; None for the layer as it is, which is last.
        losses: What each loses; 0 of the last.
        costs: What each costs, shape (choices, what is counted).
    """

    name: str
    choices: tuple[Factors | None, ...]
    losses: Floats
    costs: Floats


def kinds(site: Site, method: Method) -> tuple[Kind, ...]:
    """Return the kinds of factorization that a method stands for; a layer that it is not for has one of its own.

    Example:
        >>> kinds(Site("", nn.Linear(2, 3)), "spatial"), kinds(Site("", nn.Conv2d(2, 3, 3)), "channel")
        (('svd',), ('outputs', 'inputs'))
    """
    if isinstance(site.layer, nn.Linear):
        return ("svd",)
    kernel = site.shape[2:]
    if prod(kernel) == 1:
        return ("outputs",)  # from 1 x 1 nothing else would come
    flat = len([size for size in kernel if size > 1]) < 2
    if method == "channel" or (flat and method in ("auto", "spatial")) or len(kernel) < 2:
        return ("outputs", "inputs")
    named: Mapping[Method, tuple[Kind, ...]] = {
        "auto": ("outputs", "inputs", "spatial", "tucker2"),
        "spatial": ("spatial",),
        "tucker2": ("tucker2",),
        "cp": ("cp",),
    }
    return named[method]


def steps(site: Site, kind: Kind, round_to: int) -> list[Ranks]:
    """Return the ranks, ascending, at which a kind has fewer weights than the layer.

    Example:
        >>> steps(Site("", nn.Linear(8, 8)), "svd", 1)
        [(1,), (2,), (3,)]
    """
    most = site.most(kind)
    top = max(most)
    found = dict.fromkeys(
        tuple(ceil(ceil(each * step / top) / round_to) * round_to for each in most) for step in range(1, top + 1)
    )
    fit = [ranks for ranks in found if all(rank <= limit for rank, limit in zip(ranks, most, strict=True))]
    return [ranks for ranks in fit if saves(site, Factors(kind, ranks))]


def saves(site: Site, factors: Factors) -> bool:
    """Tell whether thin layers have fewer weights than the one whose place they take."""
    return sum(site.numbers(factors)) < prod(site.shape)


def cost(site: Site, factors: Factors | None, counted: Sequence[str]) -> list[float]:
    """Return what a layer costs, or what would take its place, of each thing that is counted."""
    numbers = [prod(site.shape)] if factors is None else site.numbers(factors)
    header = (len(numbers) - 1) * (_HEADER + len(site.name))
    macs = site.macs if factors is None else site.macs_of(factors)
    found = {
        "params": float(sum(numbers)),
        "macs": macs,
        "bytes": float(sum(numbers) * site.layer.weight.itemsize + header),
    }
    return [found[each] for each in counted]


def ladder(site: Site, bases: Iterable[Basis], counted: Sequence[str], round_to: int) -> Ladder:
    """Return what could become of a layer: of all kinds together, what no cheaper choice is as good as."""
    choices: list[Factors | None] = []
    lost: list[float] = []
    for basis in bases:
        ranks = steps(site, basis.kind, round_to)
        if ranks:
            choices += [Factors(basis.kind, each) for each in ranks]
            lost += losses(basis, ranks).tolist()
    choices.append(None)
    lost.append(0.0)
    costs = np.array([cost(site, each, counted) for each in choices])
    return best(Ladder(site.name, tuple(choices), np.array(lost), costs))


def best(found: Ladder) -> Ladder:
    """Leave out the choices that lose no less than a cheaper one, or cost more than the layer as it is."""
    price = _price(found)
    order = np.lexsort((found.losses, price))
    kept: list[int] = []
    for index in order:
        if price[index] >= price[-1]:
            break
        if not kept or found.losses[index] < found.losses[kept[-1]]:
            kept.append(int(index))
    kept.append(len(found.choices) - 1)
    return replace(
        found,
        choices=tuple(found.choices[index] for index in kept),
        losses=found.losses[kept],
        costs=found.costs[kept],
    )


def _price(found: Ladder) -> Floats:
    """Return one number for what choices cost: shares of the layer's own costs, summed."""
    price: Floats = (found.costs / np.maximum(found.costs[-1], 1e-30)).sum(1)
    return price


def enough(found: Ladder, energy: float) -> Factors | None:
    """Return the cheapest choice that keeps a share of the energy."""
    return found.choices[int(np.argmax(found.losses <= 1 - energy + 1e-12))]


def allocate(ladders: Sequence[Ladder], room: Mapping[str, float]) -> list[Factors | None]:
    """Choose for each layer so that little is lost in all, and what is counted stays within limits.

    What is least for a price of cost that is the same everywhere, `loss + price · cost`, is chosen in each layer; the
    price is halved down to where the limits are met just so. Then what room is left is used up, by the choice that
    saves most among those that fit, until none fits.

    Args:
        ladders: Of each layer.
        room: For each thing that is counted, in the order of the ladders' costs, what the layers may cost together.

    Raises:
        TargetError: If the cheapest choices cost more.
    """
    limits = np.array(list(room.values()))
    whole: Floats = sum((each.costs[-1] for each in ladders), 0 * limits)
    prices = [(each.costs / np.maximum(whole, 1e-30)).sum(1) for each in ladders]

    def at(price: float) -> list[int]:
        return [int(np.argmin(each.losses + price * paid)) for each, paid in zip(ladders, prices, strict=True)]

    def spent(places: Sequence[int]) -> Floats:
        total: Floats = sum((each.costs[place] for each, place in zip(ladders, places, strict=True)), 0 * limits)
        return total

    def fits(places: Sequence[int]) -> bool:
        return bool((spent(places) <= limits * (1 + 1e-12) + 1e-9).all())

    places = [len(each.choices) - 1 for each in ladders]
    if not fits(places):
        places = [int(paid.argmin()) for paid in prices]
        if not fits(places):
            raise _unmet(room, whole, spent(places))
        low, high = -40.0, 40.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            trial = at(np.exp(middle))
            if fits(trial):
                high, places = middle, trial
            else:
                low = middle
    places = _filled(ladders, places, limits - spent(places))
    return [each.choices[place] for each, place in zip(ladders, places, strict=True)]


def _filled(ladders: Sequence[Ladder], places: list[int], room: Floats) -> list[int]:
    """Take better choices as long as any fits."""
    while True:
        moves = []
        for number, (each, place) in enumerate(zip(ladders, places, strict=True)):
            more = each.costs - each.costs[place]
            gain = np.where((more <= room + 1e-9).all(1), each.losses[place] - each.losses, -1.0)
            to = int(gain.argmax())
            if gain[to] > 0:
                moves.append((float(gain[to]), number, to))
        if not moves:
            return places
        _, number, to = max(moves)
        room = room - (ladders[number].costs[to] - ladders[number].costs[places[number]])
        places = [*places[:number], to, *places[number + 1 :]]


def _unmet(room: Mapping[str, float], whole: Floats, least: Floats) -> TargetError:
    told = [
        f"{COUNTED[name]}: the layers may have {max(0, int(limit)):,} in all, {round(few):,} (of {round(every):,}) is "
        "the least"
        for (name, limit), few, every in zip(room.items(), least, whole, strict=True)
        if few > limit
    ]
    return TargetError(
        f"the budget cannot be met by factorizing: {'; '.join(told)}. Allow more, lower round_to, leave fewer layers "
        "out, or prune first"
    )
