"""The stages that prune: cuts to a goal, at once, under pressure beforehand, or as far as validation allows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from glob import escape
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from slivo import edits
from slivo.errors import SlivoError
from slivo.graph import Graph, trace
from slivo.graph.copies import duplicate
from slivo.measure import clock, quality
from slivo.measure.latency import Timer, compare
from slivo.prune import Budget, Plan, cut, iterate, plan, pressure, prune, refit, select
from slivo.prune.invariance import counted
from slivo.recipe.plan import Goal, Piece, Step
from slivo.recipe.schema import Pressure, Prune
from slivo.recipe.work import Costs, Details, Outcome, Work, data, distilled, fitted, sample_inputs
from slivo.tasks import Task
from slivo.train import Hook

PLANNED = ("greg", "hspg")
"""Pressures that are told what will go."""

_log = logging.getLogger("slivo")


def run_prune(work: Work, step: Step) -> Outcome:
    """Cut the student to the step's goal."""
    part = step.part
    assert isinstance(part, Prune)
    assert step.goal is not None
    details: Details = {"criterion": part.criterion, "scope": part.scope}
    if part.controlled is not None:
        return _controlled(work, step, part, details)
    keep, parts = budget(step.goal, work.whole, work.pace), _globs(work, step, part)
    options = {**_options(work, part), **parts, "keep": keep}
    timer = options["timer"] = timer_of(work.task) if keep.timed else None
    whole, history, found = work.student, list[dict[str, Any]](), None
    if part.pressure is not None:
        whole, history, found = _pressed(work, step, part.pressure, options, details)
    if found is None:
        student = prune(whole, work.task.example_inputs, **options)
    else:
        student = cut(whole, work.task.example_inputs, found)
    student = _refitted(work, part, student, whole)
    details |= _told(part, student)
    if timer is not None:
        details["latency"] = round(compare(timer, work.student, student).share, 4)
    if step.piece is not None:
        details["cut"] = parts["now"]
    return Outcome(student, details, history)


def timer_of(task: Task) -> Timer:
    """Return what times networks at batch 1."""
    return clock(tuple(_first(value) for value in task.example_inputs))


def _options(work: Work, part: Prune) -> Details:
    """Return what `slivo.prune` is called with, whatever the goal."""
    return {
        "criterion": part.criterion,
        "scope": part.scope,
        "only": list(part.only),
        "exclude": list(part.exclude),
        "min_width": part.min_width,
        "round_to": part.round_to,
        **data(work, part),
    }


def _globs(work: Work, step: Step, part: Prune) -> Details:
    """Return which axes are planned for, and which are cut, if the network is cut part by part."""
    if step.piece is None:
        return {"now": []}
    pieces = parted(step.piece, work.student, work.task, part.exclude)
    now = pieces[step.piece.index]
    return {"now": now, "only": [glob for piece in pieces[step.piece.index :] for glob in piece]}


def _refitted(work: Work, part: Prune, small: nn.Module, whole: nn.Module) -> nn.Module:
    if not part.refit:
        return small
    return refit(small, whole, sample_inputs(work, part.samples))


def _told(part: Prune, student: nn.Module) -> Details:
    """Return what is worth telling of the last cut."""
    last = edits.record(student)[-1:]
    axes = len(last[0].axes) if last and isinstance(last[0], edits.Cut) else 0
    return {"axes": axes, **({"refit": True} if part.refit else {})}


def _pressed(
    work: Work, step: Step, part: Pressure, options: Details, details: Details
) -> tuple[nn.Module, list[dict[str, Any]], Plan | None]:
    """Train a copy of the student under pressure; return it, the rows of its training, and the plan if there is one."""
    inputs, student = work.task.example_inputs, duplicate(work.student)
    graph = trace(student, inputs)
    found = None
    if part.kind == "hspg":
        options = _vanishing(graph, options)
    if part.kind in PLANNED:
        found = plan(student, inputs, graph=graph, **options)
    hook = _hook(part, graph, found, options)
    history = fitted(work, step, student, part, scratch=False, more=[hook])
    details["pressure"] = part.kind
    if found is not None:
        details["left"] = round(pressure.left(student, graph, found), 6)
    return student, history, found


def planned(work: Work, step: Step, part: Prune, graph: Graph) -> Plan:
    """Return what of the student stays where the rest is to vanish in a training."""
    assert step.goal is not None
    options = _vanishing(graph, {**_options(work, part), "keep": budget(step.goal, work.whole, work.pace)})
    timer = timer_of(work.task) if options["keep"].timed else None
    return plan(work.student, work.task.example_inputs, graph=graph, timer=timer, **options)


