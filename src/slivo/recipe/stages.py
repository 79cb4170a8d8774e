"""The stages: what each kind of step does to the student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slivo import edits
from slivo.distill import distill
from slivo.errors import SlivoError
from slivo.export import onnx
from slivo.graph import trace
from slivo.graph.copies import duplicate
from slivo.measure import clock, cost, quality
from slivo.measure.latency import compare
from slivo.prune import Budget, HoldMasks, criteria, permute, prune, refit, select, sparsify, sparsity
from slivo.prune.sparse.masks import masked
from slivo.quantize import quantize
from slivo.recipe.lesson import lesson
from slivo.recipe.models import Origin, made
from slivo.recipe.plan import Goal, Piece, Step
from slivo.recipe.schema import Committee, Distill, Fit, Optimizer, Prune, Quantize, Sparsify, Teacher
from slivo.recipe.watch import Watch
from slivo.tasks import Task, forward, loader
from slivo.train import Hook, OptimizerSpec, Progress, fit

Details = dict[str, Any]
Costs = Mapping[str, float]
"""What is measured of a network between steps: the task's primary metric, ``params``, ``macs`` and ``bytes``."""

_FROM_SCRATCH = {"sgd": 0.1, "adamw": 0.001}


@dataclass(frozen=True)
class Work:
    """What a step works with.

    Args:
        task: Data, loss and metrics.
        teacher: The trained teacher; of the step that trains it, the teacher as it was made.
        student: The student as the step before left it; the teacher while there is none.
        folder: Of the run.
        seed: Of the step; everything random in it is a function of this.
        whole: The costs that a prune step's goal is a share of.
        watch: Hears of progress.
        on_epoch: Gets each row of a training.
        checkpoint: A file of the step's own for a training to resume from.
        committee: How several teachers speak with one voice; None if there is one.
        others: How those are made that teach beside the teacher.
    """

    task: Task
    teacher: nn.Module
    student: nn.Module
    folder: Path
    seed: int
    whole: Costs
    watch: Watch
    on_epoch: Callable[[Mapping[str, Any]], None]
    checkpoint: Path
    committee: Committee | None = None
    others: Sequence[Origin] = ()

    def member(self, index: int) -> Path:
        """Return the folder of one that teaches beside the teacher."""
        return self.folder / "teachers" / str(index + 2)


@dataclass(frozen=True)
class Outcome:
    """What a step gives: the student, what is worth telling, and the rows of its training."""

    student: nn.Module
    details: Details
    history: list[dict[str, Any]]


def measured(model: nn.Module, task: Task) -> dict[str, float]:
    """Return what a run notes of a network between steps; quality is that on the validation data."""
    counted = cost(model, task.example_inputs)
    return {
        task.primary: quality(model, task, "val")[task.primary],
        "params": counted.params,
        "macs": counted.macs,
        "bytes": counted.size_bytes,
    }


def run_teacher(work: Work, step: Step) -> Outcome:
    """Train the teacher, unless it is trained already."""
    details, history = _taught(work, step, work.teacher)
    return Outcome(work.teacher, details, history)


def run_member(work: Work, step: Step) -> Outcome:
    """Train one that teaches beside the teacher, unless it is trained already, and keep it."""
    index = step.path[-1]
    assert isinstance(index, int)
    model = made(work.others[index], work.seed)
    details, history = _taught(work, step, model)
    details[work.task.primary] = round(quality(model, work.task, "val")[work.task.primary], 6)
    work.others[index].save(model, work.member(index), {"role": step.label})
    return Outcome(work.student, details, history)


def _taught(work: Work, step: Step, model: nn.Module) -> tuple[Details, list[dict[str, Any]]]:
    """Train a teacher in place if its part of the recipe says so."""
    part = step.part
    assert isinstance(part, Teacher)
    if part.fit is None:
        model.eval()
        return {"model": part.model}, []
    return {"model": part.model, "epochs": part.fit.epochs}, _fit(work, step, model, part.fit, scratch=True)


