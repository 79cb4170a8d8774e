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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from slivo.errors import SlivoError
from slivo.graph.axes import Graph
from slivo.graph.capture import Capture, capture, put_tensors_
from slivo.graph.copies import keep_persistence_
from slivo.graph.decompose import numbers
from slivo.graph.dims import UNIT, Prod, Term, head, product, size_after
from slivo.graph.infer import Inference
from slivo.graph.inputs import Call, ExampleInputs, as_args
from slivo.graph.samples import is_factor
from slivo.graph.sizes import check_sizes_
from slivo.graph.slicing import Slices, cut_
from slivo.graph.sparing import compile_when_called
from slivo.graph.twins import capture_once


@dataclass(frozen=True)
class Rewrite:
    """A new integer in a graph.

    Args:
        block: Name of the block (a ``no_grad`` section, say) whose graph it is; "" for the graph itself.
        node: The node's name.
        path: Which of the node's arguments, and which entry of it if that is a list; () for what the node gives out.
        value: The new integer.
        old: What the new integer takes the place of as a factor, if the graph computes the argument from the sizes of
            its inputs; 0 if the argument is a number.
    """

    block: str
    node: str
    path: tuple[int, ...]
    value: int
    old: int = 0


@dataclass(frozen=True)
class Program:
    """How to make a cut model's program from the uncut model: capture it and rewrite integers.

    Args:
        inputs: The example inputs without their values, as `describe_inputs` returns them.
        rewrites: The new integers.
        dynamic: Whether it is captured for inputs of other sizes, too.
    """

    inputs: Any
    rewrites: tuple[Rewrite, ...]
    dynamic: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild the program from `to_json`'s data."""
        found = (Rewrite(**{**each, "path": tuple(each["path"])}) for each in data["rewrites"])
        return cls(data["inputs"], tuple(found), data["dynamic"])


def plan_rewrites(graph: Graph, keep: Mapping[str, Sequence[int]]) -> list[Rewrite]:
    """Find the integers in the graph of a traced model that change when axes are cut.

    Args:
        graph: The traced model.
        keep: For each axis to cut, by name, the positions that stay.

    Returns:
        The rewrites, in the graph's order.
    """
    return _rewrites(graph.inference, {graph.variables[name]: len(stays) for name, stays in keep.items()})


def relearn(
    captured: Capture, graph: Graph, keep: Mapping[str, Sequence[int]], names: Mapping[str, str]
) -> list[Rewrite]:
    """Find the integers that change in another graph of a traced model, or in that of a module of it.

    Args:
        captured: The other graph.
        graph: The traced model.
        keep: For each axis to cut, by name, the positions that stay.
        names: For each tensor of the other graph its name in the traced model.

    Returns:
        The rewrites.
    """
    known = {own: graph.inference.tensors.get(names[own]) for own in captured.tensors.values()}
    tensors = {own: dims for own, dims in known.items() if dims is not None}
    # Copies, because what is learned here must not change what is known of the model.
    # There is but one dimension of size 1.
    tensors, variables = copy.deepcopy((tensors, [graph.variables[axis] for axis in keep]), {id(UNIT): UNIT})
    inference = Inference(captured, tensors=tensors, boundary=False)
    inference.run()
    axes = map(head, variables)  # what was learned here may have bound them to one another
    return _rewrites(inference, {axis: len(stays) for axis, stays in zip(axes, keep.values(), strict=True)})


def _rewrites(inference: Inference, kept: Mapping[Term, int]) -> list[Rewrite]:
    """Find the integers in a graph that change.

    The graph computes with sizes as if nothing were cut: those that it reads off tensors are brought back to what they
    were, and what it computes from them is changed where an operator takes it for the size of a dimension.
    """
    blocks = {id(m.graph): name for name, m in _blocks(inference.capture.graph).items()}
    found = []
    for literal in inference.literals:
        given, new = argument(literal.node, literal.path), size_after(literal.term, kept) + literal.shift
        old = literal.term.size + literal.shift
        if numbers(given) != old or new == old:
            continue
        place = blocks[id(literal.node.graph)], literal.node.name, literal.path
        if not isinstance(given, fx.Node):
            found.append(Rewrite(*place, new))
        elif change := _change(literal.term, given.meta["val"], kept):
            found.append(Rewrite(*place, value=change[1], old=change[0]))
    for node, term in _reads(inference):
        if change := _change(term, node.meta["val"], kept):
            found.append(Rewrite(blocks[id(node.graph)], node.name, (), value=change[0], old=change[1]))
    return found


def _reads(inference: Inference) -> Iterator[tuple[fx.Node, Term]]:
    """Yield the nodes that read a symbolic size off a tensor, each with the dimension that it is."""
    for block in _blocks(inference.capture.graph).values():
        for node in block.graph.nodes:
            if node.target not in (torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default):
                continue
            dims = inference.dims.get(node.args[0])
            if isinstance(dims, tuple) and isinstance(node.meta.get("val"), torch.SymInt):
                yield node, dims[node.args[1]] if len(node.args) > 1 else product(dims)


def _change(term: Term, size: torch.SymInt, kept: Mapping[Term, int]) -> tuple[int, int] | None:
    """Return which factor of a symbolic size becomes which; None if none does, or if it is no factor for all inputs."""
    term = head(term)
    factors = term.factors if isinstance(term, Prod) else (term,)
    changed = [each for each in factors if size_after(each, kept) != each.size]
    old, new = prod(each.size for each in changed), prod(size_after(each, kept) for each in changed)
    return (old, new) if changed and is_factor(old, size) else None


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


def recapture(model: nn.Module, program: Program) -> Capture:
    """Capture a model whose place a program takes; a graph for the example's sizes alone refuses others."""
    call = imitate_call(program.inputs, model)
    if program.dynamic:
        return capture_once(model, call, program.inputs)
    captured = capture(model, call)
    check_sizes_(captured.graph)
    return captured


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
    # What is compiled below is not compiled as it is copied, too.
    with warnings.catch_warnings(), patch.object(fx.GraphModule, "recompile", compile_when_called):
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
        if each.path:
            value = _scaled(argument(node, each.path), each, node) if each.old else each.value
            node.args = _replaced(node.args, each.path, value)
        else:
            size = _scaled(node, each, node.next)
            node.replace_all_uses_with(size, delete_user_cb=lambda user, own=size.args[0]: user is not own)
    for block in blocks.values():
        block.recompile()
    return new


def _scaled(size: fx.Node, rewrite: Rewrite, before: fx.Node) -> fx.Node:
    with before.graph.inserting_before(before):
        rest = before.graph.call_function(operator.floordiv, (size, rewrite.old))
        return before.graph.call_function(operator.mul, (rest, rewrite.value))


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


def imitate_call(described: Any, model: nn.Module) -> Call:
    """Return inputs of the described dtypes and shapes, all zeros, where a model is; inverts `describe_inputs`."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))

    def one(value: Any) -> Any:
        if isinstance(value, Mapping) and "tensor" in value:
            return torch.zeros(value["shape"], dtype=getattr(torch, value["tensor"]), device=device)
        if isinstance(value, Mapping):
            return {key: one(each) for key, each in value["mapping"].items()}
        return tuple(map(one, value)) if isinstance(value, list) else value

    args, kwargs = described
    return Call(tuple(map(one, args)), {key: one(value) for key, value in kwargs.items()})


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors in a model's output, whatever holds them."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