def _vanishing(graph: Graph, options: Details) -> Details:
    """Leave out axes whose zeros count, so that no cut goes without a trace."""
    return {**options, "exclude": [*options["exclude"], *(escape(name) for name in counted(graph))]}


def _hook(part: Pressure, graph: Graph, found: Plan | None, options: Details) -> Hook:
    strength, steps = part.strength or 1.0, 0.5 if part.steps is None else part.steps
    if part.kind == "l1":
        return pressure.l1(strength)
    if part.kind == "l2":
        return pressure.l2(strength)
    if part.kind == "slimming":
        return pressure.slimming(strength)
    if found is None:
        return pressure.group_lasso(graph, strength, only=options["only"], exclude=options["exclude"])
    if part.kind == "greg":
        return pressure.greg(graph, found, ceiling=strength, steps=steps)
    return pressure.hspg(graph, found, steps=steps)


def _controlled(work: Work, step: Step, part: Prune, details: Details) -> Outcome:
    """Cut and recover in turns as far as validation allows.

    A run that was killed makes the cuts again, which takes seconds, and each training goes on from its checkpoint.
    """
    assert part.controlled is not None
    assert part.recover is not None
    assert step.goal is not None
    task, taught, history = work.task, part.recover, list[dict[str, Any]]()
    files = list[Path]()

    def smaller(model: nn.Module, inputs: Any, *, keep: Budget) -> nn.Module:
        return _refitted(work, part, prune(model, inputs, keep=keep, **_options(work, part)), model)

    def recover(model: nn.Module) -> nn.Module:
        files.append(work.checkpoint.with_suffix(f".{len(files)}.fit"))
        done = len(files) - 1
        found = distilled(replace(work, student=model, checkpoint=files[-1]), f"{step.label}, trial {done + 1}", taught)
        history.extend({**row, "epoch": done * taught.epochs + row["epoch"]} for row in found.history)
        return found.student

    found = iterate(
        work.student,
        task.example_inputs,
        keep=budget(step.goal, work.whole, work.pace),
        recover=recover,
        validate=lambda model: quality(model, task, "val")[task.primary],
        max_drop=part.controlled.max_drop,
        kind=part.schedule.kind,
        steps=part.schedule.steps,
        halvings=part.controlled.halvings,
        prune=smaller,
    )
    held = [trial for trial in found.trials if trial.held]
    if not found.met:
        _log.warning(
            "the cut stopped before its goal: of %d trials %d were within the allowance of %s", len(found.trials),
            len(held), part.controlled.max_drop,
        )  # fmt: skip
    student = duplicate(found.model) if found.model is work.student else found.model
    details |= {"trials": len(found.trials), "held": len(held), "met": found.met, **_told(part, student)}
    return Outcome(student, details, history)


def budget(goal: Goal, whole: Costs, pace: float = 1.0) -> Budget:
    """Return a goal as absolute counts, given the costs that it is a share of; shares are raised to the pace.

    Latency stays a share, but of the student as it is: ``whole`` holds how many times slower it was (`since`).
    """
    counts = {
        name: None if share is None else max(1, int(share**pace * whole[name]))
        for name, share in (("macs", goal.macs), ("params", goal.params), ("bytes", goal.bytes))
    }
    latency = None if goal.latency is None else min(1.0, goal.latency**pace * whole.get("latency", 1.0))
    return Budget(**counts, latency=latency, latency_ms=goal.latency_ms)


def since(stages: Sequence[Mapping[str, Any]]) -> float:
    """Return how many times slower the student was before stages that are done, as they measured it."""
    return 1 / prod(float(stage["details"].get("latency", 1.0)) for stage in stages)


def _first(value: Any) -> Any:
    """Return the first sample of a batch."""
    return value[:1] if isinstance(value, Tensor) and value.dim() else value


def parted(piece: Piece, model: nn.Module, task: Task, exclude: Sequence[str]) -> list[list[str]]:
    """Return the globs of each part: those that the recipe gives, or the prunable axes in order, in equal numbers."""
    if piece.layers.modules is not None:
        return [list(globs) for globs in piece.layers.modules]
    names = [axis.name for axis in select(trace(model, task.example_inputs), exclude=exclude)]
    if piece.count > len(names):
        raise SlivoError(f"the network has {len(names)} axes to cut and layers asks for {piece.count} groups; fewer")
    bounds = np.linspace(0, len(names), piece.count + 1).round().astype(int).tolist()
    return [[escape(name) for name in names[start:stop]] for start, stop in pairwise(bounds)]
