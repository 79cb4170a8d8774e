"""Operators that lay dimensions out anew without touching a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from slivo.graph.dims import UNIT, Term, concat, head, product, regroup, take, var
from slivo.graph.infer import Dims, Inference, rule

aten = torch.ops.aten


@rule(aten.view, aten.reshape, aten._unsafe_view, aten.view_copy)
def view(t: Inference, x: Any, size: Any) -> Dims:
    """Row-major: dimensions are joined and parted in blocks of equal product."""
    if not isinstance(size, list | tuple):
        return t.of(x)
    dims = tuple(regroup(t.of(x), t.output(), t.place))
    for index, term in enumerate(dims):
        if size[index] != -1:
            t.literal((1, index), term)
    return dims


@rule(aten.flatten)
def flatten(t: Inference, x: Any, start_dim: int = 0, end_dim: int = -1) -> Dims:
    """A product of dimensions."""
    return tuple(regroup(t.of(x), t.output(), t.place))


@rule(aten.unflatten)
def unflatten(t: Inference, x: Any, dim: int, sizes: Sequence[int]) -> Dims:
    """The factors of a dimension."""
    dims = tuple(regroup(t.of(x), t.output(), t.place))
    start = dim % len(t.of(x))
    for index, size in enumerate(sizes):
        if size != -1:
            t.literal((2, index), dims[start + index])
    return dims


@rule(aten.view_as, aten.reshape_as)
def view_as(t: Inference, x: Any, other: Any) -> Dims:
    """As view, with the other tensor's sizes."""
    dims = tuple(regroup(t.of(x), t.output(), t.place))
    for term, like in zip(dims, t.of(other), strict=True):
        t.unify(term, like)
    return dims


@rule(aten.permute)
def permute(t: Inference, x: Any, dims: Sequence[int]) -> Dims:
    """Dimensions in another order."""
    return tuple(t.of(x)[dim] for dim in dims)


@rule(aten.transpose, aten.transpose_, aten.swapaxes, aten.swapdims)
def transpose(t: Inference, x: Any, first: int, second: int) -> Dims:
    """Two dimensions change places."""
    dims = list(t.of(x))
    if dims:
        dims[first], dims[second] = dims[second], dims[first]
    return tuple(dims)


@rule(aten.t, aten.numpy_T, aten.mT, aten.adjoint)
def matrix_transpose(t: Inference, x: Any) -> Dims:
    """The last two dimensions change places."""
    dims = t.of(x)
    return (*dims[:-2], *dims[-2:][::-1])


@rule(aten.movedim)
def movedim(t: Inference, x: Any, source: Any, destination: Any) -> Dims:
    """Some dimensions move."""
    rank = len(t.of(x))
    sources = [s % rank for s in (source if isinstance(source, list | tuple) else [source])]
    goals = [d % rank for d in (destination if isinstance(destination, list | tuple) else [destination])]
    rest = iter(index for index in range(rank) if index not in sources)
    order = [sources[goals.index(index)] if index in goals else next(rest) for index in range(rank)]
    return tuple(t.of(x)[index] for index in order)


@rule(aten.squeeze, aten.squeeze_)
def squeeze(t: Inference, x: Any, dim: Any = None) -> Dims:
    """Dimensions of size 1 go."""
    dims = t.of(x)
    wanted = range(len(dims)) if dim is None else (dim if isinstance(dim, list | tuple) else [dim])
    gone = {index % len(dims) for index in wanted} if dims else set()
    return tuple(term for index, term in enumerate(dims) if not (index in gone and term.size == 1))


@rule(aten.unsqueeze, aten.unsqueeze_)
def unsqueeze(t: Inference, x: Any, dim: int) -> Dims:
    """A dimension of size 1 comes."""
    dims = list(t.of(x))
    dims.insert(dim % (len(dims) + 1), UNIT)
    return tuple(dims)


@rule(aten.expand, aten.expand_as, aten.broadcast_to)
def expand(t: Inference, x: Any, size: Any, **kwargs: Any) -> Dims:
    """Dimensions of size 1 take any size; what is copied is the same everywhere."""
    shape, source = t.output(), t.of(x)
    like = t.of(size) if not isinstance(size, list | tuple) else ()
    dims: list[Term] = []
    for index, wanted in enumerate(shape):
        at = index - (len(shape) - len(source))
        term = source[at] if at >= 0 else UNIT
        if head(term) is UNIT and wanted > 1:
            term = like[index] if like else var(wanted)
        elif like and head(like[index]) is not UNIT:
            t.unify(term, like[index])
        if not like and size[index] != -1:
            t.literal((1, index), term)
        dims.append(term)
    return tuple(dims)


