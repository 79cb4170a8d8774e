"""Decomposition: an operator without a rule that PyTorch itself writes in terms of others is read as those."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree


def decompose(node: fx.Node) -> fx.Graph | None:
    """Return the graph of simpler operators that a node's operator is made of.

    Args:
        node: A call of an operator; no data is touched, only the shapes that were captured with it.

    Returns:
        A graph with one placeholder for each of the node's inputs (`fx.Node.all_input_nodes`), in order; None if the
        operator is elementary, or is made of parts that depend on values.
    """
    target = node.target
    if not isinstance(target, OpOverload):
        return None
    parts = target.decompose if target._can_decompose() else decomposition_table.get(target)
    if parts is None:
        return None
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = node.all_input_nodes
    values = [node.meta.get("val") for node in inputs]
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) < len(values) or any(type(size) is not int for value in tensors for size in value.shape):
        return None

    def run(*given: Tensor) -> Any:
        known = dict(zip(inputs, given, strict=True))
        args, kwargs = pytree.tree_map_only(fx.Node, known.__getitem__, (_plain(node.args), _plain(node.kwargs)))
        found = parts(*args, **kwargs)
        return list(found) if isinstance(found, list | tuple) else found

    with warnings.catch_warnings(), mode:
        warnings.simplefilter("ignore")
        empty = [torch.empty(value.shape, dtype=value.dtype, device=value.device) for value in tensors]
        try:
            graph: fx.Graph = make_fx(run)(*empty).graph
        except Exception:  # whatever PyTorch's own code raises on shapes alone
            return None
    return None if any(each.target is target for each in graph.nodes) else graph


def _plain(arguments: Any) -> Any:
    """Return arguments with the lists and mappings of graphs as plain ones, which can be mapped over."""
    if isinstance(arguments, dict):
        return {key: _plain(value) for key, value in arguments.items()}
    if isinstance(arguments, list | tuple):
        return [_plain(value) for value in arguments]
    return arguments
