"""Operators that pick or fill positions by tensors of numbers or by masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from slivo.graph.dims import UNIT, Term
from slivo.graph.infer import Dims, Inference, elementwise, rule

aten = torch.ops.aten


@rule(aten.index)
def index(t: Inference, x: Any, indices: Sequence[Any]) -> Dims:
    """Dimensions indexed by a tensor are fixed, unless it holds numbers of their positions; the others pass."""
    kept, before = _passing(t, x, indices)
    shape = t.output()
    sizes = shape[before : before + len(shape) - len(kept)]
    return (*kept[:before], *_indexed(t, [each for each in indices if each is not None], sizes), *kept[before:])


@rule(aten.index_put, aten._unsafe_index_put, aten._index_put_impl)
def index_put(t: Inference, x: Any, indices: Sequence[Any], values: Any, *rest: Any, **kwargs: Any) -> Dims:
    """As index, and what is put there has the dimensions that are not indexed."""
    inverse = _inverse(t, x, indices, values)
    if inverse is not None:
        return inverse
    kept, before = _passing(t, x, indices)
    masks = any("bool" in _dtype(each) for each in indices)
    ranks = [len(t.of(each)) for each in indices if each is not None]
    target: list[Term | None] = [*kept[:before], *[None] * (1 if masks else max(ranks)), *kept[before:]]
    for term, other in zip(reversed(t.of(values)), reversed(target), strict=False):
        if other is None:
            t.fix([term], "goes to positions picked by a tensor")
        elif term.size > 1:
            t.unify(term, other)
    return t.of(x)


def _passing(t: Inference, x: Any, indices: Sequence[Any]) -> tuple[list[Term], int]:
    """Fix the indexed dimensions; return the others, and how many of them stand before what the indices make."""
    source = t.of(x)
    picked = [at for at, each in enumerate(indices) if each is not None]
    spread, at = list[tuple[Term, bool]](), 0
    for each in indices:
        count = 1 if each is None or "bool" not in _dtype(each) else len(t.of(each))
        spread.extend((term, each is not None) for term in source[at : at + count])
        at += count
    spread.extend((term, False) for term in source[at:])
    used_by = [each for each in indices if each is not None]
    indexed = [term for term, used in spread if used]
    if len(indexed) == len(used_by):
        for term, each in zip(indexed, used_by, strict=True):
            _picked(t, x, term, each)
    else:
        t.fix(indexed, "positions are picked by a mask")
    together = picked == list(range(picked[0], picked[-1] + 1)) if picked else False
    return [term for term, used in spread if not used], picked[0] if together else 0


def _picked(t: Inference, source: Any, term: Term, indices: Any) -> None:
    """State what a dimension is whose positions a tensor picks: the one that its numbers are of, or a fixed one."""
    told = t.marked(indices, "numbers", "permutation")
    if told is None:
        t.fix([term], "positions are picked by a tensor")
    else:
        t.unify(term, told)
        t.limit(term, routed=source.op == "get_attr")


def _inverse(t: Inference, x: Any, indices: Sequence[Any], values: Any) -> Dims | None:
    """Read ``x[permutation] = arange(n)``: every position is written, with its place in the permutation's order."""
    if len(indices) != 1 or len(t.of(x)) != 1 or not isinstance(indices[0], fx.Node):
        return None
    mark, order = t.marks.get((indices[0], 0)), t.marks.get((values, 0)) if isinstance(values, fx.Node) else None
    if not (mark and order and mark.kind == "permutation" and order.kind == "range"):
        return None
    places, term = t.of(indices[0]), mark.term
    if not t.of(x)[0].size == term.size == order.term.size == places[0].size:
        return None
    t.marked(indices[0], "permutation")
    t.mark("numbers", places[0])
    return (term,)


def _indexed(t: Inference, indices: Sequence[Any], sizes: Sequence[int]) -> Dims:
    """The dimensions that index tensors make: their own, broadcast."""
    if any("bool" in _dtype(each) for each in indices):
        return t.fresh(sizes, "positions picked by a mask")
    return elementwise(t, indices, sizes)


def _dtype(argument: Any) -> str:
    return str(getattr(argument.meta.get("val"), "dtype", "")) if isinstance(argument, fx.Node) else ""


@rule(aten.index_select)
def index_select(t: Inference, x: Any, dim: int, indices: Any) -> Dims:
    """Positions are picked by a tensor."""
    dims = list(t.of(x))
    _picked(t, x, dims[dim], indices)
    dims[dim] = t.of(indices)[0] if t.of(indices) else UNIT
    return tuple(dims)


@rule(aten.gather, aten.take_along_dim)
def gather(t: Inference, x: Any, dim: int, indices: Any, **kwargs: Any) -> Dims:
    """Along one dimension positions are picked by a tensor; the others agree where their sizes do."""
    wanted = t.of(indices)
    _along(t, x, wanted, dim, indices)
    return wanted


@rule(aten.scatter, aten.scatter_add, aten.scatter_reduce)
def scatter(t: Inference, x: Any, dim: int, indices: Any, source: Any = None, *args: Any, **kwargs: Any) -> Dims:
    """Along one dimension positions are filled by a tensor; the others agree where their sizes do."""
    wanted = t.of(indices)
    _along(t, x, wanted, dim, indices)
    if t.of(source):
        _along(t, source, wanted, dim, None)
        t.fix([wanted[dim], t.of(source)[dim]], "goes to positions picked by a tensor")
    return t.of(x)


def _along(t: Inference, x: Any, wanted: Dims, dim: int, indices: Any) -> None:
    source = t.of(x)
    at = dim % len(source) if source else 0
    for number, (term, other) in enumerate(zip(source, wanted, strict=True)):
        if number == at and indices is not None:
            _picked(t, x, term, indices)
        elif number == at or term.size != other.size:
            t.fix([term], "positions are picked by a tensor")
            if number != at:
                t.fix([other], "is shorter than what it indexes")
        else:
            t.unify(term, other)


@rule(aten.index_add, aten.index_copy, aten.index_reduce)
def index_add(t: Inference, x: Any, dim: int, indices: Any, source: Any, *args: Any, **kwargs: Any) -> Dims:
    """Along one dimension slices go to positions picked by a tensor; the other dimensions are equal."""
    dims = t.of(x)
    t.fix([dims[dim], t.of(source)[dim]], "goes to positions picked by a tensor")
    for number, (term, other) in enumerate(zip(dims, t.of(source), strict=True)):
        if number != dim % len(dims):
            t.unify(term, other)
    return dims


@rule(aten.index_fill)
def index_fill(t: Inference, x: Any, dim: int, *args: Any) -> Dims:
    """Positions are picked by a tensor."""
    t.fix([t.of(x)[dim]], "positions are picked by a tensor")
    return t.of(x)


@rule(aten.masked_scatter)
def masked_scatter(t: Inference, x: Any, mask: Any, source: Any) -> Dims:
    """What is put where the mask says is taken in order, so everything is fixed that the mask does not copy."""
    out = elementwise(t, [x, mask], t.output())
    t.fix([*out, *t.of(source)], "is filled in order")
    return out


@rule(aten.searchsorted, aten.bucketize)
def search(t: Inference, first: Any, second: Any, *args: Any, **kwargs: Any) -> Dims:
    """Numbers of intervals; the bounds are in order."""
    bounds, values = (first, second) if t.node.target is aten.searchsorted.Tensor else (second, first)
    t.fix(t.of(bounds), "bounds in order")
    if len(t.of(bounds)) > 1:
        t.fix(t.of(values), "bounds in order")
    return t.of(values)
