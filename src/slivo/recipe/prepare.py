"""All that can be done before a run begins: import what a recipe names, and try whether it fits together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from slivo import tasks
from slivo.errors import ArtifactError, RecipeError
from slivo.graph import trace
from slivo.prune import allocate, select
from slivo.recipe.load import Loaded
from slivo.recipe.models import Origin, live, made, named
from slivo.recipe.plan import Step, plan
from slivo.recipe.schema import Prune
from slivo.recipe.stages import budget
from slivo.tasks import Task


@dataclass(frozen=True)
class Job:
    """A recipe with all that it names at hand.

    Args:
        loaded: The recipe.
        steps: What is to be done.
        task: Data, loss and metrics.
        teacher: How the teacher is made.
        student: How the student is made; None if it is a copy of the teacher.
        seed: Of everything random.
    """

    loaded: Loaded
    steps: list[Step]
    task: Task
    teacher: Origin
    student: Origin | None
    seed: int


def prepare(loaded: Loaded, *, task: Task | None = None, model: nn.Module | None = None, seed: int = 0) -> Job:
    """Import all that a recipe names, and check what can be checked before anything is trained.

    Args:
        loaded: The recipe.
        task: In place of what the recipe says.
        model: A trained teacher, in place of what the recipe says.
        seed: Of everything random.

    Raises:
        RecipeError: If something is missing or does not import; says where in the recipe.
        ShapeError: If a network does not fit the task.
        TargetError: If what the first cut asks for cannot be had.
    """
    task = task or _task(loaded)
    teacher, student = _teacher(loaded, model), _student(loaded)
    networks = [made(teacher, seed), *([] if student is None else [made(student, seed)])]
    for network in networks:
        tasks.check(task, network)
    steps = plan(loaded.recipe)
    _check_budget(steps, networks[0], networks[-1], task)
    return Job(loaded, steps, task, teacher, student, seed)


def _task(loaded: Loaded) -> Task:
    part, source = loaded.recipe.task, loaded.source
    if part is None:
        raise source.error(("task",), "is missing; a mapping with kind and data")
    try:
        return tasks.make(part.kind, part.data, **part.options)
    except RecipeError as error:
        raise RecipeError(f"{source.place(('task',))}: {error}") from error


def _teacher(loaded: Loaded, model: nn.Module | None) -> Origin:
    part = loaded.recipe.teacher
    if model is not None:
        return live(model)
    if part is None:
        raise loaded.source.error(("teacher",), "is missing; a mapping with model, args and fit")
    try:
        return named(part.model, part.args)
    except ArtifactError as error:
        raise RecipeError(f"{loaded.source.place(('teacher', 'model'))}: {error}") from error


def _student(loaded: Loaded) -> Origin | None:
    part = loaded.recipe.student
    if part.model is None:
        return None
    try:
        return named(part.model, part.args)
    except ArtifactError as error:
        raise RecipeError(f"{loaded.source.place(('student', 'model'))}: {error}") from error


def _check_budget(steps: list[Step], teacher: nn.Module, student: nn.Module, task: Task) -> None:
    """Find out, with networks that may not be trained yet, whether what the first cut asks for can be had."""
    first = next((step for step in steps if step.kind == "prune"), None)
    if first is None or first.goal is None or first.piece is not None:
        return  # parts are cut one by one, and each by what the others leave it
    part = first.part
    assert isinstance(part, Prune)
    graph = trace(student, task.example_inputs)
    whole = graph if first.goal.since is not None or teacher is student else trace(teacher, task.example_inputs)
    keep = budget(first.goal, {"macs": whole.macs, "params": whole.params})
    scores = {axis.name: np.ones(axis.size) for axis in select(graph, only=part.only, exclude=part.exclude)}
    allocate(graph, scores, keep, scope="uniform", min_width=part.min_width, round_to=part.round_to)
