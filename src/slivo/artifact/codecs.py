"""Codecs: the words of a tensor as positions and values, and each of those as streams.

A *word* is the bits of an entry, an unsigned number; a word that is not zero is *filled*, so that minus zero is. First
the filled positions are said, in one of the ways of `POSITIONS`, then the words there, in one of the ways of `VALUES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import comb, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slivo.artifact.streams import MalformedError, Stream, Symbols, decode, encode

Words = NDArray[Any]
"""One dimension, of uint8, uint16, uint32 or uint64."""

POSITIONS = ("all", "mask", "gaps", "groups")
VALUES = ("words", "codebook")

GROUPS = (4, 8, 16)
"""M of the N:M patterns that are looked for."""

LARGEST_BOOK = 2**16

_PATTERNS = 256
"""A group's pattern is a symbol of one byte."""


@dataclass(frozen=True)
class Plan:
    """How a tensor is taken apart.

    Args:
        positions: ``all``: every word; ``mask``: a bit for each; ``gaps``: how many zeros are before each filled
            one; ``groups``: which N of each M.
        values: ``words``: byte by byte; ``codebook``: the different ones, and which it is.
        dim: The dimension along which positions run fastest; 0 where there are none.
        sizes: Of ``gaps`` the greatest, of ``groups`` N and M, otherwise nothing.
    """

    positions: str = "all"
    values: str = "words"
    dim: int = 0
    sizes: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """What to call it."""
        place = {"all": "", "groups": f"{':'.join(map(str, self.sizes))}"}.get(self.positions, self.positions)
        value = "" if self.values == "words" and place else {"words": "dense"}.get(self.values, self.values)
        return " + ".join(each for each in (place, value) if each)


def lay(words: Words, shape: Sequence[int], dim: int) -> Words:
    """Put words of a tensor into the order in which a dimension runs fastest."""
    if dim >= len(shape) - 1:
        return words
    return np.ascontiguousarray(np.moveaxis(words.reshape(shape), dim, -1)).reshape(-1)


def _placed(places: NDArray[np.int64], shape: Sequence[int], dim: int) -> NDArray[np.int64]:
    """Return where in the tensor's own order places are that are counted with a dimension running fastest."""
    behind = prod(shape[dim + 1 :])
    if behind <= 1:
        return places
    rest, along = np.divmod(places, shape[dim])
    if dim == 0:
        return along * behind + rest
    before, rest = np.divmod(rest, behind)
    return (before * shape[dim] + along) * behind + rest


def take_apart(words: Words, shape: Sequence[int], plan: Plan, *, floating: bool) -> list[Symbols]:
    """Return the symbols of a tensor's streams: first positions, then values.

    Args:
        words: The tensor's, in its order.
        shape: The tensor's.
        plan: How; one that fits.
        floating: Whether words are numbers with sign, exponent and fraction.
    """
    streams: list[Symbols] = []
    if plan.positions != "all":
        words = lay(words, shape, plan.dim)
    if plan.positions == "mask":
        filled = words != 0
        streams, words = [np.packbits(filled)], words[filled]
    elif plan.positions == "gaps":
        places = np.flatnonzero(words)
        streams, words = [_gaps(places, plan.sizes[0])], words[places]
    elif plan.positions == "groups":
        symbols, filled = _grouped(words, *plan.sizes)
        streams, words = [symbols], words[filled]
    if plan.values == "words":
        return [*streams, *split(words, floating=floating)]
    book = np.unique(words)
    index = np.searchsorted(book, words).astype("u1" if len(book) <= 256 else "u2")
    return [*streams, np.concatenate(split(book, floating=floating)), index]


def put_together(streams: Sequence[Stream], shape: Sequence[int], plan: Plan, *, width: int, floating: bool) -> Words:
    """Return the words that were taken apart.

    Allocates a few times the tensor's own bytes at most, whatever the streams say.

    Args:
        streams: As `take_apart` left them, coded.
        shape: The tensor's.
        plan: How it was taken apart; any, it is checked here.
        width: Bytes of a word: 1, 2, 4 or 8.
        floating: Whether words are numbers with sign, exponent and fraction.

    Raises:
        MalformedError: If this is no tensor of this shape.
    """
    count = prod(shape)
    if len(streams) != (plan.positions != "all") + (width if plan.values == "words" else 2):
        raise MalformedError(f"it has {len(streams)} streams, which are not those of {plan.name}")
    if plan.positions == "all":
        return _values(streams, count, plan, width=width, floating=floating)
    places = _filled(streams[0], shape, plan)
    values = _values(streams[1:], len(places), plan, width=width, floating=floating)
    words = np.zeros(count, f"<u{width}")
    words[_placed(places, shape, plan.dim)] = values
    return words


