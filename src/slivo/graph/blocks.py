"""Blocks: modules that add something to what passes through them, and that a network runs without."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from slivo.graph.capture import capture, trying
from slivo.graph.infer import operator_name
from slivo.graph.inputs import ExampleInputs, fresh

_KEEPING = {
    "add", "add_", "alias", "batch_norm", "clone", "contiguous", "dropout", "dropout_", "gelu", "getitem",
    "group_norm", "layer_norm", "native_layer_norm", "relu", "relu_", "rms_norm", "silu", "silu_", "to", "_to_copy",
}  # fmt: skip
"""Operators through which a residual stream passes with its shape and its axes."""


@dataclass(frozen=True)
class Block:
    """A module whose output is its input plus something.

    Args:
        module: Its qualified name.
        argument: Which of its arguments is that input: a position, or a name.
        outputs: How many values it gives out, if they are a tuple; None if it gives out a tensor.
        index: Which of these is the sum.
    """

    module: str
    argument: int | str
    outputs: int | None = None
    index: int = 0


def blocks(model: nn.Module, example_inputs: ExampleInputs) -> list[Block]:
    """Find the blocks that a model runs without, in the order in which they run.

    A block is an entry of a `Sequential` or `ModuleList` through which a residual path leads: from its output back to
    one of its inputs by additions and operators that keep the shape. Of nested ones the innermost is meant, as the
    blocks of a stage rather than the stage; one that is called again on its own output is one block. What it takes in
    besides must not have been computed for it alone.

    Args:
        model: Any module that PyTorch can capture.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.

    Raises:
        CaptureError: If the model does not run on the inputs or cannot be captured.

    Example:
        >>> import torch
        >>> from slivo.zoo import small_cnn
        >>> [block.module for block in blocks(small_cnn(width=4), torch.zeros(2, 1, 8, 8))]
        ['stage1.3', 'stage2.3', 'stage3.3']
    """
    graph = capture(model, example_inputs).graph.graph
    inside = _inside(graph)
    found = {
        name: stream
        for name, nodes in inside.items()
        if _is_entry(model, name) and (stream := _stream(nodes)) is not None
    }
    innermost = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    return list(_called(model, example_inputs, {name: found[name] for name in innermost}))


def _inside(graph: fx.Graph) -> dict[str, set[fx.Node]]:
    """Return for each module the nodes that its calls made, those of modules in it included."""
    inside: dict[str, set[fx.Node]] = defaultdict(set)
    for node in graph.nodes:
        if node.op == "call_function":
            for name, _ in (node.meta.get("nn_module_stack") or {}).values():
                inside[str(name).split("@")[0]].add(node)
    return inside


def _is_entry(model: nn.Module, name: str) -> bool:
    parent, _, _ = name.rpartition(".")
    try:
        return isinstance(model.get_submodule(parent), nn.Sequential | nn.ModuleList) and bool(name)
    except AttributeError:  # a module that lives outside the model's tree
        return False


def _stream(nodes: set[fx.Node]) -> tuple[int, ...] | None:
    """Return the shape of the residual stream through a module; None if there is none."""
    leaving = [node for node in nodes if any(user not in nodes for user in node.users)]
    if len(leaving) != 1:
        return None
    source, added = _source(leaving[0], nodes)
    if source is None or not added:
        return None
    taken = {each for node in nodes for each in node.all_input_nodes if each not in nodes and each is not source}
    if any(each.op == "call_function" and all(user in nodes for user in each.users) for each in taken):
        return None  # something was computed for this module alone and would be left behind
    shape, value = _shape(source), _shape(leaving[0])
    return shape if shape == value else None


def _source(node: fx.Node, nodes: set[fx.Node]) -> tuple[fx.Node | None, bool]:
    """Follow the residual path back to what enters the module; also tells whether anything was added on the way."""
    paths: list[tuple[fx.Node, bool]] = [(node, False)]
    seen: set[tuple[fx.Node, bool]] = set()
    while paths:
        here, added = paths.pop()
        if here not in nodes:
            if added and here.op != "get_attr":
                return here, True
            continue
        name = operator_name(here.target)
        if name not in _KEEPING or (here, added) in seen:
            continue
        seen.add((here, added))
        sums = name in ("add", "add_") and len(here.all_input_nodes) == 2
        for each in here.all_input_nodes if sums else here.all_input_nodes[:1]:
            paths.append((each, added or sums))
    return None, False


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _called(model: nn.Module, example_inputs: ExampleInputs, found: Mapping[str, tuple[int, ...]]) -> Iterator[Block]:
    """Run the model, and yield each block with the place of the stream among its arguments and outputs."""
    calls: dict[str, Block] = {}

    def note(name: str, shape: tuple[int, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        place = next((key for key, value in given if _has(value, shape)), None)
        if place is None:
            return
        if _has(output, shape):
            calls[name] = Block(name, place)
        elif type(output) is tuple:
            index = next((number for number, value in enumerate(output) if _has(value, shape)), None)
            if index is not None:
                calls[name] = Block(name, place, len(output), index)

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, output, name=name, shape=shape: note(name, shape, args, kwargs, output),
            with_kwargs=True,
        )
        for name, shape in found.items()
    ]
    args, kwargs = fresh(example_inputs)
    try:
        with trying(model):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    yield from calls.values()


def _has(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and tuple(value.shape) == shape
