"""The joint stage: one training in which the teacher guides, what will go vanishes, and rounding is rehearsed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from slivo import edits
from slivo.graph import Graph, trace
from slivo.graph.copies import duplicate
from slivo.prune import GradualSparsity, Plan, cut, pressure, sparsity
from slivo.recipe.cuts import planned
from slivo.recipe.plan import Step
from slivo.recipe.rounding import quantized, rehearsal
from slivo.recipe.schema import Joint
from slivo.recipe.work import Details, Outcome, Work, distilled, sample_inputs
from slivo.train import Hook


def run_joint(work: Work, step: Step) -> Outcome:
    """Train a copy of the student once, then take out what vanished and store what was rounded as integers."""
    part = step.part
    assert isinstance(part, Joint)
    student, hooks, details = duplicate(work.student), list[Hook](), Details()
    cutting: tuple[Graph, Plan] | None = None
    if part.prune is not None:
        assert step.goal is not None
        graph = trace(student, work.task.example_inputs)
        found = planned(work, step, part.prune, graph)
        hooks.append(pressure.hspg(graph, found, steps=part.vanish))
        cutting = graph, found
    if part.sparsify is not None:
        given = part.sparsify
        assert given.sparsity is not None
        hooks.append(
            GradualSparsity(
                given.sparsity, pattern=given.pattern, criterion=given.criterion, scope=given.scope,
                stop=part.vanish, only=given.only, exclude=given.exclude,
            )
        )  # fmt: skip
    learned = None
    if part.quantize is not None:
        batches = sample_inputs(work, part.quantize.samples)
        learned = rehearsal(part.quantize, batches)
        hooks.append(learned)
    trained = distilled(replace(work, student=student), step.label, part, more=hooks)
    details |= trained.details
    model = _cut(trained.student, work, cutting, details)
    if part.sparsify is not None:
        details["sparsity"] = round(sparsity(model), 6)
    if part.quantize is not None and learned is not None:
        model = quantized(model, part.quantize, batches, learned.ranges)
        details["scheme"] = part.quantize.scheme
    return Outcome(model, details, trained.history)


def _cut(model: nn.Module, work: Work, cutting: tuple[Graph, Plan] | None, details: dict[str, Any]) -> nn.Module:
    """Take out what has vanished."""
    if cutting is None:
        return model
    graph, found = cutting
    details["left"] = round(pressure.left(model, graph, found), 6)
    small = cut(model, work.task.example_inputs, found)
    last = edits.record(small)[-1]
    details["axes"] = len(last.axes) if isinstance(last, edits.Cut) else 0
    return small
