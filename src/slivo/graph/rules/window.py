"""Windows over space, spectra, and complex numbers: channels pass, what is laid out anew is fixed."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from slivo.graph.dims import product, var
from slivo.graph.infer import Dims, Inference, rule
from slivo.graph.rules.linear import broadcast

aten = torch.ops.aten


@rule(aten.im2col)
def im2col(t: Inference, x: Any, *args: Any) -> Dims:
    """Channels become ``C · window``; the places of the window are one dimension."""
    *batch, channels, high, wide = t.of(x)
    t.fix((high, wide), "space")
    window = t.output()[-2] // channels.size
    places = t.fresh(t.output()[-1:], "space")
    return (*batch, product((channels, *t.fresh([window], "the window"))), *places)


@rule(aten.col2im)
def col2im(t: Inference, x: Any, size: Any, window: Any, *args: Any) -> Dims:
    """Channels are ``C · window``; C stays."""
    *batch, rows, places = t.of(x)
    t.fix((places,), "space")
    channels = var(rows.size // prod(window))
    t.unify(rows, product((channels, *t.fresh([prod(window)], "the window"))))
    return (*batch, channels, *t.fresh(t.output()[-2:], "space"))


@rule(aten.unfold)
def unfold(t: Inference, x: Any, dim: int, size: int, step: int) -> Dims:
    """Windows along one dimension, which is fixed; the window comes last."""
    dims = list(t.of(x))
    at = dim % len(dims)
    t.fix([dims[at]], "is parted into windows")
    dims[at] = t.fresh([t.output()[at]], "windows")[0]
    return (*dims, *t.fresh([size], "the window"))


@rule(aten.view_as_real)
def view_as_real(t: Inference, x: Any) -> Dims:
    """A last dimension comes: real and imaginary part."""
    return (*t.of(x), *t.fresh([2], "real and imaginary part"))


@rule(aten.view_as_complex)
def view_as_complex(t: Inference, x: Any) -> Dims:
    """The last dimension, real and imaginary part, goes."""
    t.fix(t.of(x)[-1:], "real and imaginary part")
    return t.of(x)[:-1]


@rule(aten._fft_c2c, aten._fft_r2c, aten._fft_c2r)
def fft(t: Inference, x: Any, dim: Any, *args: Any) -> Dims:
    """The transformed dimensions are fixed; the others pass."""
    dims = list(t.of(x))
    for each in dim:
        t.fix([dims[each]], "is transformed into frequencies")
        dims[each] = t.fresh([t.output()[each]], "frequencies")[0]
    return tuple(dims)


@rule(aten.diagonal)
def diagonal(t: Inference, x: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Dims:
    """Two dimensions become one, the last."""
    dims = list(t.of(x))
    gone = {dim1 % len(dims), dim2 % len(dims)}
    t.fix([dims[at] for at in gone], "depends on the order")
    rest = [term for at, term in enumerate(dims) if at not in gone]
    return (*rest, *t.fresh(t.output()[-1:], "a diagonal"))


@rule(aten._cdist_forward)
def distances(t: Inference, left: Any, right: Any, *args: Any) -> Dims:
    """All rows against all rows: ``left[-1] = right[-1]`` is summed over; leading dimensions broadcast."""
    one, other = t.of(left), t.of(right)
    t.unify(one[-1], other[-1])
    return (*broadcast(t, one[:-2], other[:-2]), one[-2], other[-2])
