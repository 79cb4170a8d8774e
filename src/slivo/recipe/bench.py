"""Measure artifacts on runtimes, against the teacher and on the task of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from slivo import artifact, export
from slivo.errors import RecipeError
from slivo.export import Row
from slivo.measure import quality
from slivo.recipe import folder as files
from slivo.recipe.load import load
from slivo.recipe.prepare import task_of


def bench(
    model: nn.Module,
    example_inputs: Any,
    *,
    folder: Path | None = None,
    teacher: Path | None = None,
    runtimes: Sequence[str] = (),
    batches: Sequence[int] = (1, 32),
    threads: int = 1,
    repeats: int = 50,
) -> list[Row]:
    """Time a network on each runtime (`slivo.export.bench`), and measure it there on the task of a run.

    Args:
        model: The network.
        example_inputs: As for `slivo.export.bench`.
        folder: Of a run, whose recipe names the task; its teacher is compared with unless another is given. None for
            latencies alone.
        teacher: The artifact to compare with.
        runtimes: As for `slivo.export.bench`, and so are the others.
        batches: Sizes of batches.
        threads: That each may use.
        repeats: Calls that are timed.

    Raises:
        RecipeError: If the run was of a task that only its caller had.
        ArtifactError: If an artifact is damaged.
    """
    judge = None
    if folder is not None:
        loaded = load(files.read_json(folder / files.RUN)["recipe"])
        if loaded.recipe.task is None:
            raise RecipeError(f"{folder} is a run of a task that its recipe does not name; leave --run out")
        task = task_of(loaded)
        teacher = teacher or folder / "teacher"

        def judge(network: nn.Module) -> dict[str, float]:
            return quality(network, task)

    return export.bench(
        model,
        example_inputs,
        teacher=None if teacher is None else artifact.load(teacher),
        runtimes=runtimes,
        batches=batches,
        threads=threads,
        repeats=repeats,
        judge=judge,
    )
