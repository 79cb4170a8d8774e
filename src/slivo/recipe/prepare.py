"""All that can be done before a run begins: import what a recipe names, and try whether it fits together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from slivo import tasks
from slivo.errors import ArtifactError, RecipeError
from slivo.graph import trace
from slivo.options import MinWidth
from slivo.prune import allocate, select
from slivo.recipe.load import Loaded
from slivo.recipe.models import Origin, live, made, named
from slivo.recipe.plan import Goal, Step, plan
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

    @property
    def student_origin(self) -> Origin:
        """What the student's edits start from."""
        return self.student or self.teacher


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
    recipe = loaded.recipe
    with _place(loaded, "teacher"):
        if model is not None:
            teacher = live(model)
        elif recipe.teacher is not None:
            teacher = named(recipe.teacher.model, recipe.teacher.args)
        else:
            raise loaded.source.error(("teacher",), "is missing; a mapping with model, args and fit")
        networks = [made(teacher, seed)]
    with _place(loaded, "student"):
        student = None if recipe.student.model is None else named(recipe.student.model, recipe.student.args)
        networks += [] if student is None else [made(student, seed)]
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


@contextmanager
def _place(loaded: Loaded, key: str) -> Iterator[None]:
    """Say where in the recipe a network is named that cannot be made."""
    try:
        yield
    except ArtifactError as error:
        raise RecipeError(f"{loaded.source.place((key, 'model'))}: {error}") from error


def _check_budget(steps: list[Step], teacher: nn.Module, student: nn.Module, task: Task) -> None:
    """Find out, with networks that may not be trained yet, whether what the first prune stage asks for can be had."""
    cuts = [step for step in steps if step.kind == "prune" and step.goal is not None]
    if not cuts or cuts[0].piece is not None:
        return  # parts are cut one by one, and each by what the others leave it
    part = cuts[0].part
    assert isinstance(part, Prune)
    graph = trace(student, task.example_inputs)
    whole = graph if teacher is student else trace(teacher, task.example_inputs)
    scores = {axis.name: np.ones(axis.size) for axis in select(graph, only=part.only, exclude=part.exclude)}
    for number, step in enumerate(cuts[: part.schedule.steps]):
        assert step.goal is not None
        base = whole if step.goal.since is None else graph
        goal = replace(step.goal, latency=None, latency_ms=None)  # which takes time to measure
        if goal == Goal(goal.since, None, None):
            return
        keep = budget(goal, {"macs": base.macs, "params": base.params, "bytes": base.count_bytes({})})
        allocate(graph, scores, keep, scope="uniform", min_width=_least(part, number), round_to=part.round_to)


def _least(part: Prune, number: int) -> MinWidth:
    """Return the least widths that several steps can leave: a share is of what the step before left."""

    def one(width: float | int) -> float | int:
        return width if isinstance(width, int) else width ** (number + 1)

    if isinstance(part.min_width, dict):
        return {glob: one(width) for glob, width in part.min_width.items()}
    return one(part.min_width)