def optimizer(part: Optimizer, *, scratch: bool) -> OptimizerSpec:
    """Return the optimizer that a recipe asks for; without a learning rate, one that suits the start."""
    given = part.model_dump()
    if given["lr"] is None:
        given["lr"] = _FROM_SCRATCH[part.kind] * (1.0 if scratch else 0.1)
    return OptimizerSpec(**given)


def run_prune(work: Work, step: Step) -> Outcome:
    """Cut the student to the step's goal."""
    part, task = step.part, work.task
    assert isinstance(part, Prune)
    assert step.goal is not None
    only, now = list(part.only), []
    if step.piece is not None:
        pieces = parted(step.piece, work.student, task, part.exclude)
        now = pieces[step.piece.index]
        only = [glob for piece in pieces[step.piece.index :] for glob in piece]
    keep = budget(step.goal, work.whole)
    timer = clock(tuple(_first(value) for value in task.example_inputs)) if keep.timed else None
    student = prune(
        work.student,
        task.example_inputs,
        keep=keep,
        criterion=part.criterion,
        scope=part.scope,
        only=only,
        exclude=part.exclude,
        now=now,
        min_width=part.min_width,
        round_to=part.round_to,
        timer=timer,
        **_data(work, part),
    )
    cut = edits.record(student)[-1]
    axes = len(cut.axes) if isinstance(cut, edits.Cut) else 0
    details: Details = {"criterion": part.criterion, "scope": part.scope, "axes": axes}
    if part.refit:
        student = refit(student, work.student, [task.inputs(batch) for batch in _samples(work, part.samples)])
        details["refit"] = True
    if timer is not None:
        details["latency"] = round(compare(timer, work.student, student).share, 4)
    if step.piece is not None:
        details["cut"] = now
    return Outcome(student, details, [])


def budget(goal: Goal, whole: Costs) -> Budget:
    """Return a goal as absolute counts, given the costs that it is a share of.

    Latency stays a share, but of the student as it is: ``whole`` holds how many times slower it was (`since`).
    """
    counts = {
        name: None if share is None else max(1, int(share * whole[name]))
        for name, share in (("macs", goal.macs), ("params", goal.params), ("bytes", goal.bytes))
    }
    latency = None if goal.latency is None else min(1.0, goal.latency * whole.get("latency", 1.0))
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


def run_distill(work: Work, step: Step) -> Outcome:
    """Train the student by its teacher."""
    part = step.part
    assert isinstance(part, Distill)
    others = [origin.load(work.member(index)).eval() for index, origin in enumerate(work.others)]
    given = lesson(
        part,
        work.task,
        work.student,
        [work.teacher, *others],
        voices=work.committee,
        seed=work.seed,
        folder=work.checkpoint.parent / "teacher-cache",
        progress=lambda done, total: work.watch.progress(f"{step.label}, asking the teacher", done, total, {}),
    )
    result = distill(
        work.student,
        given.teacher,
        given.task,
        given.terms,
        epochs=part.epochs,
        optimizer=optimizer(part.optimizer, scratch=False),
        batch_size=part.batch_size,
        label_weight=part.label_weight,
        seed=work.seed,
        hooks=_hooks(work, step, work.student),
        checkpoint=work.checkpoint,
        on_epoch=work.on_epoch,
        precision=part.precision,
    )
    return Outcome(result.model, given.details, result.history)


def run_finetune(work: Work, step: Step) -> Outcome:
    """Train the student by labels alone."""
    part = step.part
    assert isinstance(part, Fit)
    student = duplicate(work.student)
    return Outcome(student, {"epochs": part.epochs}, _fit(work, step, student, part, scratch=False))