def coded(symbols: Sequence[Symbols], dense_bytes: int) -> tuple[Stream, ...]:
    """Code the streams of a tensor; only so many symbols by ``ans`` that decoding them does not take long."""
    # A slow symbol for each 24 bytes of the tensor is 800 MB/s or more; 32768 of them are a millisecond.
    slow = max(dense_bytes // 24, 2**15)
    streams: list[Stream] = []
    for each in symbols:
        streams.append(encode(each, ans=len(each) <= slow))
        slow -= len(each) if streams[-1].coding == "ans" else 0
    return tuple(streams)


def _filled(stream: Stream, shape: Sequence[int], plan: Plan) -> NDArray[np.int64]:
    """Return the filled places, in the order in which the plan's dimension runs fastest."""
    count = prod(shape)
    if plan.dim >= max(1, len(shape)):
        raise MalformedError(f"it has no dimension {plan.dim}")
    if plan.positions == "mask":
        _expect(plan.sizes == () and stream.count == -(-count // 8), plan)
        return np.flatnonzero(np.unpackbits(decode(stream, 1), count=count).view(np.bool_))
    if plan.positions == "gaps":
        _expect(len(plan.sizes) == 1 and 0 < plan.sizes[0] < 256 and stream.count <= count, plan)
        return _places(decode(stream, 1), plan.sizes[0], count)
    filled, size = plan.sizes if len(plan.sizes) == 2 else (0, 0)
    _expect(0 < filled < size <= max(GROUPS) and comb(size, filled) <= _PATTERNS, plan)
    _expect(bool(shape) and shape[plan.dim] % size == 0 and stream.count == count // size, plan)
    symbols, patterns = decode(stream, 1), _patterns(filled, size)
    if len(symbols) and int(symbols.max()) >= len(patterns):
        raise MalformedError(f"a group has pattern {int(symbols.max())} of {len(patterns)}")
    return np.flatnonzero(patterns[symbols])


def _expect(fits: bool, plan: Plan) -> None:
    if not fits:
        raise MalformedError(f"its positions do not fit {plan.name} and its shape")


def _values(streams: Sequence[Stream], count: int, plan: Plan, *, width: int, floating: bool) -> Words:
    if plan.values == "words":
        return _joined(streams, count, floating=floating)
    table, index = streams
    size = table.count // width
    if size > min(count, LARGEST_BOOK) or table.count % width or index.count != count:
        raise MalformedError(f"a codebook of {table.count} bytes for {index.count} entries does not fit {count}")
    rows = decode(table, 1).reshape(width, size)
    book = _merge(list(rows), size, floating=floating)
    which = decode(index, 1 if size <= 256 else 2)
    if count and int(which.max()) >= size:
        raise MalformedError(f"an entry is number {int(which.max())} of a codebook of {size}")
    return book[which]


def split(words: Words, *, floating: bool) -> list[Symbols]:
    """Return the bytes of words, from the lowest on; of floating-point numbers the sign goes below the fraction.

    The exponent's bits are then the highest byte's, alone but for the highest bits of a short exponent's fraction.
    """
    width = words.dtype.itemsize
    if floating and width > 1:
        words = words << np.uint8(1) | words >> np.uint8(8 * width - 1)
    planes = words.astype(f"<u{width}", copy=False).view("u1").reshape(-1, width)
    return [np.ascontiguousarray(planes[:, place]) for place in range(width)]


def _joined(streams: Sequence[Stream], count: int, *, floating: bool) -> Words:
    if any(each.count != count for each in streams):
        raise MalformedError(f"its streams hold {[each.count for each in streams]} values where {count} are needed")
    return _merge([decode(each, 1) for each in streams], count, floating=floating)


def _merge(planes: Sequence[Symbols], count: int, *, floating: bool) -> Words:
    width = len(planes)
    if width == 1:
        return planes[0]
    data = np.empty((count, width), np.uint8)
    for place, each in enumerate(planes):
        data[:, place] = each
    words: Words = data.view(f"<u{width}").reshape(-1)
    if floating:
        words = words >> np.uint8(1) | words << np.uint8(8 * width - 1)
    return words


def _gaps(places: NDArray[np.int64], most: int) -> Symbols:
    """Say how many zeros are before each filled place; a symbol ``most`` is so many zeros and nothing behind them."""
    gaps = np.diff(places, prepend=-1) - 1
    runs, rest = np.divmod(gaps, most)
    symbols = np.full(len(places) + int(runs.sum()), most, np.uint8)
    symbols[np.arange(len(places)) + np.cumsum(runs)] = rest
    return symbols


def _places(symbols: Symbols, most: int, count: int) -> NDArray[np.int64]:
    steps = symbols.astype(np.int64)
    if len(symbols) and int(symbols.max()) > most:
        raise MalformedError(f"a gap of {int(symbols.max())} is greater than {most}")
    ends = symbols != most
    steps += ends
    places = np.cumsum(steps)
    if len(places) and int(places[-1]) > count:
        raise MalformedError(f"its gaps lead to position {int(places[-1])} of {count}")
    return (places if ends.all() else places[ends]) - 1


def _grouped(words: Words, filled: int, size: int) -> tuple[Symbols, NDArray[np.bool_]]:
    """Return the pattern of each group, and which words are in it: all filled ones, and zeros up to so many."""
    groups = words.reshape(-1, size)
    first = np.argsort(groups == 0, axis=1, kind="stable")[:, :filled]
    rank = np.zeros(2**size, np.uint8)
    patterns = _patterns(filled, size)
    powers = 1 << np.arange(size)
    rank[patterns @ powers] = np.arange(len(patterns))
    symbols = rank[powers[first].sum(axis=1)]
    return symbols, patterns[symbols].reshape(-1)


@cache
def _patterns(filled: int, size: int) -> NDArray[np.bool_]:
    """Return the choices of so many places in a group, in lexicographic order, a row each."""
    found = np.zeros((comb(size, filled), size), np.bool_)
    for row, chosen in enumerate(combinations(range(size), filled)):
        found[row, list(chosen)] = True
    return found
