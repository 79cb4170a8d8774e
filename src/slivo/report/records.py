"""What a run wrote down, read back and checked: run.json, metrics.jsonl and summary.json."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, field_validator

from slivo.errors import ArtifactError

FORMAT = 1
"""Version of the run folder that this reader knows; a newer one is refused."""

RUN = "run.json"
EPOCHS = "metrics.jsonl"
SUMMARY = "summary.json"


class Record(BaseModel):
    """An object of the run folder; keys that the page does not use are kept and ignored."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Measured(Record):
    """A network's cost and quality; whatever number is not a cost is a metric of the task."""

    params: float | None = None
    macs: float | None = None
    bytes: float | None = None
    latency_ms: dict[str, tuple[float, float]] = {}

    @property
    def quality(self) -> dict[str, float]:
        """The task's metrics by name, in the order they were written; those that are no finite number are left out."""
        extra = self.model_extra or {}
        return {
            name: float(value)
            for name, value in extra.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }


class Stage(Record):
    """One stage of a run, with the network before and after it."""

    index: int
    kind: str
    label: str
    seconds: float | None = None
    before: Measured | None = None
    after: Measured | None = None
    details: dict[str, JsonValue] = {}


class Decision(Record):
    """Something that the run chose by itself."""

    stage: int | str | None = None
    what: str
    why: str


class Axis(Record):
    """The width of one axis of the network, before and after."""

    name: str
    before: int
    after: int


class Confusion(Record):
    """Counts of test samples: rows are true classes, columns predicted ones."""

    teacher: list[list[float]] | None = None
    student: list[list[float]] | None = None


class Run(Record):
    """Everything about a run but its curves and its result."""

    format: int = FORMAT
    slivo: str = ""
    name: str = "run"
    seed: int | None = None
    recipe: dict[str, JsonValue] = {}
    machine: dict[str, JsonValue] = {}
    started: str | None = None
    status: Literal["running", "done", "failed"]
    seconds: float | None = None
    error: str | None = None
    stages: list[Stage] = []
    decisions: list[Decision] = []
    confusion: Confusion | None = None
    classes: list[str | int] = []
    axes: list[Axis] = []
    agreement: float | None = None

    @field_validator("stages")
    @classmethod
    def _done(cls, stages: list[Stage]) -> list[Stage]:
        """Leave out what was not done, such as rounds after the last; decisions say why."""
        return [stage for stage in stages if "left out" not in stage.details]


class Epoch(Record):
    """One epoch of training."""

    stage: int
    label: str
    epoch: int
    loss: float | None = None
    terms: dict[str, float | None] = {}
    lr: float | None = None
    val: dict[str, float | None] = {}
    seconds: float | None = None


class Summary(Record):
    """The result: teacher and student side by side."""

    teacher: Measured | None = None
    student: Measured | None = None
    target: dict[str, JsonValue] = {}
    met: bool | None = None
    seconds: float | None = None
    runtime: str | None = None


@dataclass(frozen=True)
class Folder:
    """What a run folder says."""

    run: Run
    epochs: tuple[Epoch, ...]
    summary: Summary | None


R = TypeVar("R", bound=Record)


def read(folder: Path) -> Folder:
    """Read what a run wrote down.

    Args:
        folder: The run's folder. Only run.json must be there: a run that is not finished, or that failed, has no
            summary.json yet.

    Returns:
        The records, checked.

    Raises:
        ArtifactError: If run.json is missing, or a file is not JSON or does not say what it should; names the file.
    """
    if not (folder / RUN).is_file():
        raise ArtifactError(f"{folder} has no {RUN}; give the folder that `slivo run` wrote")
    run = _parse(Run, _text(folder / RUN), str(folder / RUN))
    if run.format > FORMAT:
        raise ArtifactError(
            f"{folder / RUN} has format {run.format}, this slivo reads up to {FORMAT}; upgrade: pip install -U slivo"
        )
    summary = None
    if (folder / SUMMARY).is_file():
        summary = _parse(Summary, _text(folder / SUMMARY), str(folder / SUMMARY))
    return Folder(run, _epochs(folder / EPOCHS), summary)


def _epochs(path: Path) -> tuple[Epoch, ...]:
    if not path.is_file():
        return ()
    lines = _text(path).split("\n")
    # What follows the last newline is empty, or a line that a killed run did not finish.
    rows = [_parse(Epoch, line, f"{path}:{n}") for n, line in enumerate(lines[:-1], 1) if line.strip()]
    # A resumed run may write an epoch again; the later line is the one that counted.
    latest = {(row.stage, row.epoch): row for row in rows}
    return tuple(latest[key] for key in sorted(latest))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def _parse(kind: type[R], text: str, place: str) -> R:
    try:
        return kind.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{place} is not valid JSON: {error}; restore it, or run again") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise ArtifactError(f"{place}: {where}: {first['msg']}, got {first['input']!r:.60}") from error
