"""Convolutions, pooling and resampling: channels are axes, space is fixed."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from slivo.graph.dims import UNIT, Term, fix, product, var
from slivo.graph.infer import Dims, Inference, rule

aten = torch.ops.aten


@rule(aten.conv1d, aten.conv2d, aten.conv3d)
def conv(
    t: Inference,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Dims:
    """``x[1] = G · weight[1]``, ``y[1] = weight[0] = G · out/G``."""
    return _convolve(t, x, weight, bias, groups, transposed=False, groups_at=6)


@rule(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
def conv_transpose(
    t: Inference,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Dims:
    """``x[1] = weight[0] = G · in/G``, ``y[1] = G · weight[1]``."""
    return _convolve(t, x, weight, bias, groups, transposed=True, groups_at=6)


@rule(aten.convolution)
def convolution(
    t: Inference,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Dims:
    """As the convolutions above."""
    return _convolve(t, x, weight, bias, groups, transposed=transposed, groups_at=8)


def _convolve(t: Inference, x: Any, weight: Any, bias: Any, groups: int, *, transposed: bool, groups_at: int) -> Dims:
    source, kernel, shape = t.of(x), t.of(weight), t.output()
    space = len(kernel) - 2
    batch, channels = source[: -space - 1], source[-space - 1]
    several = var(groups)
    t.fix(source[-space:], "space")
    t.fix(kernel[2:], "the kernel's window")
    if transposed:
        t.unify(kernel[0], product((several, var(kernel[0].size // groups))))
        t.unify(channels, kernel[0])
        t.read(kernel[0])
        out = product((several, kernel[1]))
        steps = prod(term.size for term in source[-space:])
    else:
        t.unify(kernel[0], product((several, var(kernel[0].size // groups))))
        t.unify(channels, product((several, kernel[1])))
        t.read(kernel[1])
        out = kernel[0]
        steps = prod(shape[-space:])
    if bias is not None:
        t.unify(t.of(bias)[0], out)
    t.cost(steps * prod(term.size for term in kernel[2:]), *batch, kernel[0], kernel[1])
    t.fact("in_channels", channels)
    t.fact("out_channels", out)
    t.fact("groups", several)
    if groups > 1:
        t.literal((groups_at,), several)
    t.role(out, "out")
    return (*batch, out, *t.fresh(shape[-space:], "space"))


@rule(
    aten.max_pool1d,
    aten.max_pool2d,
    aten.max_pool3d,
    aten.avg_pool1d,
    aten.avg_pool2d,
    aten.avg_pool3d,
    aten.adaptive_avg_pool1d,
    aten.adaptive_avg_pool2d,
    aten.adaptive_avg_pool3d,
    aten.adaptive_max_pool1d,
    aten.adaptive_max_pool2d,
    aten.max_pool1d_with_indices,
    aten.max_pool2d_with_indices,
    aten.max_pool3d_with_indices,
    aten.upsample_nearest1d,
    aten.upsample_nearest2d,
    aten.upsample_nearest3d,
    aten._upsample_nearest_exact2d,
    aten.upsample_linear1d,
    aten.upsample_bilinear2d,
    aten._upsample_bilinear2d_aa,
    aten.upsample_bicubic2d,
    aten._upsample_bicubic2d_aa,
    aten.upsample_trilinear3d,
    aten.grid_sampler,
    aten.grid_sampler_2d,
)
def pool(t: Inference, x: Any, *args: Any, **kwargs: Any) -> Dims | list[Dims | None]:
    """Batch and channels pass; the dimensions of space are new."""
    name = str(t.node.target)
    space = next(n for n in (1, 2, 3) if f"{n}d" in name) if any(f"{n}d" in name for n in (1, 2, 3)) else 2
    source = t.of(x)
    t.fix(source[-space:], "space")
    outputs = [
        None if shape is None else (*source[:-space], *t.fresh(shape[-space:], "space")) for shape in t.outputs()
    ]
    return outputs if len(outputs) > 1 else (outputs[0] or ())


@rule(aten.pixel_shuffle)
def pixel_shuffle(t: Inference, x: Any, upscale: int) -> Dims:
    """Channels are ``C · r · r``; C stays."""
    *batch, channels, _, _ = t.of(x)
    high, low = _factor(t, channels, upscale * upscale)
    return (*batch, high, *t.fresh(t.output()[-2:], f"space x {low.size}"))


@rule(aten.pixel_unshuffle)
def pixel_unshuffle(t: Inference, x: Any, downscale: int) -> Dims:
    """Channels become ``C · r · r``."""
    *batch, channels, high, wide = t.of(x)
    t.fix((high, wide), "space")
    window = var(downscale * downscale, f"{t.place}: the window")
    return (*batch, product((channels, window)), *t.fresh(t.output()[-2:], "space"))


@rule(aten.channel_shuffle)
def channel_shuffle(t: Inference, x: Any, groups: int) -> Dims:
    """Channels ``G · c`` become ``c · G``."""
    batch, channels, *space = t.of(x)
    high, low = _factor(t, channels, channels.size // groups)
    return (batch, product((low, high)), *space)


def _factor(t: Inference, term: Term, inner: int) -> tuple[Term, Term]:
    """Write a term as high · low, low fixed; with everything fixed where it has no such factor."""
    low = var(inner)
    high = var(term.size // inner) if term.size > inner else UNIT
    t.unify(term, product((high, low)))
    if t.node.target is not aten.channel_shuffle.default:
        fix(low, f"{t.place}: the window")
    return high, low