@rule(aten.repeat, aten.tile)
def repeat(t: Inference, x: Any, repeats: Sequence[int]) -> Dims:
    """``r`` copies one after the other: ``r · dim``."""
    source = t.of(x)
    length = max(len(source), len(repeats))
    dims = (UNIT,) * (length - len(source)) + source
    times = [1] * (length - len(repeats)) + list(repeats)
    out: list[Term] = []
    for index, (term, count) in enumerate(zip(dims, times, strict=True)):
        copies = var(count)
        if count > 1 and len(repeats) == length:
            t.literal((1, index), copies)
        out.append(product((copies, term)))
    return tuple(out)


@rule(aten.repeat_interleave)
def repeat_interleave(t: Inference, x: Any, repeats: Any, dim: int | None = None, **kwargs: Any) -> Dims:
    """Each position ``r`` times: ``dim · r``."""
    if not isinstance(repeats, int) or dim is None:
        t.fix(t.of(x), "repeated by a tensor")
        return t.fresh(t.output(), "repeated by a tensor")
    dims, copies = list(t.of(x)), var(repeats)
    if repeats > 1:
        t.literal((1,), copies)
    dims[dim] = product((dims[dim], copies))
    return tuple(dims)


@rule(aten.cat, aten.concat, aten.concatenate)
def cat(t: Inference, tensors: Sequence[Any], dim: int = 0) -> Dims:
    """A sum of dimensions; the others are equal."""
    parts = [t.of(tensor) for tensor in tensors]
    parts = [dims for dims in parts if not (len(dims) == 1 and dims[0].size == 0)]
    at = dim % len(parts[0])
    for dims in parts[1:]:
        for index, term in enumerate(dims):
            if index != at:
                t.unify(parts[0][index], term)
    return (*parts[0][:at], concat([dims[at] for dims in parts]), *parts[0][at + 1 :])


@rule(aten.stack)
def stack(t: Inference, tensors: Sequence[Any], dim: int = 0) -> Dims:
    """A new dimension, one position a tensor."""
    parts = [t.of(tensor) for tensor in tensors]
    for dims in parts[1:]:
        for term, other in zip(parts[0], dims, strict=True):
            t.unify(term, other)
    out = list(parts[0])
    out.insert(dim % (len(out) + 1), t.fresh([len(parts)], "one position a tensor")[0])
    return tuple(out)


@rule(aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split, aten.hsplit)
def split(t: Inference, x: Any, sizes: Any, dim: int = 0) -> list[Dims | None]:
    """The parts of a sum of dimensions; parts whose number is given, not their sizes, stay of equal size."""
    source, shapes = t.of(x), [shape or () for shape in t.outputs()]
    at = dim % len(source)
    pieces, start = list[Term](), 0
    for shape in shapes:
        piece = take(source[at], start, start + shape[at])
        if piece is None:
            t.fix([source[at]], "is parted inside a block")
            piece = t.fresh([shape[at]], "is parted inside a block")[0]
        pieces.append(piece)
        start += shape[at]
    if isinstance(sizes, list | tuple):
        for index, piece in enumerate(pieces):
            t.literal((1, index), piece)
    elif len(pieces) > 1:
        t.tie(pieces)
        if "split" in str(t.node.target):
            t.literal((1,), pieces[0])
    return [(*source[:at], piece, *source[at + 1 :]) for piece in pieces]


@rule(aten.unbind)
def unbind(t: Inference, x: Any, dim: int = 0) -> list[Dims | None]:
    """One tensor a position, so the dimension is fixed."""
    source = t.of(x)
    at = dim % len(source)
    t.fix([source[at]], "one tensor a position")
    return [(*source[:at], *source[at + 1 :])] * len(t.outputs())


@rule(aten.roll)
def roll(t: Inference, x: Any, shifts: Any, dims: Any = ()) -> Dims:
    """Depends on the order."""
    source = t.of(x)
    for dim in (dims if isinstance(dims, list | tuple) else [dims]) or range(len(source)):
        t.fix([source[dim]], "depends on the order")
    return source
