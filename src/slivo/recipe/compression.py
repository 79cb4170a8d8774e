"""Compress a network that is at hand, by a recipe."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from slivo.errors import TargetError
from slivo.recipe.load import Loaded, load
from slivo.recipe.run import Result, run
from slivo.recipe.schema import Goal
from slivo.recipe.watch import Watch
from slivo.tasks import Task


@dataclass(frozen=True)
class Target:
    """What the student must reach; costs are shares of the teacher's.

    Args:
        macs: Share of the multiply-accumulates, 0-1.
        params: Share of the parameters, 0-1.
        bytes: Share of the bytes on disk, 0-1.
        latency: Share of the median latency at batch 1, 0-1, on the same runtime.
        latency_ms: Median milliseconds at batch 1.
        runtime: What latency is measured on: ``eager``, ``compile``, ``onnxruntime`` or ``openvino``. Default: ONNX
            Runtime if the recipe exports to it, otherwise PyTorch.
        max_drop: How much of the task's metric may be lost, 0-1; 0.01 is one point of accuracy.

    Raises:
        TargetError: If a value is out of range.

    Example:
        >>> Target(macs=0.5, max_drop=0.01).macs
        0.5
        >>> Target(macs=50)
        Traceback (most recent call last):
        slivo.errors.TargetError: target macs is 50; a share between 0 and 1 (0.5 keeps half)
    """

    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    latency: float | None = None
    latency_ms: float | None = None
    runtime: str | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        try:
            Goal.model_validate(self.given())
        except ValidationError as error:
            name = str(error.errors()[0]["loc"][0])
            allowed = Goal.model_fields[name].description
            raise TargetError(f"target {name} is {getattr(self, name)!r}; {allowed}") from None

    def given(self) -> dict[str, float | str]:
        """Return what is asked for, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def compress(
    model: nn.Module,
    task: Task,
    recipe: str | os.PathLike[str] | Mapping[str, Any] = "prune-then-distill",
    target: Target | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    settings: Sequence[str] = (),
    seed: int = 0,
    resume: bool = False,
    watch: Watch | None = None,
) -> Result:
    """Return a smaller, faster model that does as well, made by a recipe from a trained one.

    Args:
        model: The trained model; it is the teacher, and is left untouched.
        task: Data, loss and metrics; see `slivo.tasks`.
        recipe: The name of a recipe that ships, a YAML file, or a mapping. Its task and teacher are not used.
        target: What to reach, in place of what the recipe says.
        out: A folder for all that the run writes: artifacts, exports, ``summary.json``. None leaves nothing behind.
        settings: Changes to the recipe, as ``"stages.1.distill.epochs=5"``.
        seed: Of everything random.
        resume: Go on with an interrupted run in ``out``.
        watch: Hears of progress.

    Returns:
        The student and how it compares; ``result.met`` says whether the target was reached, ``result.misses`` where
        not.

    Raises:
        RecipeError: If the recipe is not valid.
        TargetError: If a budget cannot be met.
        ShapeError: If the model does not fit the task.
        OutputError: If the folder is taken or cannot be written to.
        SlivoError: If a stage fails.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from slivo.tasks import classification
        >>> data = TensorDataset(torch.randn(64, 8), torch.arange(64) % 2)
        >>> task = classification("noise", data, data, data, classes="ab", example_inputs=(torch.randn(2, 8),))
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> recipe = {"stages": [{"prune": {"criterion": "l2"}}, {"distill": {"losses": ["kd"], "epochs": 1}}]}
        >>> result = compress(net, task, recipe, Target(macs=0.5))
        >>> result.model[0].out_features, result.met
        (16, True)
    """
    found = load(recipe, settings, target=None if target is None else target.given())
    loaded = Loaded(found.recipe.model_copy(update={"task": None, "teacher": None}), found.source)
    if out is not None:
        return run(loaded, out, seed=seed, resume=resume, watch=watch, task=task, model=model)
    with tempfile.TemporaryDirectory(prefix="slivo-") as folder:
        return run(loaded, Path(folder) / "run", seed=seed, watch=watch, task=task, model=model)
