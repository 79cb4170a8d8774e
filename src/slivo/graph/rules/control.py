"""Blocks of other graphs, and operators that only check."""

from __future__ import annotations

from typing import Any

import torch

from slivo.graph.infer import Dims, Inference, rule

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


@rule(aten._assert_tensor_metadata, aten._assert_scalar, aten._assert_async, aten.sym_size)
def check(t: Inference, *args: Any, **kwargs: Any) -> list[Dims | None]:
    """Gives out no tensor."""
    return []
