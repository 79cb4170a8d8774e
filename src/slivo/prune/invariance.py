"""Invariance: of which axes positions that are zero can be cut without a trace, and of which they cannot, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from slivo.graph import Graph
from slivo.graph.dims import Term, Var, leaves
from slivo.graph.infer import Dims, Inference, module_of, operator_name

_PICKING = {"chunk", "getitem", "index_select", "narrow", "select", "slice", "split", "split_with_sizes", "unbind"}
"""Operators that hand on a part of an axis and leave the rest to others."""

_ALONG = {"softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "argsort", "sort", "topk"}
"""Operators in which the positions of one dimension see one another, although the dimension stays."""

_WHOLE = {"_weight_norm", "_weight_norm_interface", "cosine_similarity", "group_norm", "renorm"}
"""Operators that divide by norms or statistics in which a position of any of their axes may count."""


def counted(graph: Graph) -> dict[str, str]:
    """Return the axes of which even positions that are zero count, with the operator in which they do.

    If everything that belongs to a position is zero (what writes it: weights, biases, scales and shifts of norms; and
    what reads it), it adds nothing to any sum, and can be cut without a trace. Not so where an operator goes by the
    number of positions or looks at all of them: a layer norm divides by it, a softmax gives to zeros too, and products
    of two activations, as of queries and keys, are scaled by the root of it.

    Args:
        graph: The traced model.

    Returns:
        Names of prunable axes, each with the operator and the module that it stands in. An axis is listed if in doubt.

    Source: Chen et al. 2021, "Only Train Once", arXiv:2107.07467, section 3.1, calls positions that can go without a
    trace zero-invariant groups, and lists the layers for which they are; here the graph tells.

    Example:
        >>> import slivo, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 6))
        >>> net.extend([torch.nn.ReLU(), torch.nn.Linear(6, 2)])
        Sequential(...)
        >>> counted(slivo.trace(net, torch.randn(3, 4)))
        {'0 out': 'layer_norm in 1'}
    """
    names = {graph.variables[axis.name]: axis.name for axis in graph.prunable}
    found: dict[str, str] = {}
    held = _constants(graph.inference)
    for node in graph.inference.dims:
        for axis in _counting(node, graph.inference, held):
            if axis in names:
                module = module_of(node)
                found.setdefault(names[axis], operator_name(node.target) + (f" in {module}" if module else ""))
    return found


def _constants(inference: Inference) -> set[fx.Node]:
    """Return the nodes that hold parameters and buffers, or what is computed from these alone."""
    held: set[fx.Node] = set()
    for node in inference.dims:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and inputs and all(each in held for each in inputs)):
            held.add(node)
    return held


def _counting(node: fx.Node, inference: Inference, held: set[fx.Node]) -> Iterator[Var]:
    """Yield the axes whose positions count in an operator."""
    name = operator_name(node.target)
    if node.op != "call_function" or name in _PICKING:
        return
    inputs = {each: {*_leaves(inference.dims.get(each))} for each in node.all_input_nodes}
    first = inference.of(node.args[0]) if node.args else ()
    if name in _WHOLE:
        yield from set[Var]().union(*inputs.values())
    elif name in ("layer_norm", "rms_norm"):
        yield from _leaves(first[-len(node.args[1]) :])  # type: ignore[arg-type]
    elif name in _ALONG:
        yield from _leaves(_along(node, first))
    elif "scaled_dot_product" in name:
        yield from _leaves(first[-1:])
    # What is lost is summed up, or worse. It does no harm if a weight is what it is multiplied with.
    for axis in set[Var]().union(*inputs.values()) - {*_leaves(inference.dims[node])}:
        carrying = [each for each, axes in inputs.items() if axis in axes]
        if len(carrying) < 2 or not any(each in held for each in carrying):
            yield axis


def _along(node: fx.Node, first: Dims) -> Dims:
    """Return the dimension along which an operator runs, or all if that is not said."""
    given = [node.kwargs["dim"]] if "dim" in node.kwargs else [each for each in node.args[1:] if type(each) is int]
    return first[given[-1] :][:1] if given and isinstance(given[-1], int) else first


def _leaves(dims: Any) -> Iterator[Var]:
    """Yield the axes of a term, of dimensions, or of those of several outputs."""
    if isinstance(dims, list | tuple):
        for each in dims:
            yield from _leaves(each)
    elif dims is not None:
        term: Term = dims
        yield from leaves(term)
