"""Ranks as callers give them: for layers by name, or by glob."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any, TypeVar

from torch import nn

from slivo.edits.factorize import Factors, Kind
from slivo.errors import SlivoError
from slivo.factorize.ladder import Method, kinds, saves
from slivo.factorize.sites import Site
from slivo.options import few, is_count, matches, said

Value = TypeVar("Value")


def meant_by(given: Mapping[str, Value], name: str, other: Value) -> Value:
    """Return the value of the first glob that matches a name, or another if none does.

    Example:
        >>> meant_by({"layer1": 4, "*": 8}, "layer1.0.conv", 0)
        4
    """
    return next((value for glob, value in given.items() if matches(glob, [name])), other)


def given(
    sites: Mapping[str, Site], ranks: Mapping[str, Any], method_of: Callable[[Site], Method]
) -> Iterator[tuple[str, Factors]]:
    """Yield the factors of the layers whose ranks are given.

    Args:
        sites: The layers.
        ranks: For names or globs a rank, or for Tucker-2 two.
        method_of: Tells a layer's method.

    Raises:
        SlivoError: If a glob matches no layer, a rank is none, or one that is given by name saves nothing. For layers
            that a glob names, among others, such a rank means that they stay as they are.
    """
    for glob, rank in ranks.items():
        if not isinstance(glob, str) or not matches(glob, sites):
            raise SlivoError(f"ranks names {said(glob)}, which can not be factorized; there are {few(list(sites))}")
        pair = rank if isinstance(rank, tuple | list) else (rank,)
        if len(pair) not in (1, 2) or not all(is_count(each, least=1) for each in pair):
            raise SlivoError(f"the rank of {glob!r} is {said(rank)}; an int of at least 1, or two of them for tucker2")
    for name, site in sites.items():
        rank = meant_by(ranks, name, None)
        if rank is None:
            continue
        factors = Factors(*_meant(site, rank, method_of(site)))
        if saves(site, factors) and all(a <= b for a, b in zip(factors.ranks, site.most(factors.kind), strict=True)):
            yield name, factors
        elif name in ranks:
            raise SlivoError(_useless(site, factors))


def _meant(site: Site, rank: Any, method: Method) -> tuple[Kind, tuple[int, ...]]:
    """Return the kind that a rank is of: of several, that which parts the outputs; two ranks are Tucker-2's."""
    possible = kinds(site, method)
    if isinstance(rank, tuple | list) and len(rank) == 2:
        if "tucker2" not in possible:
            raise SlivoError(f"{site.name} is given two ranks, which only tucker2 has; give one")
        return "tucker2", (int(rank[0]), int(rank[1]))
    if possible == ("tucker2",):
        raise SlivoError(f"{site.name} is given one rank, and tucker2 has two: of inputs and of outputs")
    return possible[0], (int(rank if not isinstance(rank, tuple | list) else rank[0]),)


def _useless(site: Site, factors: Factors) -> str:
    what = "linear layer" if isinstance(site.layer, nn.Linear) else "convolution"
    told = f"rank {factors.ranks[0]}" if len(factors.ranks) == 1 else f"ranks {list(factors.ranks)}"
    has, limit = prod(site.shape), site.most(factors.kind)
    if not all(rank <= most for rank, most in zip(factors.ranks, limit, strict=True)):
        return f"{site.name} is given {told}, and loses nothing at {few([str(each) for each in limit])}; give less"
    least = ""
    if len(factors.ranks) == 1:
        cost = sum(site.numbers(Factors(factors.kind, (1,))))
        least = f"; below {-(-has // cost)} saves" if cost < has else "; no rank of it saves any"
    return (
        f"{site.name} is given {told}, which saves nothing: the {what} has {has:,} weights, and in its place would be "
        f"{sum(site.numbers(factors)):,}{least}"
    )