def run_sparsify(work: Work, step: Step) -> Outcome:
    """Set weights of the student to zero."""
    part, task, student = step.part, work.task, work.student
    assert isinstance(part, Sparsify)
    options: Details = {
        "pattern": part.pattern,
        "criterion": part.criterion,
        "only": part.only,
        "exclude": part.exclude,
        **_data(work, part),
    }
    if part.permute:
        student = permute(student, task.example_inputs, **options)
    with torch.random.fork_rng():
        torch.manual_seed(work.seed)  # of random choices
        student = sparsify(student, task.example_inputs, sparsity=part.sparsity, scope=part.scope, **options)
    details: Details = {"pattern": part.pattern, "criterion": part.criterion, "sparsity": round(sparsity(student), 6)}
    return Outcome(student, details, [])


def run_quantize(work: Work, step: Step) -> Outcome:
    """Turn the student's weights into integers."""
    part = step.part
    assert isinstance(part, Quantize)
    batches = [work.task.inputs(batch) for batch in _samples(work, part.samples)]
    student = quantize(work.student, part.scheme, batches=batches, exclude=part.exclude)
    return Outcome(student, {"scheme": part.scheme, "samples": part.samples}, [])


def run_export(work: Work, step: Step) -> Outcome:
    """Write teacher and student as ONNX files; the student goes on unchanged."""
    del step
    files = {name: work.folder / f"{name}.onnx" for name in ("teacher", "student")}
    for file, model in zip(files.values(), (work.teacher, work.student), strict=True):
        onnx.export(model, file, work.task.example_inputs)
    details: Details = {"to": "onnx", "files": [file.name for file in files.values()]}
    if work.task.kind.endswith("classification"):
        # Runtimes round otherwise than PyTorch; what they make of it must be seen, not assumed.
        found = quality(InRuntime(files["student"]), work.task, "val")[work.task.primary]
        details[f"{work.task.primary} in ONNX Runtime"] = round(found, 6)
    return Outcome(work.student, details, [])


STAGES: Mapping[str, Callable[[Work, Step], Outcome]] = {
    "teacher": run_teacher,
    "member": run_member,
    "prune": run_prune,
    "recover": run_distill,
    "distill": run_distill,
    "finetune": run_finetune,
    "sparsify": run_sparsify,
    "quantize": run_quantize,
    "export": run_export,
}
"""What each kind of step does."""


class InRuntime(nn.Module):
    """An exported network, run by ONNX Runtime."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.run = onnx.runner(file)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the first output."""
        return torch.from_numpy(self.run(*(value.numpy() for value in inputs))[0])


def _fit(work: Work, step: Step, model: nn.Module, part: Fit, *, scratch: bool) -> list[dict[str, Any]]:
    """Train a model in place by the task's own loss; returns one row an epoch."""
    task = work.task

    def objective(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {"labels": task.loss(forward(task, model, batch), batch)}

    return fit(
        model,
        loader(task, "train", batch_size=part.batch_size, seed=work.seed),
        objective,
        epochs=part.epochs,
        optimizer=optimizer(part.optimizer, scratch=scratch),
        hooks=_hooks(work, step, model),
        validate=lambda model: quality(model, task, "val"),
        seed=work.seed,
        precision=part.precision,
        checkpoint=work.checkpoint,
        on_epoch=work.on_epoch,
    )


def _hooks(work: Work, step: Step, model: nn.Module) -> list[Hook]:
    """Return the hooks of a training: it tells of its progress, and keeps the zeros of a model that is sparse."""
    return [Progress(work.watch.progress, step.label), *([HoldMasks()] if masked(model) else [])]


def _data(work: Work, part: Prune | Sparsify) -> Details:
    """Return the batches and the loss that a part's criterion asks for, by the names of their parameters."""
    if not criteria.resolve(part.criterion).needs_batches:
        return {}
    task = work.task
    return {
        "batches": list(_samples(work, part.samples)),
        "loss": lambda model, batch: task.loss(forward(task, model, batch), batch),
    }


def _samples(work: Work, count: int) -> Iterator[Any]:
    """Yield batches of the training data, in an order of the step's own, with as many samples in all."""
    size = min(64, count)
    for index, batch in enumerate(loader(work.task, "train", batch_size=size, seed=work.seed)):
        if index * size >= count:
            return
        yield batch
