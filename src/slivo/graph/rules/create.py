"""Tensors out of nothing, and operators that hand a tensor on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from slivo.graph.dims import UNIT, outer_factor
from slivo.graph.infer import Dims, Inference, elementwise, flatten_args, rule

aten = torch.ops.aten


@rule(
    aten.contiguous,
    aten.clone,
    aten.to,
    aten._to_copy,
    aten.type_as,
    aten.alias,
    aten.detach,
    aten.detach_,
    aten.lift_fresh_copy,
    aten.dropout,
    aten.dropout_,
    aten.feature_dropout,
    aten.alpha_dropout,
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.empty_like,
    aten.rand_like,
    aten.randn_like,
    aten.bernoulli,
    aten.fill,
    aten.fill_,
    aten.zero_,
)
def same(t: Inference, x: Any, *args: Any, **kwargs: Any) -> Dims:
    """The dimensions of the first operand."""
    return t.of(x)


@rule(aten.floor_divide)
def floor_divide(t: Inference, x: Any, other: Any) -> Dims:
    """Positions of a product are divided by the size of its inner factor: they are positions of the outer one."""
    dims, told = elementwise(t, [x, other], t.output()), t.marked(x, "numbers", "permutation")
    outer = outer_factor(told, other) if told is not None and isinstance(other, int) else None
    if outer is None:
        t.read_marks.clear()
    else:
        t.mark("numbers", outer)
    return dims


@rule(
    aten.copy_,
    aten.copy,
    aten.masked_fill,
    aten.where,
    aten.hardswish,
    aten.log_sigmoid,
    aten.rsub,
    aten.negative,
    aten.absolute,
    aten.subtract,
    aten.multiply,
    aten.divide,
    aten.true_divide,
    aten.greater,
    aten.greater_equal,
    aten.less,
    aten.less_equal,
    aten.not_equal,
    aten.isclose,
    aten.fix,
    aten.conj,
    aten.real,
    aten.imag,
    aten.complex,
    aten.polar,
    aten.__and__,
    aten.__or__,
    aten.__xor__,
)
def broadcasting(t: Inference, *args: Any, **kwargs: Any) -> Dims:
    """Operators that broadcast, though PyTorch does not tag them as pointwise."""
    return elementwise(t, list(flatten_args(args)), t.output())


@rule(aten.prelu)
def prelu(t: Inference, x: Any, weight: Any) -> Dims:
    """One slope a channel, or one for all."""
    slopes = t.of(weight)[0] if t.of(weight) else UNIT
    if slopes.size > 1:
        t.unify(slopes, t.of(x)[min(1, len(t.of(x)) - 1)])
        t.fact("num_parameters", slopes)
    return t.of(x)


@rule(aten.zeros, aten.ones, aten.full, aten.empty)
def filled(t: Inference, size: Sequence[int], *args: Any, **kwargs: Any) -> Dims:
    """The same number everywhere: each dimension may take any size."""
    dims = t.fresh(t.output())
    for index, term in enumerate(dims):
        t.literal((0, index), term)
    return dims


@rule(aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty)
def new_filled(t: Inference, x: Any, size: Sequence[int], *args: Any, **kwargs: Any) -> Dims:
    """The same number everywhere: each dimension may take any size."""
    dims = t.fresh(t.output())
    for index, term in enumerate(dims):
        t.literal((1, index), term)
    return dims


@rule(
    aten.arange,
    aten.linspace,
    aten.eye,
    aten.scalar_tensor,
    aten.randn,
    aten.rand,
    aten.randperm,
    aten.randint,
    aten.normal,
    aten.tril_indices,
    aten.triu_indices,
)
def positional(t: Inference, *args: Any, **kwargs: Any) -> Dims:
    """Every position has a value of its own."""
    dims = t.fresh(t.output(), "each position has a value of its own")
    if t.node.target is aten.arange.default and len(dims) == 1:
        t.mark("range", dims[0])
    return dims


@rule(aten.tril, aten.triu)
def triangle(t: Inference, x: Any, diagonal: int = 0) -> Dims:
    """Depends on the order of the last two dimensions."""
    t.fix(t.of(x)[-2:], "depends on the order")
    return t.of(x)
