"""Run a recipe in a folder, step by step; what is done is on the disk, and a run that was killed goes on from there."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slivo.errors import SlivoError
from slivo.graph.copies import duplicate
from slivo.recipe import course, ledger, mending, result
from slivo.recipe import folder as files
from slivo.recipe.course import Start
from slivo.recipe.cuts import since
from slivo.recipe.load import Loaded
from slivo.recipe.models import made
from slivo.recipe.plan import Step
from slivo.recipe.prepare import Job, first_weights, prepare
from slivo.recipe.schema import Export
from slivo.recipe.stages import STAGES
from slivo.recipe.watch import Watch
from slivo.recipe.work import Outcome, Work, measured
from slivo.tasks import Task


@dataclass(frozen=True)
class Result:
    """What a run gives.

    Attributes:
        model: The student, in evaluation mode.
        summary: What ``summary.json`` holds: ``teacher`` and ``student`` with quality on the test data, costs and
            latency; ``target``, ``met``, ``seconds``, ``runtime``, ``seed``.
        misses: In what the target was missed, a text for each; empty if it was met.
        folder: Of the run.
    """

    model: nn.Module
    summary: Mapping[str, Any]
    misses: tuple[str, ...]
    folder: Path

    @property
    def met(self) -> bool:
        """Whether the target was met."""
        return not self.misses


def run(
    loaded: Loaded,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    resume: bool = False,
    watch: Watch | None = None,
    task: Task | None = None,
    model: nn.Module | None = None,
    stop: Callable[[], bool] | None = None,
) -> Result:
    """Run a recipe.

    Whatever can be checked is checked before the folder is made: imports, shapes, whether the first budget can be met.

    Args:
        loaded: A recipe, from `slivo.recipe.load`.
        out: The folder of the run; new or empty, unless ``resume``.
        seed: Of everything random. The same seed on the same machine with as many threads gives the same student.
        resume: Go on with the run in the folder; its recipe and seed must be these. The student is bit-identical to
            that of a run that was not interrupted.
        watch: Hears of progress.
        task: In place of what the recipe says.
        model: A trained teacher, in place of what the recipe says; left untouched.
        stop: Asked before each stage and after each step of a training; once it says so, the run writes a checkpoint
            and raises `KeyboardInterrupt`.

    Returns:
        The student, and how it compares with the teacher.

    Raises:
        RecipeError: If the recipe lacks something or names something that does not exist.
        ArtifactError: If the folder to resume is damaged.
        ShapeError: If the network does not fit the task.
        TargetError: If a budget cannot be met.
        OutputError: If the folder is taken, in use by another process, or cannot be written to.
        SlivoError: If a stage fails.
    """
    path = Path(out)
    with torch.random.fork_rng(devices=[]):
        job = prepare(loaded, task=task, model=model, seed=seed)
        if resume and not path.is_dir():
            ledger.reopened(path, job)  # says that there is none
        with files.held(path):
            return _go(job, path, watch or Watch(), stop, resume=resume)


def _go(job: Job, path: Path, watch: Watch, stop: Callable[[], bool] | None, *, resume: bool) -> Result:
    """Run a job in a folder that this process holds."""
    book = ledger.reopened(path, job) if resume and files.begun(path) else ledger.opened(path, job)
    going = _Run(job, path, book, watch, stop)
    if book["status"] == "done":
        shutil.rmtree(going.checkpoints, ignore_errors=True)  # in case a kill came before
        return going.result(job.student_origin.load(path / "student"), files.read_json(path / files.SUMMARY))
    try:
        with going.failures():
            going.restore()
            for index in range(len(book["stages"]), len(job.steps)):
                going.step(index)
            return going.finish()
    except BaseException as error:
        going.fail(error)
        raise


class _Run:
    """A run in progress: the networks as the last step left them, and the book that becomes ``run.json``."""

    def __init__(
        self, job: Job, path: Path, book: dict[str, Any], watch: Watch, stop: Callable[[], bool] | None = None
    ) -> None:
        self.job, self.path, self.book, self.watch, self.stop = job, path, book, watch, stop
        self.doing = "the start"
        self.epochs, self.checkpoints = path / files.EPOCHS, path / files.CHECKPOINTS
        self.spent, self.began = float(book["seconds"]), time.perf_counter()
        self.teacher: nn.Module | None = None
        self.coach: nn.Module | None = None
        self.student: nn.Module | None = None
        self.held = 0  # the step that left the student at hand
        self.chosen: list[dict[str, str]] = []

    def restore(self) -> None:
        """Take up what the steps that are done have left; rows of a step that will be repeated go."""
        files.sweep(self.path)
        self.book |= {"status": "running", "error": None}
        done, damaged = mending.sound(self.path, self.job, self.book["stages"])
        self.book["stages"] = self.book["stages"][:done]
        self.book["decisions"] = [
            *(each for each in self.book["decisions"] if each["index"] < done or each["what"] == "recovered"),
            *({"index": done, "stage": self.label(done), "what": "recovered", "why": why} for why in damaged),
        ]
        self.save()
        fit_file = self.checkpoint(done)
        rows = [row for row in files.read_rows(self.epochs) if row["stage"] < done + fit_file.exists()]
        files.write_rows(self.epochs, rows)
        if done:
            self.teacher = self.job.teacher.load(self.path / "teacher").eval()
            self.take_up(self.start(done).source)
        if 0 < self.job.taught < done:
            self.coach = self.job.teacher.load(self.path / files.COACH).eval()

    def start(self, index: int) -> Start:
        """Return how a step begins."""
        return course.start(self.job.steps, self.book["stages"], index, self.job.task.primary)

    def take_up(self, source: int) -> None:
        """Have at hand the student that a step left; that of the teacher's step is made when it is needed."""
        if source != self.held:
            self.student = self.job.origin(source).load(self.kept(source)).eval() if source else None
            self.held = source

    def step(self, index: int) -> None:
        """Do one step, and keep what it leaves before the step counts as done."""
        step, started, start = self.job.steps[index], time.perf_counter(), self.start(index)
        self.pause(step.label)
        self.take_up(start.source)
        if start.skip:
            self.leave_out(index, step, start)
            return
        self.watch.started(step.label, index, len(self.job.steps))
        torch.manual_seed(self.seed(index))  # so that a step does not depend on what this process did before
        with ledger.warnings() as warned:
            before = self.before(index, start)
            outcome = STAGES[step.kind](self.work(index, step, before, start.pace), step)
        self.keep(index, step, outcome)
        record = {
            "index": index,
            "kind": step.kind,
            "label": step.label,
            "seconds": time.perf_counter() - started,
            "before": before,
            "after": measured(outcome.student, self.job.task),
            "details": outcome.details,
        }
        self.book["stages"].append(record)
        judged = course.decision(self.job.steps, self.book["stages"], index, self.job.task.primary)
        decisions = [
            *self.chosen,
            *ledger.setbacks(outcome.history),
            *({"what": "warned", "why": text} for text in warned),
            *([judged] if judged is not None else []),
        ]
        self.book["decisions"] += [{"index": index, "stage": step.label, **each} for each in decisions]
        self.chosen = []
        self.save()
        for file in self.checkpoints.glob(f"{index:03}.*fit*"):  # of one training, or of several
            file.unlink(missing_ok=True)
        self.clear(index, step, start)
        self.watch.finished(record)

    def leave_out(self, index: int, step: Step, start: Start) -> None:
        """Write down that a step is not done."""
        after = self.book["stages"][start.source]["after"]
        details = {course.SKIPPED: start.skip}
        record = {
            "index": index,
            "kind": step.kind,
            "label": step.label,
            "seconds": 0.0,
            "before": after,
            "after": after,
        }
        self.book["stages"].append({**record, "details": details})
        self.save()

    def clear(self, index: int, step: Step, start: Start) -> None:
        """Remove students that no step will start from: all but the last two and the one that a round may go back to.

        The last but one is for the step to be done again, should what it left be damaged.
        """
        back = start.source if step.turn is None else self.start(step.turn.since).source
        needed = {self.kept(source) for source in (index, start.source, back)}
        for folder in self.checkpoints.iterdir() if self.checkpoints.is_dir() else ():
            if folder.name.isdigit() and folder not in needed:
                shutil.rmtree(folder, ignore_errors=True)

    def before(self, index: int, start: Start) -> dict[str, Any] | None:
        """Make what the step starts from, where it is not there yet; returns what is measured of it."""
        if index == 0:
            self.teacher = made(self.job.teacher, self.job.seed)
            return None
        if self.student is None:
            self.student = self.first_student(index)
        first = start.source == 0 and self.job.origin(index) is self.job.student
        found: dict[str, Any] = (
            measured(self.student, self.job.task) if first else self.book["stages"][start.source]["after"]
        )
        return found

    def first_student(self, index: int) -> nn.Module:
        """Return what the student is before its first stage."""
        assert self.teacher is not None
        if self.job.student is None or self.job.origin(index) is not self.job.student:
            return duplicate(self.teacher)
        student, part = made(self.job.student, self.job.seed), self.job.loaded.recipe.student.inherit
        if part is None:
            return student
        found = first_weights(student, self.teacher, part, self.job.task)
        counts = f"{len(found.copied)} tensors, {len(found.projected)} made smaller, {len(found.left)} its own"
        why = f"it starts from the teacher's weights: {counts}"
        self.chosen = [{"stage": "student", "what": "inherited", "why": why}]  # not the stage that it comes before
        return found.model

    def work(self, index: int, step: Step, before: Mapping[str, Any] | None, pace: float) -> Work:
        """Return what a step works with."""
        stages, whole = self.book["stages"], dict(before or {})
        if step.goal is not None and step.goal.since != index:
            whole = stages[0]["after"] if step.goal.since is None else stages[step.goal.since]["before"]
            line = course.line(self.job.steps, stages, index, self.job.task.primary)
            whole = {**whole, "latency": since([stages[done] for done in line if done >= (step.goal.since or 0)])}
        assert self.teacher is not None
        return Work(
            task=self.job.task,
            teacher=self.teacher if self.coach is None or step.kind == "export" else self.coach,
            student=self.student or self.teacher,
            folder=self.path,
            seed=self.seed(index),
            whole=whole,
            watch=self.watch,
            on_epoch=lambda row: files.append_row(self.epochs, ledger.row(index, step, row)),
            checkpoint=self.checkpoint(index),
            origin=self.job.origin(index),
            pace=pace,
            committee=self.job.loaded.recipe.committee,
            others=self.job.others,
            stop=self.stop,
        )

    def keep(self, index: int, step: Step, outcome: Outcome) -> None:
        """Write what a step leaves: the network, and the rows of its training."""
        if step.kind == "teacher":
            self.teacher = outcome.student
            self.job.teacher.save(self.teacher, self.path / "teacher", self.meta("teacher"))
        elif step.kind == "teach":
            self.coach, self.student, self.held = outcome.student, None, 0
            self.job.teacher.save(self.coach, self.path / files.COACH, self.meta("coach"))
        else:
            self.student, self.held = outcome.student, index
            self.job.origin(index).save(self.student, self.kept(index), {})
        # A kill may have come between a checkpoint and its row.
        rows = [row for row in files.read_rows(self.epochs) if row["stage"] < index]
        files.write_rows(self.epochs, [*rows, *(ledger.row(index, step, row) for row in outcome.history)])

    def finish(self) -> Result:
        """Save the student, measure both networks as they were saved, and write down how they compare."""
        count, task, recipe = len(self.job.steps), self.job.task, self.job.loaded.recipe
        self.pause("measure")
        self.watch.started("measure", count, count)
        self.take_up(self.start(count).source)
        assert self.teacher is not None
        self.job.student_origin.save(self.student or self.teacher, self.path / "student", self.meta("student"))
        models = {"teacher": self.teacher.eval(), "student": (self.student or self.teacher).eval()}
        for name, origin in (("teacher", self.job.teacher), ("student", self.job.student_origin)):
            if origin.loads:  # what is measured is what is on the disk
                models[name] = origin.load(self.path / name).eval()
        summary = result.summarize(
            models,
            task,
            self.path,
            target=recipe.target.model_dump(exclude_none=True),
            exported={step.part.to for step in self.job.steps if isinstance(step.part, Export)},
        )
        compared = result.compared(models, task)
        summary |= {"seconds": self.elapsed(), "seed": self.job.seed}
        files.write_json(self.path / files.SUMMARY, summary)
        self.book |= {**compared, "status": "done"}  # last: whoever reads this may rely on all the rest
        self.save()
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        return self.result(models["student"], summary)

    def result(self, student: nn.Module, summary: Mapping[str, Any]) -> Result:
        """Return what a run that is done gives."""
        return Result(student.eval(), summary, tuple(result.misses(summary, self.job.task.primary)), self.path)

    def meta(self, role: str) -> dict[str, Any]:
        """Return what an artifact should say of itself beyond how to load it."""
        inputs = [
            {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            for value in self.job.task.example_inputs
            if isinstance(value, Tensor)
        ]
        return {"run": self.job.loaded.recipe.name, "role": role, "inputs": inputs}

    def fail(self, error: BaseException) -> None:
        """Write down that the run broke off, and why; what is done stays."""
        interrupted = isinstance(error, KeyboardInterrupt)
        self.book |= {"status": "failed", "error": "interrupted" if interrupted else str(error) or type(error).__name__}
        with suppress(SlivoError):  # a full disk, say, is the error already
            self.save()

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Say in one line what cannot be read or written; data may go in the midst of a run."""
        try:
            yield
        except OSError as error:
            last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise SlivoError(
                f"{self.doing}: {last}; mend that and go on with --resume: what is done so far is kept"
            ) from error

    def pause(self, doing: str) -> None:
        """Note what comes now, unless the run is to stop."""
        self.doing = doing
        if self.stop is not None and self.stop():
            raise KeyboardInterrupt

    def elapsed(self) -> float:
        """Return how many seconds the run has taken, in all processes."""
        return self.spent + time.perf_counter() - self.began

    def save(self) -> None:
        """Write ``run.json``."""
        self.book["seconds"] = self.elapsed()
        files.write_json(self.path / files.RUN, self.book)

    def seed(self, index: int) -> int:
        """Return a step's own seed."""
        return int(np.random.SeedSequence([self.job.seed % 2**63, index]).generate_state(1, np.uint32)[0])

    def checkpoint(self, index: int) -> Path:
        """Return the file from which a step's training resumes."""
        return self.checkpoints / f"{index:03}.fit"

    def kept(self, index: int) -> Path:
        """Return the folder that holds the student after a step."""
        return files.kept(self.path, index)

    def label(self, index: int) -> str:
        """Return the name of a step, or of what comes after the last."""
        return self.job.steps[index].label if index < len(self.job.steps) else "measure"
