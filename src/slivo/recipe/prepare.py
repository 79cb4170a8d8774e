"""All that can be done before a run begins: import what a recipe names, and try whether it fits together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from slivo import tasks
from slivo.distill import Inherited, inherit
from slivo.errors import ArtifactError, RecipeError, SlivoError, require
from slivo.graph import trace
from slivo.options import MinWidth
from slivo.prune import allocate, select
from slivo.recipe.cuts import budget
from slivo.recipe.lesson import check
from slivo.recipe.load import Loaded
from slivo.recipe.models import Origin, live, made, named
from slivo.recipe.plan import Goal, Step, cut_of, plan, taught
from slivo.recipe.schema import Distill, Inherit, Prune
from slivo.recipe.work import adapted
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
        others: How those are made that teach beside the teacher.
        seed: Of everything random.
    """

    loaded: Loaded
    steps: list[Step]
    task: Task
    teacher: Origin
    student: Origin | None
    others: tuple[Origin, ...]
    seed: int

    @property
    def student_origin(self) -> Origin:
        """What the student's edits start from."""
        return self.student or self.teacher

    @property
    def taught(self) -> int:
        """The step at which a student becomes the teacher; -1 if none does."""
        return taught(self.steps)

    def origin(self, index: int) -> Origin:
        """Return what the edits start from of the student that a step leaves."""
        return self.teacher if index <= self.taught else self.student_origin


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
    task = task or task_of(loaded)
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
    others = []
    for index, part in enumerate(recipe.committee.others if recipe.committee is not None else []):
        with _place(loaded, "committee", "others", index):
            others.append(named(part.model, part.args))
            tasks.check(task, made(others[-1], seed))
    for network in networks:
        tasks.check(task, network)
    if recipe.target.runtime in ("onnxruntime", "openvino"):
        extra = "export" if recipe.target.runtime == "onnxruntime" else "openvino"
        require(recipe.target.runtime, extra=extra, why="the runtime of the target")
    steps = plan(loaded.recipe)
    _check_budget(steps, networks[0], networks[0] if taught(steps) > 0 else networks[-1], task)
    _check_lessons(loaded, steps, networks, task)
    return Job(loaded, steps, task, teacher, student, tuple(others), seed)


def _check_lessons(loaded: Loaded, steps: list[Step], networks: list[nn.Module], task: Task) -> None:
    """Find out, with networks that may not be trained yet, whether students can be taught as the recipe says."""
    recipe, source = loaded.recipe, loaded.source
    committee = recipe.committee
    if recipe.student.inherit is not None:
        found = first_weights(networks[-1], networks[0], recipe.student.inherit, task)
        if not (found.copied or found.projected):
            raise source.error(
                ("student", "inherit"),
                "finds no tensor of the student that the teacher has, by name; map their modules by layers: "
                "{student: teacher}, or leave it out",
            )
    if committee is not None and committee.voices == "learned" and not task.kind.endswith("classification"):
        raise source.error(("committee", "voices"), f"are learned from classes, and the task is of kind {task.kind!r}")
    lessons = {step.path: index for index, step in enumerate(steps) if isinstance(step.part, Distill)}
    for step, index in ((steps[index], index) for index in lessons.values()):
        assert isinstance(step.part, Distill)
        student = networks[0] if index <= taught(steps) else networks[-1]
        try:
            check(step.part, task, student, networks[0], several=committee is not None)
            if step.part.lora is not None:
                adapted(student, step.part.lora, 0)
        except SlivoError as error:
            raise source.error(step.path, f"cannot be done: {error}") from error


def first_weights(student: nn.Module, teacher: nn.Module, part: Inherit, task: Task) -> Inherited:
    """Start a student from its teacher's weights, as the recipe says."""
    return inherit(student, teacher, task.example_inputs, layers=part.layers, widths=part.widths)


def task_of(loaded: Loaded) -> Task:
    """Make the task that a recipe names.

    Raises:
        RecipeError: If it names none, or that cannot be made.
    """
    part, source = loaded.recipe.task, loaded.source
    if part is None:
        raise source.error(("task",), "is missing; a mapping with kind and data")
    try:
        return tasks.make(part.kind, part.data, **part.options)
    except RecipeError as error:
        raise RecipeError(f"{source.place(('task',))}: {error}") from error


@contextmanager
def _place(loaded: Loaded, *path: str | int) -> Iterator[None]:
    """Say where in the recipe a network is named that cannot be made."""
    try:
        yield
    except ArtifactError as error:
        raise RecipeError(f"{loaded.source.place((*path, 'model'))}: {error}") from error


def _check_budget(steps: list[Step], teacher: nn.Module, student: nn.Module, task: Task) -> None:
    """Find out, with networks that may not be trained yet, whether what the first prune stage asks for can be had."""
    cuts = [step for step in steps if step.goal is not None]
    if not cuts or cuts[0].piece is not None:
        return  # parts are cut one by one, and each by what the others leave it
    part = cut_of(cuts[0].part)
    assert part is not None
    graph = trace(student, task.example_inputs)
    whole = graph if teacher is student else trace(teacher, task.example_inputs)
    scores = {axis.name: np.ones(axis.size) for axis in select(graph, only=part.only, exclude=part.exclude)}
    for number, step in enumerate(cuts[: part.cuts]):
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
