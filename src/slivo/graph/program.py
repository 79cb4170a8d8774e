"""Programs: the captured graph itself, cut and with the sizes in its code rewritten.

What a cut model must compute is known without its Python code: the captured graph with the slices cut out of its
tensors and the new sizes put where the old ones stood. The live model is compared with it (`slivo.graph.repair`).
Where the Python code holds a size that cannot be mended, such as a number in ``forward``, the program takes the model's
place.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from slivo.errors import SlivoError
from slivo.graph.axes import Graph
from slivo.graph.capture import Capture
from slivo.graph.dims import Var, leaves, size_after
from slivo.graph.inputs import ExampleInputs, as_args
from slivo.graph.surgery import Slices, perform_


@dataclass(frozen=True)
class Rewrite:
    """A new integer in a graph.

    Args:
        block: Name of the block (a ``no_grad`` section, say) whose graph it is; "" for the graph itself.
        node: The node's name.
        path: Which of the node's arguments, and which entry of it if that is a list.
        value: The new integer; that of one sample if there is a batch.
        batch: The input by the size of whose first dimension the value is to be multiplied, or "".
    """

    block: str
    node: str
    path: tuple[int, ...]
    value: int
    batch: str = ""


@dataclass(frozen=True)
class Program:
    """How to make a cut model's program from the uncut model: capture it and rewrite integers.

    Args:
        inputs: The example inputs without their values, as `describe_inputs` returns them.
        rewrites: The new integers.
    """

    inputs: Any
    rewrites: tuple[Rewrite, ...]


def plan_rewrites(graph: Graph, keep: Mapping[str, Sequence[int]], *, any_batch: bool) -> list[Rewrite]:
    """Find the integers in the captured graph that change when axes are cut.

    Args:
        graph: The traced model.
        keep: For each axis to cut, by name, the positions that stay.
        any_batch: Whether integers that hold the size of the batch are rewritten too, so that the program takes any.

    Returns:
        The rewrites, in the graph's order.
    """
    kept: dict[Var, int] = {graph.variables[name]: len(stays) for name, stays in keep.items()}
    batches = _batches(graph) if any_batch else {}
    blocks = {id(m.graph): name for name, m in _blocks(graph.inference.capture.graph).items()}
    found = []
    for literal in graph.inference.literals:
        old, new = argument(literal.node, literal.path), size_after(literal.term, kept)
        if not isinstance(old, int) or old != literal.term.size:
            continue
        block = blocks[id(literal.node.graph)]
        own = [leaf for leaf in leaves(literal.term) if leaf in batches] if not block else []
        if len(own) == 1:
            found.append(Rewrite(block, literal.node.name, literal.path, new // own[0].size, batches[own[0]]))
        elif new != old:
            found.append(Rewrite(block, literal.node.name, literal.path, new))
    return found


def _batches(graph: Graph) -> dict[Var, str]:
    """Map the first dimension of each input to the input's name."""
    dims = graph.inference.dims
    found: dict[Var, str] = {}
    for node in graph.inference.capture.graph.graph.nodes:
        if node.op == "placeholder" and isinstance(dims[node], tuple):
            for leaf in leaves(dims[node][0]) if dims[node] else ():
                found.setdefault(leaf, node.name)
    return found


def _blocks(module: fx.GraphModule) -> dict[str, fx.GraphModule]:
    return {name: each for name, each in module.named_modules() if isinstance(each, fx.GraphModule)}


def argument(node: fx.Node, path: Sequence[int]) -> Any:
    """Return one of a node's arguments, or an entry of it; None where there is none (it was left to its default)."""
    found: Any = node.args
    for index in path:
        if not isinstance(found, list | tuple) or index >= len(found):
            return None
        found = found[index]
    return found


def build(capture: Capture, slices: Slices, rewrites: Iterable[Rewrite]) -> fx.GraphModule:
    """Return a copy of a captured graph with slices cut out and integers rewritten.

    Args:
        capture: The captured model; it is left as it was.
        slices: What stays of which tensor, by the model's names.
        rewrites: The new integers.

    Returns:
        A module that is called as the model is, and shares the parameters that are not cut. It evaluates: dropout and
        the updating of batch statistics, which the capture left out, do not come back in training mode.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the copy of PyTorch's own tree specifications warns
        new = copy.deepcopy(capture.graph, {id(each): each for each in capture.graph.parameters()})
    own = {capture.tensors[node.name]: str(node.target) for node in new.graph.nodes if node.name in capture.tensors}
    perform_(new, {own[name]: dims for name, dims in slices.items() if name in own}, {})
    blocks = _blocks(new)
    nodes = {(name, node.name): node for name, block in blocks.items() for node in block.graph.nodes}
    for each in rewrites:
        node = nodes[each.block, each.node]
        value = _scaled(node, each.value, nodes["", each.batch]) if each.batch else each.value
        node.args = _replaced(node.args, each.path, value)
    for block in blocks.values():
        block.recompile()
    return new


def _scaled(node: fx.Node, value: int, given: fx.Node) -> fx.Node:
    with node.graph.inserting_before(node):
        size = node.graph.call_function(torch.ops.aten.sym_size.int, (given, 0))
        return size if value == 1 else node.graph.call_function(operator.mul, (size, value))


def _replaced(args: Any, path: Sequence[int], value: Any) -> Any:
    entries = list(args)
    entries[path[0]] = _replaced(entries[path[0]], path[1:], value) if len(path) > 1 else value
    return tuple(entries) if isinstance(args, tuple) else entries


def describe_inputs(example_inputs: ExampleInputs) -> Any:
    """Return example inputs as JSON-ready data: the dtypes and shapes of tensors, and plain values as they are.

    Raises:
        SlivoError: If there is anything else among the inputs.

    Example:
        >>> describe_inputs((torch.zeros(2, 3), True))
        [[{'tensor': 'float32', 'shape': [2, 3]}, True], {}]
    """

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        if isinstance(value, Mapping):
            return {"mapping": {str(key): one(each) for key, each in value.items()}}
        if isinstance(value, list | tuple):
            return [one(each) for each in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise SlivoError(f"an example input of type {type(value).__name__} cannot be stored; give tensors and numbers")

    args, kwargs = as_args(example_inputs)
    return [[one(value) for value in args], {key: one(value) for key, value in kwargs.items()}]


def imitate_inputs(described: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return inputs of the described dtypes and shapes, all zeros; the inverse of `describe_inputs`."""

    def one(value: Any) -> Any:
        if isinstance(value, Mapping) and "tensor" in value:
            return torch.zeros(value["shape"], dtype=getattr(torch, value["tensor"]), device=device)
        if isinstance(value, Mapping):
            return {key: one(each) for key, each in value["mapping"].items()}
        return tuple(map(one, value)) if isinstance(value, list) else value

    args, kwargs = described
    return tuple(map(one, args)), {key: one(value) for key, value in kwargs.items()}


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors in a model's output, whatever holds them."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
