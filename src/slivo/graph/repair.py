"""Repair: find the integers in a model's Python objects that a cut makes wrong, and prove the cut by running it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from slivo.errors import ShapeError, SlivoError
from slivo.graph.axes import Graph
from slivo.graph.capture import canonical_names, check_runs, evaluating
from slivo.graph.copies import duplicate
from slivo.graph.inputs import Call, ExampleInputs, as_args, fresh
from slivo.graph.mend import changed, mend_
from slivo.graph.parts import plan_part
from slivo.graph.program import (
    Program,
    build,
    describe_inputs,
    plan_rewrites,
    recapture,
    relearn,
    tensors_of,
)
from slivo.graph.search import Trial
from slivo.graph.sparing import collecting_rarely
from slivo.graph.surgery import perform_, plan_attributes, plan_slices
from slivo.graph.survey import Survey, survey

_log = logging.getLogger("slivo")


@collecting_rarely()
def settle(
    model: nn.Module, graph: Graph, example_inputs: ExampleInputs, keep: Mapping[str, Sequence[int]]
) -> tuple[dict[str, dict[str, Any]], dict[str, Program]]:
    """Find out how a cut is to be made so that the cut model computes what it must.

    The cut model is run on the example inputs and compared with the cut graph. If they differ, attributes of the
    modules whose code made the sizes that changed are tried, the innermost modules first.

    Args:
        model: The model that was traced, uncut; left untouched.
        graph: Its graph.
        example_inputs: What it was traced with.
        keep: For each axis to cut, by name, the positions that stay.

    Returns:
        The attributes to set, and the programs that have to take the places of modules whose code holds sizes that
        cannot be mended; of the model itself ("") if it is not enough to replace modules in it. A warning is logged
        then.

    Raises:
        CaptureError: If the model itself fails on the inputs.
        ShapeError: If neither runs; the model is then not to be cut so.
    """
    slices = plan_slices(graph, keep)
    attributes = plan_attributes(model, graph, keep)
    args, kwargs = as_args(example_inputs)
    expected = _run(build(graph.inference.capture, slices, plan_rewrites(graph, keep)), args, kwargs)
    live = duplicate(model, share=True)  # a cut makes parameters anew
    perform_(live, slices, attributes)
    if isinstance(expected, Exception):
        check_runs(model, example_inputs)
        # The graph's own sizes are not all known; the live model may know better.
        found = _run(live, args, kwargs)
        if isinstance(found, Exception):
            raise ShapeError(f"the cut model does not run: {found}") from found
        return attributes, {}
    seen = functools.cache(lambda: survey(model, Call(args, kwargs)))
    mended = mend_(
        live,
        graph,
        keep,
        Trial(lambda changed: _run(changed, args, kwargs), lambda found: _agree(found, expected), seen),
        _parts(model, graph, keep, seen),
    )
    if mended is not None:
        settings, programs = mended
        for module, attribute, value in settings:
            attributes.setdefault(module, {})[attribute] = value
        return attributes, programs
    program = _whole(
        model, graph, keep, describe_inputs(example_inputs), lambda cut: _agree(_run(cut, args, kwargs), expected)
    )
    _warn(model, graph, keep)
    return {}, {"": program}


def _whole(
    model: nn.Module,
    graph: Graph,
    keep: Mapping[str, Sequence[int]],
    inputs: Any,
    right: Callable[[nn.Module], bool],
) -> Program:
    """Return the program that takes the model's place, made as it will be made again.

    Raises:
        ShapeError: If none does what it must.
    """
    slices = plan_slices(graph, keep)
    for dynamic in (True, False):
        program = Program(inputs, (), dynamic)
        try:
            captured = recapture(model, program)
            own = {each: each for each in captured.tensors.values()}
            program = replace(program, rewrites=tuple(relearn(captured, graph, keep, own)))
            if right(build(captured, slices, program.rewrites, model)):
                return program
        except SlivoError:
            continue
    raise ShapeError(
        f"{type(model).__name__} cannot be cut so: its code holds sizes that cannot be mended, and its captured graph, "
        "captured again, computes something else"
    )


def _warn(model: nn.Module, graph: Graph, keep: Mapping[str, Sequence[int]]) -> None:
    places = sorted({each.module or type(model).__name__ for each, _ in changed(graph, keep)})
    _log.warning(
        "the code of %s holds sizes that cannot be mended (a number in forward?): the cut model is the captured graph "
        "instead of the module; it runs and trains, with batch statistics frozen",
        ", ".join(places) or type(model).__name__,
    )


def _parts(
    model: nn.Module,
    graph: Graph,
    keep: Mapping[str, Sequence[int]],
    seen: Callable[[], Survey],
) -> Callable[[str], tuple[Program, fx.GraphModule] | None]:
    """Return what makes of a module's name the module's own graph, cut."""
    slices, names = plan_slices(graph, keep), canonical_names(model)

    def part(name: str) -> tuple[Program, fx.GraphModule] | None:
        found = plan_part(model, graph, keep, name, seen().calls[name]) if name in seen().calls else None
        if found is None:
            return None
        captured, program = found
        own = {each: slices.get(names[f"{name}.{each}"], {}) for each in captured.tensors.values()}
        return program, build(captured, own, program.rewrites, model.get_submodule(name))

    return part


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor] | Exception:
    """Run a model in evaluation; return the tensors it gives out, or the exception it raises."""
    try:
        args, kwargs = fresh(Call(args, dict(kwargs)))  # the model may change them
        with evaluating(model), torch.no_grad():
            return tensors_of(model(*args, **kwargs))
    except Exception as error:
        return error


def _agree(found: Sequence[Tensor] | Exception, expected: Sequence[Tensor]) -> bool:
    """Tell whether outputs are the same up to the rounding of their dtype."""
    if isinstance(found, Exception) or len(found) != len(expected):
        return False
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if not one.is_floating_point():
            # Indices may flip where values tie; what they index is compared.
            continue
        scale = float(other.double().nan_to_num(0, 0, 0).abs().max()) if other.numel() else 0.0
        near = torch.finfo(one.dtype).eps ** 0.5
        if not torch.allclose(one.double(), other.double(), rtol=near, atol=near * max(scale, 1e-30), equal_nan=True):
            return False
    return True
