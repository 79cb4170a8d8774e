"""One trial: a recipe that is run, watched, and measured; what it leaves on the disk is small."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slivo.errors import RecipeError, SlivoError, TargetError
from slivo.files import write
from slivo.recipe import Loaded, Watch, run
from slivo.recipe import folder as files
from slivo.recipe.plan import plan
from slivo.recipe.result import misses
from slivo.search.ground import Ground, trial_recipe
from slivo.search.predict import behind, predict, refused
from slivo.search.record import RECIPE, Row, text
from slivo.search.space import Candidate, epochs

TRIALS = "trials"
_KEPT = (files.RUN, files.SUMMARY, files.EPOCHS, RECIPE)
_STUDENT = ("student", "student.onnx", "student.slivo")


class Hopeless(Exception):  # noqa: N818
    """A trial need not go on."""


class Stop(KeyboardInterrupt):
    """The search is over; the trial is taken up again when it goes on."""


def attempt(
    ground: Ground,
    candidate: Candidate,
    row: Row,
    rows: Callable[[], Sequence[Row]],
    *,
    watch: Watch,
    stopping: Callable[[], bool],
) -> Row:
    """Run a candidate in its folder; a run that is there goes on.

    Args:
        ground: What trials share.
        candidate: The recipe to try.
        row: What is known of the trial.
        rows: Returns the trials so far.
        watch: Hears of the run.
        stopping: Whether the search is over.

    Returns:
        What came of it. A mistake of the recipe that only shows in the run is a trial that failed, with the reason.

    Raises:
        Stop: If the search is over; what the trial has done stays.
    """
    began = time.perf_counter()
    row = replace(row, strategy=candidate.strategy, settings=candidate.settings)
    folder = ground.out / TRIALS / row.folder
    try:
        data, known = ground.settled(candidate)
        row = replace(row, recipe=data)
        loaded = trial_recipe(ground, data)
        said = predict(loaded.recipe, ground.start, ground.teacher, known)
        row = replace(row, predicted=said)
        if why := _refused(ground, row, loaded, rows()):
            return replace(row, state="refused", reason=why)
    except (RecipeError, TargetError) as error:
        return replace(row, state="refused", reason=str(error))
    inner = _Watch(ground, row, loaded, folder, rows, watch, stopping)
    try:
        summary = _run(ground, loaded, folder, inner)
        row = _measured(ground, replace(row, predicted=inner.predicted, curve=tuple(inner.curve)), folder, summary)
    except Hopeless as error:
        row = replace(row, state="stopped", reason=str(error), curve=tuple(inner.curve))
    except TargetError as error:
        row = replace(row, state="refused", reason=str(error))
    except Exception as error:  # whatever it is, the search goes on without this trial
        told = str(error) or type(error).__name__
        row = replace(row, state="failed", reason=told.splitlines()[0])
    if folder.is_dir():
        write(folder / RECIPE, text(row.recipe, comment=f"Trial {row.number}."))
        tidy(folder, student=row.state == "done")
    return replace(row, seconds=time.perf_counter() - began)


def _run(ground: Ground, loaded: Loaded, folder: Path, watch: Watch) -> Mapping[str, Any]:
    """Run a recipe, or go on with the run in the folder if it is one of this recipe."""
    options: dict[str, Any] = {"seed": ground.seed, "watch": watch, "task": ground.task, "model": ground.model}
    if (folder / files.RUN).is_file():
        try:
            return run(loaded, folder, resume=True, **options).summary
        except SlivoError:  # damaged, or another's
            shutil.rmtree(folder)
    elif folder.is_dir():
        shutil.rmtree(folder)
    return run(loaded, folder, **options).summary


def _refused(ground: Ground, row: Row, loaded: Loaded, rows: Sequence[Row]) -> str:
    same = next((each for each in rows if each.state in ("done", "stopped") and each.recipe == row.recipe), None)
    if same is not None:
        return f"it is the same as trial {same.number}"
    return refused(
        row.predicted, loaded.recipe, asked(ground), ground.teacher, ground.metric, rows, ground.costs
    )  # fmt: skip


def asked(ground: Ground) -> dict[str, Any]:
    """Return what the recipe's target asks, but for what the search varies by the recipe's own word."""
    recipe = ground.loaded.recipe
    vary = (recipe.search.vary if recipe.search is not None else None) or {}
    given = recipe.target.model_dump(exclude_none=True)
    return {name: value for name, value in given.items() if f"target.{name}" not in vary}


def _measured(ground: Ground, row: Row, folder: Path, summary: Mapping[str, Any]) -> Row:
    """Return the row of a trial that is done; it is judged by validation data."""
    metric, student = ground.metric, summary["student"]
    quality = files.read_json(folder / files.RUN)["stages"][-1]["after"][metric]
    if quality is None:
        raise SlivoError(f"{metric} on the validation data is no finite number")
    latency = [summary[name]["latency_ms"]["1"][0] for name in ("student", "teacher")]
    measured: dict[str, Any] = {
        metric: quality,
        **{name: student[name] for name in ("macs", "params", "bytes")},
        "latency_ms": latency[0],
        "latency": latency[0] / latency[1],
        "test": {
            name: value for name, value in student.items() if name not in ("macs", "params", "bytes", "latency_ms")
        },
    }
    shares = [
        measured[name] if name == "latency" else measured[name] / max(1, ground.teacher[name]) for name in ground.costs
    ]
    judged = {
        "teacher": {**ground.teacher, "latency_ms": {"1": [latency[1]]}},
        "student": {**measured, "latency_ms": {"1": [latency[0]]}},
        "target": asked(ground),
    }
    return replace(
        row, state="done", values=(quality, *shares), measured=measured, misses=tuple(misses(judged, metric))
    )  # fmt: skip


def tidy(folder: Path, *, student: bool) -> None:
    """Remove what a trial need not keep: all but what it wrote down, and the student if it may be wanted."""
    kept = {*_KEPT, *(_STUDENT if student else ())}
    for each in folder.iterdir() if folder.is_dir() else ():
        if each.name not in kept:
            shutil.rmtree(each, ignore_errors=True) if each.is_dir() else each.unlink(missing_ok=True)


class _Watch(Watch):
    """Passes on what a run tells, and ends it once it is hopeless or the search is over."""

    def __init__(
        self, ground: Ground, row: Row, loaded: Loaded, folder: Path, rows: Callable[[], Sequence[Row]], watch: Watch,
        stopping: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.ground, self.rows, self.watch, self.stopping = ground, rows, watch, stopping
        self.file, self.size = folder / files.EPOCHS, 0
        self.number, self.predicted = row.number, row.predicted
        self.total = epochs(loaded.recipe)
        # How many epochs there are that validation controls is not known beforehand.
        self.open = any(
            step.turn is not None or getattr(step.part, "controlled", None) is not None for step in plan(loaded.recipe)
        )
        self.curve: list[tuple[float, float]] = []

    def started(self, label: str, index: int, count: int) -> None:
        """A step begins."""
        self._look()
        self.watch.started(f"trial {self.number}: {label}", index, count)

    def progress(self, label: str, done: int, total: int, fields: Mapping[str, float]) -> None:
        """A training goes on; now and then an epoch is over."""
        self._look()
        self.watch.progress(f"trial {self.number}: {label}", done, total, fields)

    def finished(self, record: Mapping[str, Any]) -> None:
        """A step is done."""
        self._look()
        self.watch.finished(record)

    def _look(self) -> None:
        """Read the epochs that are new, and judge by them."""
        if self.stopping():
            raise Stop
        size = self.file.stat().st_size if self.file.is_file() else 0
        if size == self.size or not self.total or self.open:
            return
        self.size = size
        found = [row.get("val", {}).get(self.ground.metric) for row in files.read_rows(self.file)]
        self.curve = [(number / self.total, value) for number, value in enumerate(found, 1) if value is not None]
        search = self.ground.loaded.recipe.search
        margin = (0.05 if search is None else search.margin) * abs(self.ground.teacher[self.ground.metric])
        if why := behind(self.curve, self.predicted, self.rows(), self.ground.costs, margin):
            raise Hopeless(why)
