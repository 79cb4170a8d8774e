"""The book of a run, which becomes ``run.json``: how it begins, and whether it is the one to go on with."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import slivo
from slivo.errors import ArtifactError, SlivoError
from slivo.recipe import folder as files
from slivo.recipe.plan import Step
from slivo.recipe.prepare import Job


def opened(path: Path, job: Job) -> dict[str, Any]:
    """Make the folder; returns an empty book."""
    files.open_new(path)
    return {
        "format": files.FORMAT,
        "slivo": slivo.__version__,
        "name": job.loaded.recipe.name,
        "task": {"kind": job.task.kind, "name": job.task.name, "primary": job.task.primary},
        "seed": job.seed,
        "recipe": job.loaded.recipe.plain(),
        "machine": _machine(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "running",
        "seconds": 0.0,
        "stages": [],
        "decisions": [],
    }


def reopened(path: Path, job: Job) -> dict[str, Any]:
    """Return what a run wrote down, if it was a run of this job."""
    book = files.read_json(path / files.RUN)
    if book.get("format") != files.FORMAT:
        raise ArtifactError(f"{path / files.RUN} has format {book.get('format')}; this version resumes {files.FORMAT}")
    for name, value in (("seed", job.seed), ("recipe", job.loaded.recipe.plain())):
        if book.get(name) != value:
            raise SlivoError(
                f"{path} holds a run of another {name}; resume with the one it was started with, or start anew in "
                "another folder (--out)"
            )
    return book


@contextmanager
def warnings() -> Iterator[list[str]]:
    """Collect what the library warns of, so that it is not lost with the terminal."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("slivo")
    log.addHandler(handler)
    try:
        yield found
    finally:
        log.removeHandler(handler)


def setbacks(history: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """Yield the times that a stage's trainings went back to their last good epoch, as decisions."""
    for row in history:
        for note in row.get("rolled_back", ()):
            why = f"{note['why']}; on from the last good epoch at half the learning rate, {note['lr']:g}"
            yield {"what": "rolled back", "why": why}


def row(index: int, step: Step, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a training as a line of ``metrics.jsonl``."""
    return {"stage": index, "label": step.label, **row}


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu() -> str:
    """Return the processor's name; platform.processor() is empty on most Linux systems."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
