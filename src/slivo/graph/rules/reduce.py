"""Reductions and what runs along one dimension."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from slivo.graph.dims import UNIT, product
from slivo.graph.infer import Dims, Inference, elementwise, rule

aten = torch.ops.aten


@rule(
    aten.mean,
    aten.sum,
    aten.amax,
    aten.amin,
    aten.prod,
    aten.all,
    aten.any,
    aten.logsumexp,
    aten.nansum,
)
def reduction(t: Inference, x: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Dims:
    """The reduced dimensions go; a reduction does not depend on their order."""
    return _reduced(t, x, dim, keepdim)


@rule(aten.var, aten.std)
def variance(t: Inference, x: Any, dim: Any = None, *args: Any, keepdim: bool = False, **kwargs: Any) -> Dims:
    """The reduced dimensions go."""
    keepdim = keepdim or (bool(args) and bool(args[-1]) and str(t.node.target).endswith(".dim"))
    return _reduced(t, x, None if isinstance(dim, bool) else dim, keepdim)


@rule(aten.var_mean, aten.std_mean)
def variance_and_mean(
    t: Inference, x: Any, dim: Any = None, *args: Any, keepdim: bool = False, **kwargs: Any
) -> list[Dims | None]:
    """Two reductions at once."""
    keepdim = keepdim or (bool(args) and bool(args[-1]) and str(t.node.target).endswith(".dim"))
    out = _reduced(t, x, None if isinstance(dim, bool) else dim, keepdim)
    return [out, out]


@rule(aten.linalg_vector_norm, aten.norm)
def vector_norm(t: Inference, x: Any, order: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Dims:
    """The reduced dimensions go."""
    return _reduced(t, x, dim, keepdim)


@rule(aten.max, aten.min, aten.median)
def extremum(t: Inference, x: Any, dim: Any = None, keepdim: bool = False) -> Dims | list[Dims | None]:
    """Over all, of two tensors, or along one dimension, whose indices then fix it."""
    if dim is None:
        return ()
    if isinstance(dim, fx.Node):
        return elementwise(t, [x, dim], t.output())
    if t.of(x):
        t.mark("numbers", t.of(x)[dim], output=1)
    out = _reduced(t, x, dim, keepdim)
    return [out, out]


@rule(aten.argmax, aten.argmin)
def argument(t: Inference, x: Any, dim: Any = None, keepdim: bool = False) -> Dims:
    """Positions are given out as numbers; of everything, they are those of no dimension."""
    if dim is None:
        t.fix(t.of(x), "positions are given out as indices")
    elif t.of(x):
        t.mark("numbers", t.of(x)[dim])
    return _reduced(t, x, dim, keepdim)


@rule(aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax, aten._safe_softmax)
def softmax(t: Inference, x: Any, *args: Any, **kwargs: Any) -> Dims:
    """Does not depend on the order."""
    return t.of(x)


@rule(aten.glu)
def glu(t: Inference, x: Any, dim: int = -1) -> Dims:
    """Two halves are multiplied with one another."""
    dims = list(t.of(x))
    half = t.fresh([dims[dim].size // 2])[0]
    t.unify(dims[dim], product((*t.fresh([2], "the two halves of a gate"), half)))
    dims[dim] = half
    return tuple(dims)


@rule(aten.histc)
def histogram(t: Inference, x: Any, bins: int = 100, low: float = 0, high: float = 0, **kwargs: Any) -> Dims:
    """Counts over everything; the bins are a new dimension, or the one whose positions are counted."""
    term = t.marked(x, "numbers")
    if term is None or (bins, low, high) != (term.size, 0, term.size - 1):
        t.read_marks.clear()
        return t.fresh(t.output(), "bins")
    t.literal((1,), term)
    t.literal((3,), term, shift=-1)
    t.mark("counts", term)
    return (term,)


@rule(aten.cummax, aten.cummin)
def running_extremum(t: Inference, x: Any, dim: int) -> list[Dims | None]:
    """Depends on the order, so the dimension is fixed."""
    t.fix([t.of(x)[dim]], "depends on the order")
    return [t.of(x), t.of(x)]


@rule(aten.cumsum)
def running_sum(t: Inference, x: Any, dim: int = 0, **kwargs: Any) -> Dims:
    """Depends on the order; so do all who are told where the runs of counted positions end."""
    counted = t.marked(x, "counts")
    if counted is not None:
        t.mark("offsets", counted)
    elif t.of(x):
        t.fix([t.of(x)[dim]], "depends on the order")
    return t.of(x)


@rule(aten.cumprod, aten.logcumsumexp, aten.flip)
def running(t: Inference, x: Any, dim: Any = 0, *args: Any, **kwargs: Any) -> Dims:
    """Depends on the order, so the dimension is fixed."""
    for each in _list(dim, len(t.of(x))):
        t.fix([t.of(x)[each]], "depends on the order")
    return t.of(x)


@rule(aten.diff)
def diff(t: Inference, x: Any, n: int = 1, dim: int = -1, *args: Any, **kwargs: Any) -> Dims:
    """Neighbors are subtracted, so the dimension is fixed."""
    dims = list(t.of(x))
    t.fix([dims[dim]], "depends on the order")
    dims[dim] = t.fresh([t.output()[dim]], "depends on the order")[0]
    return tuple(dims)


@rule(aten.topk, aten.kthvalue)
def ranking(t: Inference, x: Any, k: int, dim: int = -1, *args: Any, **kwargs: Any) -> list[Dims | None]:
    """Positions are given out as numbers; the ranks are a new dimension, which needs as many to choose from."""
    source = t.of(x)
    if not source:
        return [(), ()]
    term = source[dim]
    t.mark("numbers", term, output=1)
    t.limit(term, least=k)
    return _ranked(t, source, dim, "ranks")


@rule(aten.sort)
def sort(t: Inference, x: Any, *args: Any, dim: int | None = None, **kwargs: Any) -> list[Dims | None]:
    """As topk; the dimension comes first, or after ``stable`` in the overload that has it.

    Numbers that are sorted lie in the order of the dimension that they are positions of.
    """
    numbers = [each for each in args if not isinstance(each, bool) and each is not None]
    at = numbers[0] if dim is None and numbers else -1 if dim is None else dim
    source, told = t.of(x), t.marked(x, "numbers")
    if not source:
        return [(), ()]
    t.fix([source[at]], "positions are sorted")
    if told is None or len(source) > 1:
        t.read_marks.clear()
        return _ranked(t, source, at, "ranks")
    out = _ranked(t, source, at, None)
    t.mark("numbers", told, output=0)
    t.mark("permutation", source[0], output=1)
    for dims in out[:1]:
        t.ordered.update((term, told) for term in dims or ())
    return out


def _ranked(t: Inference, source: Dims, dim: int, reason: str | None) -> list[Dims | None]:
    shape = t.outputs()[0] or ()
    at = dim % len(source)
    ranks = t.fresh(shape[at : at + 1], reason) if len(shape) == len(source) else ()
    out = (*source[:at], *ranks, *source[at + 1 :])
    return [out, out]


def _reduced(t: Inference, x: Any, dim: Any, keepdim: bool) -> Dims:
    dims = t.of(x)
    gone = set(_list(dim, len(dims)))
    if keepdim:
        return tuple(UNIT if index in gone else term for index, term in enumerate(dims))
    return tuple(term for index, term in enumerate(dims) if index not in gone)


def _list(dim: Any, rank: int) -> Iterable[int]:
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return range(rank)
    return [each % rank for each in (dim if isinstance(dim, list | tuple) else [dim])] if rank else []
