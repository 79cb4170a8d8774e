"""Which codec makes a tensor smallest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import comb

import numpy as np

from slivo.artifact.codecs import GROUPS, LARGEST_BOOK, Plan, Words, coded, lay, split, take_apart
from slivo.artifact.streams import Stream, estimate

_GAPS = (15, 31, 63, 127, 255)

_TRIED = 3
"""Plans that are carried out; the rest are only estimated, which takes a fraction of the time."""

_CHUNK = 2**20


def smallest(words: Words, shape: Sequence[int], *, floating: bool) -> tuple[Plan, tuple[Stream, ...]]:
    """Return the codec that makes a tensor smallest, and its streams.

    Every codec that fits is estimated from counts of its symbols, then the three that look best are carried out.

    Args:
        words: The tensor's, in its order.
        shape: The tensor's.
        floating: Whether words are numbers with sign, exponent and fraction.
    """
    best: tuple[Plan, tuple[Stream, ...]] | None = None
    for _, plan in sorted(plans(words, shape, floating=floating), key=lambda found: found[0])[:_TRIED]:
        streams = coded(take_apart(words, shape, plan, floating=floating), words.nbytes)
        if best is None or _cost(plan, streams, words.itemsize) < _cost(*best, words.itemsize):
            best = plan, streams
    assert best is not None
    return best


def distinct(words: Words, most: int = LARGEST_BOOK) -> Words | None:
    """Return the different words, sorted; None if there are more than so many."""
    if words.itemsize <= 2:
        few = np.flatnonzero(np.bincount(words, minlength=1)).astype(words.dtype)
        return few if len(few) <= most else None
    found = words[:0]
    for start in range(0, len(words), _CHUNK):
        found = np.union1d(found, words[start : start + _CHUNK])
        if len(found) > most:
            return None
    return found


def _cost(plan: Plan, streams: Sequence[Stream], width: int) -> float:
    """Return the bytes of streams and about those of what the header says of them; more of what is slow to read."""
    size = sum(len(each.data) + 5 for each in streams) + 2 * (plan != Plan())
    slow = plan.values == "codebook" and streams[-2].count > 256 * width
    return size * (1.01 if slow else 1.0)


def plans(words: Words, shape: Sequence[int], *, floating: bool) -> Iterator[tuple[float, Plan]]:
    """Give every plan that fits, with about the bytes that it takes."""
    book = distinct(words)
    yield _bytes_cost(words, floating=floating), Plan()
    if book is not None and len(words):
        yield _book_cost(words, book), Plan(values="codebook")
    values = words[words != 0]
    if not len(values) or len(values) > 0.95 * len(words):
        return
    ways = {"words": _bytes_cost(values, floating=floating)}
    book = None if book is None else book[book != 0]
    if book is not None:
        ways["codebook"] = _book_cost(values, book)
    last = max(0, len(shape) - 1)
    for dim in (last, *(dim for dim in (1, 0) if dim < last and shape[dim] > 1)):  # as it is, inputs, outputs
        laid = lay(words, shape, dim)
        for cost, positions, sizes in _positions(laid, shape, dim):
            for name, price in ways.items():
                more = 1.0
                if positions == "groups":
                    more = sizes[0] / sizes[1] * len(words) / len(values)
                # Another order takes a little longer to read.
                yield (cost + price * more) * (1 if dim == last else 1.005), Plan(positions, name, dim, sizes)


def _positions(laid: Words, shape: Sequence[int], dim: int) -> Iterator[tuple[float, str, tuple[int, ...]]]:
    """Give the ways to say where words are filled, with about the bytes that each takes."""
    filled = laid != 0
    yield estimate(np.bincount(np.packbits(filled), minlength=256)), "mask", ()
    places = np.flatnonzero(filled)
    lengths, counts = np.unique(np.diff(places, prepend=-1) - 1, return_counts=True)
    for most in _GAPS:
        symbols = np.bincount(lengths % most, counts, most + 1)
        symbols[most] = (lengths // most * counts).sum()
        yield estimate(symbols), "gaps", (most,)
    size = shape[dim] if shape else 1
    for group in GROUPS:
        if size % group == 0:
            counts = filled.reshape(-1, group).sum(axis=1)
            most = int(counts.max())
            if 2 * most <= group and comb(group, most) <= 256:
                yield len(counts) * np.log2(max(2, comb(group, most))) / 8, "groups", (most, group)


def _bytes_cost(words: Words, *, floating: bool) -> float:
    return sum(estimate(np.bincount(each, minlength=256)) for each in split(words, floating=floating))


def _book_cost(words: Words, book: Words) -> float:
    counts = np.bincount(np.searchsorted(book, words))
    return book.nbytes + estimate(counts)
