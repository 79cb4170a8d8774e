"""The result of a run: teacher and student measured side by side on data that nothing was decided by."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slivo import artifact, edits
from slivo.errors import require
from slivo.export import RUNTIMES, onnx
from slivo.graph import trace
from slivo.measure import agreement, confusion, cost, latency, predictions, quality
from slivo.tasks import Task, loader

BATCHES = (1, 64)
"""Batch sizes at which latency is measured."""

PACKED = "student.slivo"
"""The student as one coded file."""

_REPEATS = {1: 200, 64: 40}

TITLES = {"eager": "PyTorch", "compile": "torch.compile", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
"""What runtimes are called."""

Measured = dict[str, Any]


def summarize(
    models: Mapping[str, nn.Module], task: Task, folder: Path, *, target: Mapping[str, Any], exported: Collection[str]
) -> dict[str, Any]:
    """Return what ``summary.json`` holds, less what only the run knows.

    Args:
        models: ``teacher`` and ``student``, as they were loaded from the folder.
        task: Quality is measured on its test data.
        folder: Of the run, with both artifacts, and both ONNX files if the run exports.
        target: What was asked for.
        exported: To what the run exported: latency is that of ONNX files in ONNX Runtime, or that of the models in
            PyTorch; bytes are those of the packed student, or of the artifacts.
    """
    to_onnx = "onnx" in exported
    places = {name: folder / name for name in models} | ({"student": folder / PACKED} if "packed" in exported else {})
    found = {name: _measured(model, task, places[name]) for name, model in models.items()}
    with TemporaryDirectory(prefix="slivo-") as place:
        runtime, runs = _runs(models, task, folder, Path(place), target.get("runtime"), to_onnx=to_onnx)
        for name, latencies in _latencies(task, runs).items():
            found[name]["latency_ms"] = latencies
    summary: dict[str, Any] = {**found, "target": dict(target)}
    summary["met"] = not misses(summary, task.primary)
    threads = torch.get_num_threads()
    summary["runtime"] = f"{runtime}, {threads} thread{'s' if threads > 1 else ''}"
    return summary


def _latencies(task: Task, runs: Mapping[str, Callable[..., object]]) -> dict[str, dict[str, list[float]]]:
    """Return the median and the 95th percentile of each, by size of batch."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    for size in BATCHES:
        inputs = _batch(task, size)
        for name, run in runs.items():
            p50, p95 = latency(lambda run=run, inputs=inputs: run(*inputs), repeats=_REPEATS[size])  # type: ignore[misc]
            found[name][str(size)] = [p50, p95]
    return found


def misses(summary: Mapping[str, Any], primary: str) -> list[str]:
    """Return in what a result misses its target, a text for each; empty if it is met.

    Args:
        summary: With ``teacher``, ``student`` and ``target``.
        primary: Name of the metric that ``max_drop`` speaks of.

    Example:
        >>> teacher, student = {"macs": 100, "accuracy": 0.99}, {"macs": 41, "accuracy": 0.985}
        >>> misses({"teacher": teacher, "student": student, "target": {"macs": 0.4, "max_drop": 0.01}}, "accuracy")
        ["macs is 41.0% of the teacher's, at most 40.0% was asked for"]
    """
    teacher, student, target = summary["teacher"], summary["student"], summary["target"]
    found = []
    for name in ("macs", "params", "bytes"):
        if name in target and student[name] > target[name] * teacher[name]:
            share = student[name] / teacher[name]
            found.append(f"{name} is {share:.1%} of the teacher's, at most {target[name]:.1%} was asked for")
    if "latency" in target:
        share = student["latency_ms"]["1"][0] / teacher["latency_ms"]["1"][0]
        if share > target["latency"]:
            found.append(f"latency is {share:.1%} of the teacher's, at most {target['latency']:.1%} was asked for")
    if "latency_ms" in target:
        p50 = student["latency_ms"]["1"][0]
        if p50 > target["latency_ms"]:
            found.append(f"latency is {p50:.3g} ms at batch 1, at most {target['latency_ms']:g} ms was asked for")
    if "max_drop" in target:
        drop = teacher[primary] - student[primary]
        # Both are shares of a count of samples: their difference may be off the target by rounding alone.
        if drop > target["max_drop"] + 1e-6:
            found.append(
                f"{primary} fell by {100 * drop:.2f} points, at most {100 * target['max_drop']:.2f} was asked for"
            )
    return found


