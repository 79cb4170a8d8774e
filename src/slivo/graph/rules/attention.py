"""Attention: heads are an axis, and so are the widths of queries with keys, and of values."""

from __future__ import annotations

from typing import Any

import torch

from slivo.graph.dims import UNIT, head, product, var
from slivo.graph.infer import Dims, Inference, rule
from slivo.graph.rules.linear import broadcast

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention)
def scaled_dot_product_attention(
    t: Inference,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Dims:
    """``q[-1] = k[-1]``, ``k[-2] = v[-2]``, ``y[-1] = v[-1]``; with grouped queries, heads = key heads · group."""
    q, k, v = t.of(query), t.of(key), t.of(value)
    t.unify(q[-1], k[-1])
    t.unify(k[-2], v[-2])
    batch = q[:-2]
    if enable_gqa and q[-3].size != k[-3].size:
        t.unify(k[-3], v[-3])
        t.unify(q[-3], product((k[-3], var(q[-3].size // k[-3].size))))
        broadcast(t, broadcast(t, q[:-3], k[:-3]), v[:-3])
    else:
        batch = broadcast(t, broadcast(t, q[:-2], k[:-2]), v[:-2])
    mask = t.of(attn_mask)
    for term, other in zip(reversed(mask), reversed((*batch, q[-2], k[-2])), strict=False):
        if head(term) is not UNIT and head(other) is not UNIT:
            t.unify(term, other)
    t.cost(1, *batch, q[-2], k[-2], q[-1])
    t.cost(1, *batch, q[-2], k[-2], v[-1])
    if len(q) > 2:
        t.role(q[-3], "heads")
        t.role(k[-3], "heads" if q[-3].size == k[-3].size else "key heads")
    t.role(q[-1], "query width")
    t.role(v[-1], "value width")
    return (*batch, q[-2], v[-1])
