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

from slivo.graph.sizes import number


def decompose(node: fx.Node) -> fx.Graph | None:
    """Return the graph of simpler operators that a node's operator is made of.

    Args:
        node: A call of an operator; no data is touched, only the shapes that were captured with it.

    Returns:
        A graph with one placeholder for each of the node's inputs (`tensor_inputs`), in order; None if the operator is
        elementary, or is made of parts that depend on values. Sizes in it are the example's.
    """
    target = node.target
    if not isinstance(target, OpOverload):
        return None
    parts = target.decompose if target._can_decompose() else decomposition_table.get(target)
    if parts is None:
        return None
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = tensor_inputs(node)
    values = [node.meta.get("val") for node in inputs]
    tensors = [value for value in values if isinstance(value, Tensor)]
    shapes = [tuple(map(number, value.shape)) for value in tensors]
    if len(tensors) < len(values) or any(type(size) is not int for shape in shapes for size in shape):
        return None

    def run(*given: Tensor) -> Any:
        known = dict(zip(inputs, given, strict=True))
        plain = _plain(numbers(node.args)), _plain(numbers(node.kwargs))
        args, kwargs = pytree.tree_map_only(fx.Node, known.__getitem__, plain)
        found = parts(*args, **kwargs)
        return list(found) if isinstance(found, list | tuple) else found

    with warnings.catch_warnings(), mode:
        warnings.simplefilter("ignore")
        empty = [
            torch.empty(shape, dtype=value.dtype, device=value.device)
            for shape, value in zip(shapes, tensors, strict=True)
        ]
        try:
            graph: fx.Graph = make_fx(run)(*empty).graph
        except Exception:  # whatever PyTorch's own code raises on shapes alone
            return None
    return None if any(each.target is target for each in graph.nodes) else graph


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the inputs of a node that are no numbers."""
    return [each for each in node.all_input_nodes if numbers(each) is each]


def numbers(arguments: Any) -> Any:
    """Return arguments with the example's number in place of each node that computes with sizes."""

    def one(node: fx.Node) -> Any:
        known = number(node.meta.get("val"))
        return known if isinstance(known, int | float) else node

    return fx.node.map_arg(arguments, one)


def _plain(arguments: Any) -> Any:
    """Return arguments with the lists and mappings of graphs as plain ones, which can be mapped over."""
    if isinstance(arguments, dict):
        return {key: _plain(value) for key, value in arguments.items()}
    if isinstance(arguments, list | tuple):
        return [_plain(value) for value in arguments]
    return arguments