def compared(models: Mapping[str, nn.Module], task: Task) -> dict[str, Any]:
    """Return what ``run.json`` holds of the comparison: confusion, agreement and widths.

    Confusion and agreement are there for classifications only.
    """
    teacher, student = models["teacher"], models["student"]
    found: dict[str, Any] = {"classes": list(task.classes), "axes": widths(teacher, student, task)}
    if task.kind.endswith("classification"):
        ours, labels = predictions(student, task, "test")
        theirs, _ = predictions(teacher, task, "test")
        count = len(task.classes)
        found["confusion"] = {"teacher": confusion(theirs, labels, count), "student": confusion(ours, labels, count)}
        found["agreement"] = agreement(theirs, ours)
    return found


def widths(teacher: nn.Module, student: nn.Module, task: Task) -> list[dict[str, Any]]:
    """Return the size of each prunable axis of the teacher, and what the student's cuts left of it."""
    left = {
        name: len(kept)
        for edit in edits.record(student)
        if isinstance(edit, edits.Cut)
        for name, kept in edit.axes.items()
    }
    axes = trace(teacher, task.example_inputs).prunable
    return [{"name": axis.name, "before": axis.size, "after": left.get(axis.name, axis.size)} for axis in axes]


def _measured(model: nn.Module, task: Task, saved: Path) -> Measured:
    counted = cost(model, task.example_inputs)
    return {
        **quality(model, task, "test"),
        "params": counted.params,
        "macs": counted.macs,
        "bytes": artifact.size_bytes(saved),
    }


def _batch(task: Task, size: int) -> tuple[Any, ...]:
    """Return the model's arguments for a batch of the test data; samples come again where there are too few."""
    inputs = task.inputs(next(iter(loader(task, "test", batch_size=size))))
    return tuple(_sized(value, size) for value in inputs)


def _sized(value: Any, size: int) -> Any:
    if not isinstance(value, Tensor) or not value.dim() or len(value) >= size:
        return value
    return value[torch.arange(size) % len(value)]


def _exported(path: Path) -> Callable[..., object]:
    run = onnx.runner(path, threads=torch.get_num_threads())
    return lambda *inputs: run(*(np.asarray(value) for value in inputs))


def _in_pytorch(model: nn.Module) -> Callable[..., object]:
    model.eval()

    def run(*inputs: Any) -> object:
        with torch.inference_mode():
            return model(*inputs)

    return run


def _runs(
    models: Mapping[str, nn.Module], task: Task, folder: Path, place: Path, runtime: str | None, *, to_onnx: bool
) -> tuple[str, dict[str, Callable[..., object]]]:
    """Return the runtime's name and version, and what runs each model on it."""
    if runtime is not None and (runtime, to_onnx) != ("onnxruntime", True):
        call = tuple(task.example_inputs), dict[str, object]()
        version, *runs = RUNTIMES[runtime]([*models.values()], call, torch.get_num_threads(), place)
        return f"{TITLES[runtime]} {version}", dict(zip(models, runs, strict=True))
    if not to_onnx:
        return f"PyTorch {torch.__version__}", {name: _in_pytorch(model) for name, model in models.items()}
    version = require("onnxruntime", extra="export", why="running ONNX files").__version__
    return f"ONNX Runtime {version}", {name: _exported(folder / f"{name}.onnx") for name in models}
