"""A linear layer whose input is rounded as it comes: the range is that of each batch, and nothing is calibrated."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TOP = 255
"""The greatest code; runtimes round to eight bits here, and to nothing else."""


@torch.library.custom_op("slivo::dynamic_linear", mutates_args=())
def dynamic_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer of integer codes to an input that is rounded to unsigned codes of its own range.

    An operator, so that exporters can tell it: it becomes ``DynamicQuantizeLinear`` and ``MatMulInteger``.

    Args:
        x: Shape (…, inputs), float32.
        codes: The weight's, int8, shape (outputs, inputs).
        scale: The weight's, float32, shape (outputs,) or (1,).
        bias: float32, shape (outputs,), or None.

    Returns:
        Shape (…, outputs): ``(q − z) · codesᵀ · s · scale + bias`` with ``q = round(x / s) + z``, where s and z make
        0 … 255 cover zero and all of x.

    Example:
        >>> dynamic_linear(torch.tensor([[2.55, -0.004]]), torch.ones(1, 2, dtype=torch.int8), torch.ones(1), None)
        tensor([[2.5540]])
    """
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    step = (high - low) / TOP
    step = torch.where(step > 0, step, torch.ones_like(step))
    zero = (-low / step).round().clamp(0, TOP)
    rounded = ((x / step).round() + zero).clamp(0, TOP) - zero
    product = F.linear(rounded, codes.float()) * (step * scale)
    return product if bias is None else product + bias


@dynamic_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    del scale, bias
    return x.new_empty((*x.shape[:-1], codes.shape[0]))
