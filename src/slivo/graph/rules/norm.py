"""Normalization: one scale and shift a channel; statistics do not depend on the channels' order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from slivo.graph.dims import product, var
from slivo.graph.infer import Dims, Inference, rule

aten = torch.ops.aten


@rule(aten.batch_norm, aten._native_batch_norm_legit_no_training)
def batch_norm(t: Inference, x: Any, weight: Any = None, bias: Any = None, *rest: Any) -> Dims | list[Dims | None]:
    """``x[1] = weight[0] = bias[0] = running_mean[0] = running_var[0]``."""
    source = t.of(x)
    for tensor in (weight, bias, *rest[:2]):
        if t.of(tensor):
            t.unify(t.of(tensor)[0], source[1])
    t.fact("num_features", source[1])
    return source if len(t.outputs()) == 1 else [source, (), ()]


@rule(aten.instance_norm)
def instance_norm(t: Inference, x: Any, weight: Any = None, bias: Any = None, *rest: Any) -> Dims:
    """As batch normalization."""
    source = t.of(x)
    for tensor in (weight, bias, *rest[:2]):
        if t.of(tensor):
            t.unify(t.of(tensor)[0], source[1])
    t.fact("num_features", source[1])
    return source


@rule(aten.layer_norm, aten.rms_norm)
def layer_norm(
    t: Inference, x: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, *rest: Any
) -> Dims:
    """The last dimensions are those of weight and bias; all of them are normalized together."""
    source = t.of(x)
    last = source[-len(normalized_shape) :]
    for tensor in (weight, bias):
        for term, other in zip(t.of(tensor), last, strict=False):
            t.unify(term, other)
    t.fact("normalized_shape", *last)
    for index, term in enumerate(last):
        t.literal((1, index), term)
    return source


@rule(aten._weight_norm, aten._weight_norm_interface)
def weight_norm(t: Inference, direction: Any, length: Any, dim: int = 0) -> Dims | list[Dims | None]:
    """A weight as its direction, divided by its norm over all other dimensions, times a length."""
    dims, lengths = t.of(direction), t.of(length)
    for term, other in zip(dims, lengths, strict=True):
        if other.size > 1:
            t.unify(term, other)
    return dims if len(t.outputs()) == 1 else [dims, lengths]


@rule(aten.renorm)
def renorm(t: Inference, x: Any, *args: Any) -> Dims:
    """Slices are made shorter; norms do not depend on the order."""
    return t.of(x)


@rule(aten.group_norm)
def group_norm(t: Inference, x: Any, num_groups: int, weight: Any = None, bias: Any = None, *rest: Any) -> Dims:
    """``x[1] = G · c``: channels move within their group, groups move as wholes."""
    source = t.of(x)
    groups = var(num_groups)
    t.unify(source[1], product((groups, var(source[1].size // num_groups))))
    for tensor in (weight, bias):
        if t.of(tensor):
            t.unify(t.of(tensor)[0], source[1])
    t.fact("num_groups", groups)
    t.fact("num_channels", source[1])
    t.literal((1,), groups)
    return source
