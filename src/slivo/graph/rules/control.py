"""Blocks of other graphs, and operators that only check."""

from __future__ import annotations

from typing import Any

import torch

from slivo.graph.infer import Dims, Inference, rule
from slivo.graph.sizes import has_size, holds

aten = torch.ops.aten


@rule(torch.ops.higher_order.wrap_with_set_grad_enabled)
def no_grad(t: Inference, enabled: bool, module: Any, *args: Any) -> list[Dims | None]:
    """The block's own operators apply."""
    return t.inline(module, args)


@rule(torch.ops.higher_order.wrap_with_autocast)
def autocast(
    t: Inference, device: str, dtype: Any, enabled: bool, cache: bool, module: Any, *args: Any
) -> list[Dims | None]:
    """The block's own operators apply."""
    return t.inline(module, args)


@rule(
    aten._assert_tensor_metadata,
    aten._assert_scalar,
    aten._assert_async,
    aten.sym_size,
    aten.sym_numel,
    aten.sym_stride,
    aten.sym_storage_offset,
    holds,
)
def check(t: Inference, *args: Any, **kwargs: Any) -> list[Dims | None]:
    """Gives out no tensor."""
    return []


@rule(has_size)
def sized(t: Inference, x: Any, dim: int, size: int, name: str) -> list[Dims | None]:
    """Gives out no tensor; the size is the dimension's."""
    t.literal((2,), t.of(x)[dim])
    return []
