"""Parts: modules whose code cannot be cut, each replaced by its own captured graph, so that the rest stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx, nn

from slivo.errors import SlivoError
from slivo.graph.axes import Graph
from slivo.graph.capture import Capture, canonical_names
from slivo.graph.inputs import Call
from slivo.graph.program import Program, build, describe_inputs, imitate_call, relearn
from slivo.graph.twins import capture_once


def plan_part(
    model: nn.Module, graph: Graph, keep: Mapping[str, Sequence[int]], name: str, call: Call
) -> tuple[Capture, Program] | None:
    """Find out how a module of a model computes once axes are cut.

    Args:
        model: The model that was traced, uncut.
        graph: Its graph.
        keep: For each axis to cut, by name, the positions that stay.
        name: The module.
        call: What the model calls it with.

    Returns:
        The captured graph of the module or of one that is alike, and how it is to be rewritten; None if it cannot be
        captured on its own.
    """
    module = model.get_submodule(name)
    try:
        # As it is captured when the cut is made, when all that is known of its inputs is what they look like.
        inputs = describe_inputs(call)
        captured = capture_once(module, imitate_call(inputs, module), inputs)
    except SlivoError:
        return None
    names = canonical_names(model)
    own = {each: names[f"{name}.{each}"] for each in captured.tensors.values()}
    return captured, Program(inputs, tuple(relearn(captured, graph, keep, own)))


def replace_(model: nn.Module, name: str, found: Program) -> None:
    """Put a module's program in its place; its tensors keep their names and are not cut yet."""
    module = model.get_submodule(name)
    captured = capture_once(module, imitate_call(found.inputs, module), found.inputs)
    put_(model, name, build(captured, {}, found.rewrites, module))


def put_(model: nn.Module, name: str, graph: fx.GraphModule) -> None:
    """Put a graph in a module's place, in the mode that the module is in."""
    training = model.get_submodule(name).training
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, graph.train(training))
