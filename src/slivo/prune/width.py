"""Width pruning: cut channels, heads and hidden units out of a model, wherever they occur."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from slivo import edits
from slivo.errors import ShapeError, SlivoError
from slivo.graph import Axis, Graph, plan_slices, settle, trace
from slivo.graph.capture import check_repeats
from slivo.graph.checks import check_values
from slivo.graph.config import plan_config
from slivo.graph.inputs import Call, ExampleInputs, fresh
from slivo.graph.twins import sharing
from slivo.measure import Timer, clock
from slivo.measure.budget import Budget, check_budget
from slivo.options import MinWidth, check_widths, listed, matches, places
from slivo.prune import criteria
from slivo.prune.budget import allocate
from slivo.prune.importance import importance
from slivo.prune.latency import Kept, fit
from slivo.prune.plans import Plan
from slivo.prune.ranks import Scope
from slivo.prune.runs import Loss


def prune(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    keep: Budget,
    criterion: str | criteria.Criterion = "l2",
    scope: Scope = "global",
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    now: Sequence[str] = (),
    free: Sequence[str] = (),
    min_width: MinWidth = 0.1,
    round_to: int = 1,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    timer: Timer | None = None,
) -> nn.Module:
    """Return a smaller model: the least important channels, heads and units are cut out for good.

    Args:
        model: The trained model; it is left untouched.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        keep: What may stay, in MACs, parameters or bytes, hit within 1 % wherever single positions are that small; or
            of the latency, hit within 5 % as measured (`slivo.prune.latency.fit` says what is guaranteed).
        criterion: Name of a criterion (`slivo.prune.criteria.names`) or one of your own.
        scope: ``global`` (all positions compete), ``uniform`` (the same share of every axis) or ``isomorphic``
            (positions compete with those of axes that are alike).
        only: Globs over axis names and module paths; if given, only axes that a matching module writes are cut.
        exclude: Globs over axis names and module paths; axes in which a matching module takes part are not cut.
        now: Globs as ``only``, to cut one part of the network after the other: the budget is planned over all axes
            that ``only`` and ``exclude`` leave, but only those that match are cut by this call.
        free: Globs over outputs whose sizes may change, as in `slivo.trace`: features of a backbone, say.
        min_width: Least size of an axis that is cut: a share, or a count (an int); or a mapping of globs over axis
            names and module paths to these, ``{"layer1.*": 0.5, "*": 0.1}``, of which the first that matches decides.
        round_to: Sizes that change become multiples of this.
        batches: For criteria that need data: what ``loss`` is called with; without a loss, inputs as
            ``example_inputs``, or pairs ``(inputs, labels)`` for criteria of the label.
        loss: For criteria of the gradient: ``loss(model, batch)``, a scalar.
        timer: For a budget of latency: returns the milliseconds of one call of a model, on whatever machine or
            runtime. None times PyTorch on the example inputs, ``slivo.measure.clock(example_inputs)``.

    Returns:
        A new model that carries the edit (`slivo.edits.record`), ready for `slivo.save` or for more training.

    Raises:
        CaptureError: If the model does not run on the inputs or cannot be captured.
        TargetError: If the budget cannot be met.
        SlivoError: If a glob matches nothing, or nothing may be cut.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> small = prune(net, torch.randn(2, 8), keep=Budget(macs=0.5))
        >>> small[0].out_features, net[0].out_features
        (16, 32)
    """
    check_budget(keep)
    check_widths(min_width, round_to)
    graph = trace(model, example_inputs, free=free)
    found = plan(
        model, example_inputs, keep=keep, criterion=criterion, scope=scope, only=only, exclude=exclude, now=now,
        min_width=min_width, round_to=round_to, batches=batches, loss=loss, timer=timer, graph=graph,
    )  # fmt: skip
    return cut(model, example_inputs, found, graph=graph)


def plan(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    keep: Budget,
    criterion: str | criteria.Criterion = "l2",
    scope: Scope = "global",
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    now: Sequence[str] = (),
    free: Sequence[str] = (),
    min_width: MinWidth = 0.1,
    round_to: int = 1,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    timer: Timer | None = None,
    graph: Graph | None = None,
) -> Plan:
    """Choose what `prune` would cut, and cut nothing: to look at, to write to a file, to change by hand.

    Arguments and errors are those of `prune`; ``graph``, if there is one, is what `slivo.trace` said of the model.

    Returns:
        What is kept of every axis that may be cut, for `cut`.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> found = plan(net, torch.randn(2, 8), keep=Budget(macs=0.5))
        >>> {name: len(kept) for name, kept in found.keep.items()}
        {'0 out': 16}
        >>> cut(net, torch.randn(2, 8), found)[0].out_features
        16
    """
    check_budget(keep)
    check_widths(min_width, round_to)
    graph = graph or trace(model, example_inputs, free=free)
    axes = candidates(graph, keep, only=only, exclude=exclude)
    scores = importance(model, graph, axes, criteria.resolve(criterion), batches=batches, loss=loss)
    if keep.timed:

        def small(kept: Kept) -> nn.Module:
            return cut(model, example_inputs, Plan.of([graph[name] for name in kept], kept), graph=graph)

        kept = fit(
            graph, scores, keep, model, small, timer or clock(example_inputs), scope=scope, min_width=min_width,
            round_to=round_to,
        )  # fmt: skip
    else:
        kept = allocate(graph, scores, keep, scope=scope, min_width=min_width, round_to=round_to)
    if now:
        kept = _part(graph, kept, {axis.name for axis in select(graph, only=now)})
    return Plan.of(axes, kept)


def cut(
    model: nn.Module,
    example_inputs: ExampleInputs,
    plan: Plan,
    *,
    free: Sequence[str] = (),
    graph: Graph | None = None,
) -> nn.Module:
    """Return a smaller model, cut by a plan.

    Args:
        model: The model the plan was made for, or one with the same axes; left untouched.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        plan: What stays; from `plan`, or `Plan.read`.
        free: As for `prune`.
        graph: What `slivo.trace` said of the model; traced here if None.

    Returns:
        A new model that carries the edit, as from `prune`.

    Raises:
        CaptureError: If the model does not run on the inputs or cannot be captured.
        ShapeError: If the model has not the plan's axes, or they may not be cut so.
    """
    if not isinstance(plan, Plan):
        raise SlivoError(
            f"the plan is of type {type(plan).__name__}; give what plan(…), Plan(…) or Plan.read(…) returned"
        )
    graph = graph or trace(model, example_inputs, free=free)
    check_values(model)
    kept = plan.fit(graph)
    slices = plan_slices(graph, kept)
    with sharing():
        try:
            attributes, programs = settle(model, graph, Call(*fresh(example_inputs)), kept)
        except ShapeError:
            check_repeats(model, example_inputs)  # what the model itself cannot do is no fault of the cut
            raise
        edit = edits.Cut(slices, attributes, kept, programs)
        small = edits.apply(model, edit)
        config = plan_config(model, small)
        return edits.apply(model, replace(edit, config=config)) if config else small


def candidates(graph: Graph, keep: Budget, *, only: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Axis]:
    """Return the axes to cut to a budget, of those that globs leave (`select`).

    Fewer experts make no sample cheaper: they go if parameters or bytes have to, or on request.
    """
    axes = select(graph, only=only, exclude=exclude)
    return [axis for axis in axes if not axis.routed or keep.params is not None or keep.bytes is not None or only]


def select(graph: Graph, *, only: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Axis]:
    """Return the prunable axes that globs leave.

    Args:
        graph: The traced model.
        only: Globs over axis names and module paths; none means all.
        exclude: Globs over axis names and module paths.

    Raises:
        SlivoError: If a glob matches no axis and no module with weights, or no axis is left.
    """
    only, exclude = listed(only, "only"), listed(exclude, "exclude")
    for glob in (*only, *exclude):
        if not any(matches(glob, places(axis, readers=True)) for axis in graph.axes):
            modules = sorted({name.rpartition(".")[0] for name in graph.parameters})
            raise SlivoError(f"{glob!r} matches no axis and no module; there are {', '.join(modules[:8])} …")
    left = [
        axis
        for axis in graph.prunable
        if (not only or any(matches(glob, places(axis, readers=False)) for glob in only))
        and not any(matches(glob, places(axis, readers=True)) for glob in exclude)
    ]
    if not left:
        raise SlivoError(_none_left(graph, only, exclude))
    return left


def _none_left(graph: Graph, only: Sequence[str], exclude: Sequence[str]) -> str:
    """Say why no axis may be cut: because of the model, or of the globs."""
    free = [axis.name for axis in graph.prunable]
    if free:
        globs = " and ".join(f"{what}={list(g)}" for what, g in (("only", only), ("exclude", exclude)) if g)
        return f"{globs} leave no axis that may be cut; without them there are {', '.join(map(repr, free[:8]))}"
    reasons = sorted({axis.fixed for axis in graph.axes if axis.fixed})
    nothing = "no weight of it is used on these inputs" if graph.params else "it has no weights"
    return f"no axis of the model may be cut: {'; '.join(reasons[:3]) or nothing}"


def _part(graph: Graph, kept: dict[str, list[int]], names: set[str]) -> dict[str, list[int]]:
    """Return what is kept of some axes, and of those that must keep equal sizes with them."""
    tied = {name for tie in graph.ties if names & set(tie) for name in tie}
    return {name: positions for name, positions in kept.items() if name in names | tied}
