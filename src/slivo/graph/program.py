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
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from slivo.errors import SlivoError
from slivo.graph.axes import Graph
from slivo.graph.capture import Capture, put_tensors_
from slivo.graph.copies import keep_persistence_
from slivo.graph.dims import Prod, Var, head, size_after
from slivo.graph.infer import Inference
from slivo.graph.inputs import ExampleInputs, as_args
from slivo.graph.slicing import Slices, cut_


@dataclass(frozen=True)
class Rewrite:
    """A new integer in a graph.

    Args:
        block: Name of the block (a ``no_grad`` section, say) whose graph it is; "" for the graph itself.
        node: The node's name.
        path: Which of the node's arguments, and which entry of it if that is a list.
        value: The new integer; what is multiplied with the size of an input if there is one. Of several rewrites of
            one integer the later multiply what the earlier made.
        batch: The input by the size of one of whose dimensions the value is to be multiplied, or "".
        dim: Which of its dimensions, the first if it is the batch.
    """

    block: str
    node: str
    path: tuple[int, ...]
    value: int
    batch: str = ""
    dim: int = 0


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
    return rewrites(graph.inference, kept, inputs_of(graph.inference, dims=1) if any_batch else {})


def rewrites(inference: Inference, kept: dict[Var, int], inputs: Mapping[Var, tuple[str, int]]) -> list[Rewrite]:
    """Find the integers in a captured graph that change.

    Args:
        inference: What is known of the graph.
        kept: The new sizes of axes.
        inputs: Axes whose sizes are read off an input when the program runs: its name and dimension.

    Returns:
        The rewrites, in the graph's order.
    """
    blocks = {id(m.graph): name for name, m in _blocks(inference.capture.graph).items()}
    found = []
    for literal in inference.literals:
        old, new = argument(literal.node, literal.path), size_after(literal.term, kept) + literal.shift
        if not isinstance(old, int) or old != literal.term.size + literal.shift:
            continue
        block = blocks[id(literal.node.graph)]
        term = head(literal.term)
        factors = [head(each) for each in term.factors] if isinstance(term, Prod) else [term]
        own = [each for each in factors if isinstance(each, Var) and each in inputs] if not block else []
        if own:
            times = new // prod(kept.get(each, each.size) for each in own)
            for each in own:
                found.append(Rewrite(block, literal.node.name, literal.path, times, *inputs[each]))
                times = 1
        elif new != old:
            found.append(Rewrite(block, literal.node.name, literal.path, new))
    return found


def inputs_of(inference: Inference, *, dims: int | None = None) -> dict[Var, tuple[str, int]]:
    """Map the dimensions of inputs (of each the first few) to the input's name and which of its dimensions it is."""
    found: dict[Var, tuple[str, int]] = {}
    for node in inference.capture.graph.graph.nodes:
        if node.op == "placeholder" and isinstance(inference.dims[node], tuple):
            for dim, term in enumerate(map(head, inference.dims[node][:dims])):
                if isinstance(term, Var):
                    found.setdefault(term, (node.name, dim))
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


def build(
    capture: Capture, slices: Slices, changes: Iterable[Rewrite], owner: nn.Module | None = None
) -> fx.GraphModule:
    """Return a copy of a captured graph with slices cut out and integers rewritten.

    Args:
        capture: The captured model; it is left as it was.
        slices: What stays of which tensor, by the model's names.
        changes: The new integers.
        owner: Whose tensors the copy takes, of the captured model's names and shapes; None for the captured model's.

    Returns:
        A module that is called as the model is, and shares the parameters that are not cut. It evaluates: dropout and
        the updating of batch statistics, which the capture left out, do not come back in training mode.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the copy of PyTorch's own tree specifications warns
        new = copy.deepcopy(capture.graph, {id(each): each for each in capture.graph.parameters()})
    keep_persistence_(new, capture.graph)
    if owner is not None:
        put_tensors_(new, owner)
    own = {capture.tensors[node.name]: str(node.target) for node in new.graph.nodes if node.name in capture.tensors}
    cut_(new, {own[name]: dims for name, dims in slices.items() if name in own})
    blocks = _blocks(new)
    nodes = {(name, node.name): node for name, block in blocks.items() for node in block.graph.nodes}
    for each in changes:
        node = nodes[each.block, each.node]
        value = _scaled(node, each, nodes["", each.batch]) if each.batch else each.value
        node.args = _replaced(node.args, each.path, value)
    for block in blocks.values():
        block.recompile()
    return new


def _scaled(node: fx.Node, rewrite: Rewrite, given: fx.Node) -> fx.Node:
    before = argument(node, rewrite.path)
    with node.graph.inserting_before(node):
        size = node.graph.call_function(torch.ops.aten.sym_size.int, (given, rewrite.dim))
        for times in (rewrite.value, before if isinstance(before, fx.Node) else 1):
            size = size if times == 1 else node.graph.call_function(operator.mul, (size, times))
        return size


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
