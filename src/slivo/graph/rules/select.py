"""Operators that pick positions out of dimensions, or put some in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from slivo.graph.dims import UNIT, Term, concat, product, take, var
from slivo.graph.infer import Dims, Inference, rule

aten = torch.ops.aten


@rule(aten.slice)
def slice_(t: Inference, x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Dims:
    """The positions from start to end; every step-th is the outer factor of a product."""
    dims = list(t.of(x))
    dims[dim] = _slice(t, dims[dim], start, end, step)
    return tuple(dims)


def _slice(t: Inference, term: Term, start: int | None, end: int | None, step: int) -> Term:
    size = term.size
    first, last, _ = slice(start, end, step).indices(size)
    if first >= last:
        return t.fresh([0], "is empty")[0]
    if step > 1:
        if size % step == 0 and first < step and last > size - step:
            high, low = var(size // step), var(step, f"{t.place}: every {step}th position")
            t.unify(term, product((high, low)))
            return high
        t.fix([term], f"every {step}th position")
        return t.fresh([len(range(first, last, step))], f"every {step}th position")[0]
    if (first, last) == (0, size):
        return term
    before, piece = take(term, 0, first) if first else UNIT, take(term, first, last)
    if before is None or piece is None:
        t.fix([term], "is parted inside a block")
        return t.fresh([last - first], "is parted inside a block")[0]
    if first:
        t.literal((2,), before)
    if last < size:
        t.literal((3,), concat([before, piece]) if first else piece)
    return piece


@rule(aten.narrow)
def narrow(t: Inference, x: Any, dim: int, start: int, length: int) -> Dims:
    """The positions from start on."""
    dims = list(t.of(x))
    piece = take(dims[dim], start, start + length)
    t.fix([dims[dim]], "is cut at a fixed position")
    dims[dim] = piece if piece is not None else t.fresh([length], "is cut at a fixed position")[0]
    return tuple(dims)


@rule(aten.slice_scatter)
def slice_scatter(
    t: Inference,
    x: Any,
    source: Any,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Dims:
    """A piece is replaced by a tensor of its dimensions."""
    dims, piece = t.of(x), list(t.of(x))
    piece[dim] = _slice(t, piece[dim], start, end, step)
    for term, other in zip(piece, t.of(source), strict=True):
        t.unify(term, other)
    return dims


@rule(aten.select, aten.select_scatter)
def select(t: Inference, x: Any, *args: Any) -> Dims:
    """One position, so the dimension is fixed."""
    dims = list(t.of(x))
    dim = args[-2]
    t.fix([dims[dim]], "a position is picked by its number")
    if t.node.target is aten.select_scatter.default:
        return tuple(dims)
    del dims[dim]
    return tuple(dims)


@rule(aten.pad, aten.constant_pad_nd)
def pad(t: Inference, x: Any, pads: Sequence[int], *args: Any, **kwargs: Any) -> Dims:
    """Padding with a constant is a sum of dimensions; any other depends on the order."""
    constant = t.node.target is aten.constant_pad_nd.default or (args[0] if args else "constant") == "constant"
    dims = list(t.of(x))
    for number in range(len(pads) // 2):
        low, high = pads[2 * number], pads[2 * number + 1]
        term = dims[-1 - number]
        if not (low or high):
            continue
        if not constant or low < 0 or high < 0:
            t.fix([term], "is padded")
            dims[-1 - number] = t.fresh([term.size + low + high], "is padded")[0]
        else:
            before, after = t.fresh([low, high], "padding")
            dims[-1 - number] = concat([before, term, after])
    return tuple(dims)
