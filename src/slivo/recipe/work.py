"""What the steps of a run work with and share: data, networks, and trainings that go on after a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from slivo.distill import distill, lora, merge_lora
from slivo.measure import cost, quality
from slivo.prune import HoldMasks, criteria
from slivo.prune.sparse.masks import masked
from slivo.recipe.folder import member
from slivo.recipe.lesson import lesson
from slivo.recipe.models import Origin
from slivo.recipe.plan import Step
from slivo.recipe.schema import Committee, Distill, Fit, Lora, Optimizer, Prune, Sparsify
from slivo.recipe.watch import Watch
from slivo.share import TrainValues, shared
from slivo.tasks import Task, forward, loader
from slivo.train import Hook, OptimizerSpec, Progress, Saves, fit

Details = dict[str, Any]
Costs = Mapping[str, float]
"""What is measured of a network between steps: the task's primary metric, ``params``, ``macs`` and ``bytes``."""

ROLLBACKS = 3
"""How often a training may go back to its last good epoch, at half the learning rate each time."""

SAVE_EVERY = 60.0
"""Seconds between checkpoints in the midst of an epoch."""

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
        origin: What the student's edits start from.
        pace: By which learning rates and what goes are less, after a round that lost too much.
        committee: How several teachers speak with one voice; None if there is one.
        others: How those are made that teach beside the teacher.
        stop: Asked after each step of a training whether to stop.
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
    origin: Origin
    pace: float = 1.0
    committee: Committee | None = None
    others: Sequence[Origin] = ()
    stop: Callable[[], bool] | None = None

    def member(self, index: int) -> Path:
        """Return the folder of one that teaches beside the teacher."""
        return member(self.folder, index)


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


def optimizer(part: Optimizer, *, scratch: bool, pace: float = 1.0) -> OptimizerSpec:
    """Return the optimizer that a recipe asks for; without a learning rate, one that suits the start."""
    given = part.model_dump()
    if given["lr"] is None:
        given["lr"] = _FROM_SCRATCH[part.kind] * (1.0 if scratch else 0.1)
    return OptimizerSpec(**{**given, "lr": pace * given["lr"]})


def distilled(work: Work, label: str, part: Distill, *, more: Sequence[Hook] = ()) -> Outcome:
    """Train a copy of the student by its teacher, or teachers."""
    others = [origin.load(work.member(index)).eval() for index, origin in enumerate(work.others)]
    given = lesson(
        part,
        work.task,
        work.student,
        [work.teacher, *others],
        voices=work.committee,
        seed=work.seed,
        folder=work.checkpoint.parent / "teacher-cache",
        progress=lambda done, total: work.watch.progress(f"{label}, asking the teacher", done, total, {}),
    )
    student = work.student if part.lora is None else adapted(work.student, part.lora, work.seed)
    result = distill(
        student,
        given.teacher,
        given.task,
        given.terms,
        epochs=part.epochs,
        optimizer=optimizer(part.optimizer, scratch=False, pace=work.pace),
        batch_size=part.batch_size,
        label_weight=part.label_weight,
        seed=work.seed,
        hooks=[*hooks(work, label, work.student), *more],
        checkpoint=work.checkpoint,
        on_epoch=work.on_epoch,
        precision=part.precision,
        rollbacks=ROLLBACKS,
    )
    if part.lora is None:
        return Outcome(result.model, given.details, result.history)
    return Outcome(merge_lora(result.model), {**given.details, "rank": part.lora.rank}, result.history)


def adapted(student: nn.Module, part: Lora, seed: int) -> nn.Module:
    """Return a student with adapters to train in its place."""
    return lora(student, part.targets or None, rank=part.rank, alpha=part.alpha, dropout=part.dropout, seed=seed)


def fitted(
    work: Work, step: Step, model: nn.Module, part: Fit, *, scratch: bool, more: Sequence[Hook] = ()
) -> list[dict[str, Any]]:
    """Train a model in place by the task's own loss; returns one row an epoch."""
    task = work.task

    def objective(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {"labels": task.loss(forward(task, model, batch), batch)}

    return fit(
        model,
        loader(task, "train", batch_size=part.batch_size, seed=work.seed),
        objective,
        epochs=part.epochs,
        optimizer=optimizer(part.optimizer, scratch=scratch, pace=work.pace),
        hooks=[*hooks(work, step.label, model), *more],
        validate=lambda model: quality(model, task, "val"),
        seed=work.seed,
        precision=part.precision,
        checkpoint=work.checkpoint,
        on_epoch=work.on_epoch,
        rollbacks=ROLLBACKS,
    )


def hooks(work: Work, label: str, model: nn.Module) -> list[Hook]:
    """Return the hooks of a training: it saves and tells of its progress, and keeps zeros and shared values."""
    kept: list[Hook] = [HoldMasks()] if masked(model) else []
    kept += [TrainValues("mean")] if shared(model) else []
    return [Progress(work.watch.progress, label), Saves(SAVE_EVERY, stop=work.stop), *kept]


def data(work: Work, part: Prune | Sparsify) -> Details:
    """Return the batches and the loss that a part's criterion asks for, by the names of their parameters."""
    return weighing(work, part.samples) if criteria.resolve(part.criterion).needs_batches else {}


def weighing(work: Work, count: int) -> Details:
    """Return batches of so many samples in all, and the task's loss, by the names of their parameters."""
    task = work.task
    return {
        "batches": list(samples(work, count)),
        "loss": lambda model, batch: task.loss(forward(task, model, batch), batch),
    }


def sample_inputs(work: Work, count: int) -> list[tuple[Any, ...]]:
    """Return what the network is called with for so many samples, a batch each."""
    return [work.task.inputs(batch) for batch in samples(work, count)]


def samples(work: Work, count: int) -> Iterator[Any]:
    """Yield batches of the training data, in an order of the step's own, with as many samples in all."""
    size = min(64, count)
    for index, batch in enumerate(loader(work.task, "train", batch_size=size, seed=work.seed)):
        if index * size >= count:
            return
        yield batch
