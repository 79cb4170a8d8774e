"""What a network takes on each runtime that there is, against another on the same runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slivo.errors import SlivoError, require
from slivo.export import onnx
from slivo.graph import ExampleInputs, as_args
from slivo.graph.capture import evaluating, quiet, trying
from slivo.graph.inputs import batch_size
from slivo.measure.latency import timings
from slivo.options import is_count, said

Run = Callable[..., Any]
"""Of the tensors of a call, in order; returns the outputs."""

_TURNS = 5


@dataclass(frozen=True)
class Row:
    """What was measured on one runtime with one size of batch.

    Args:
        runtime: Its name.
        version: Its version; "" where it could not be used.
        batch: Samples in a call.
        threads: That it may use.
        p50_ms: Median milliseconds of a call; None where it could not be used.
        p95_ms: 95th percentile.
        teacher_p50_ms: Median of the teacher, on the same runtime, in turns.
        faster: How many times faster than the teacher: the median over turns.
        metrics: Of the network, run by that runtime.
        reason: Why it could not be used.
    """

    runtime: str
    version: str
    batch: int
    threads: int
    p50_ms: float | None = None
    p95_ms: float | None = None
    teacher_p50_ms: float | None = None
    faster: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


class Running(nn.Module):
    """A network as a runtime runs it, to be measured like any other: the first output for the inputs."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the first output."""
        first = pytree.tree_leaves(self.run(*inputs))[0]
        return first if isinstance(first, Tensor) else torch.from_numpy(np.asarray(first))


def bench(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    teacher: nn.Module | None = None,
    runtimes: Sequence[str] = (),
    batches: Sequence[int] = (1, 32),
    threads: int = 1,
    repeats: int = 50,
    judge: Callable[[nn.Module], Mapping[str, float]] | None = None,
) -> list[Row]:
    """Time a network on each runtime that is installed, with the teacher beside it on the same one.

    Teacher and network are timed in five turns each, so that whatever else the machine does befalls both. Runtimes
    alone differ by factors of three to four: a network is fast only against the teacher on the runtime that it will
    have.

    Args:
        model: Run in evaluation mode, on the CPU; left as it was.
        example_inputs: A tensor, a tuple of positional arguments or a mapping of keyword arguments; the first dimension
            of each is the batch, and samples are repeated to make up others.
        teacher: What to compare with, in floating point as a rule. None for no comparison.
        runtimes: Names of `RUNTIMES`; none for all.
        batches: Sizes of batches.
        threads: That each may use.
        repeats: Calls that are timed for each network, after others that are not.
        judge: Measures a network, such as ``lambda net: slivo.measure.quality(net, task)``; called once a runtime with
            what it runs.

    Returns:
        One row for each runtime and size of batch. A runtime that is not installed, or does not take the network, has
        one that says so.

    Raises:
        SlivoError: If a runtime is not known, or a number is below 1.

    Example:
        >>> rows = bench(nn.Linear(4, 2), torch.randn(2, 4), runtimes=["eager"], batches=[1], repeats=20)
        >>> rows[0].runtime, rows[0].threads, rows[0].p50_ms > 0
        ('eager', 1, True)
    """
    for name in runtimes:
        if name not in RUNTIMES:
            raise SlivoError(f"{said(name)} is no runtime; there are {', '.join(RUNTIMES)}")
    for what, value in (("threads", threads), ("repeats", repeats), *(("a size of batches", each) for each in batches)):
        if not is_count(value, least=1):
            raise SlivoError(f"{what} is {said(value)}; a whole number of at least 1")
    args, kwargs = as_args(example_inputs)
    rows = []
    models = [model] if teacher is None else [model, teacher]
    with tempfile.TemporaryDirectory(prefix="slivo-") as folder, _threads(threads), ExitStack() as stack:
        for each in models:
            stack.enter_context(evaluating(each))
        for name in runtimes or RUNTIMES:
            try:
                with quiet():
                    version, *runs = RUNTIMES[name](models, (args, kwargs), threads, Path(folder))
                    found = [_row(name, version, runs, (args, kwargs), size, threads, repeats) for size in batches]
                    metrics = dict(judge(Running(runs[0]))) if judge is not None else {}
            except Exception as error:  # of any kind: the runtimes' own
                text = str(error).strip().splitlines() or [type(error).__name__]
                rows.append(Row(name, "", 0, threads, reason=text[0]))
                continue
            rows += [Row(**{**vars(row), "metrics": metrics}) for row in found]
    return rows


def _row(name: str, version: str, runs: Sequence[Run], call: onnx.Inputs, size: int, threads: int, repeats: int) -> Row:
    """Time networks in turns."""
    inputs = [value for value in pytree.tree_leaves(sized(call, size)) if isinstance(value, Tensor)]
    each = -(-repeats // _TURNS)
    found: list[list[list[float]]] = [[] for _ in runs]
    for turn in range(_TURNS):
        for run, times in zip(runs, found, strict=True):
            times.append(timings(lambda run=run: run(*inputs), repeats=each, warmup=5 if turn == 0 else 1))  # type: ignore[misc]
    p50, p95 = (float(value) for value in np.percentile(np.concatenate(found[0]), [50, 95]))
    if len(runs) == 1:
        return Row(name, version, size, threads, p50, p95)
    medians = np.median(np.array(found), axis=2)
    teacher = float(np.median(np.concatenate(found[1])))
    return Row(name, version, size, threads, p50, p95, teacher, float(np.median(medians[1] / medians[0])))


def sized(call: onnx.Inputs, size: int) -> onnx.Inputs:
    """Return a call with batches of another size; samples come again where there are too few."""
    whole = batch_size(call[0] or call[1])

    def one(x: Any) -> Any:
        return x[torch.arange(size) % whole] if isinstance(x, Tensor) and x.dim() and len(x) == whole else x

    made: onnx.Inputs = pytree.tree_map(one, call)
    return made


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Have PyTorch use so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _in_pytorch(model: nn.Module, function: Run, call: onnx.Inputs) -> Run:
    """Return a function of the tensors of a call."""
    _, spec = pytree.tree_flatten(call)
    leaves = pytree.tree_leaves(call)

    def run(*tensors: Tensor) -> Any:
        given = iter(tensors)
        args, kwargs = pytree.tree_unflatten([next(given) if isinstance(x, Tensor) else x for x in leaves], spec)
        with torch.no_grad():
            return function(*args, **kwargs)

    with trying(model):
        run(*(x for x in leaves if isinstance(x, Tensor)))
    return run


def _eager(models: Sequence[nn.Module], call: onnx.Inputs, threads: int, folder: Path) -> tuple[Any, ...]:
    del threads, folder
    return torch.__version__, *(_in_pytorch(model, model, call) for model in models)


def _compiled(models: Sequence[nn.Module], call: onnx.Inputs, threads: int, folder: Path) -> tuple[Any, ...]:
    del threads, folder
    compiled = [torch.compile(model, dynamic=False) for model in models]
    return torch.__version__, *(_in_pytorch(m, c, call) for m, c in zip(models, compiled, strict=True))


def _exported(models: Sequence[nn.Module], call: onnx.Inputs, folder: Path) -> list[Path]:
    """Write models that are not written yet."""
    files = [folder / f"{number}.onnx" for number in range(len(models))]
    for file, model in zip(files, models, strict=True):
        if not file.exists():
            onnx.export(model, file, call[0] or call[1])
    return files


def _onnxruntime(models: Sequence[nn.Module], call: onnx.Inputs, threads: int, folder: Path) -> tuple[Any, ...]:
    version = require("onnxruntime", extra="export", why="running ONNX files").__version__
    runs = [onnx.runner(file, threads=threads) for file in _exported(models, call, folder)]
    return version, *((lambda *x, run=run: run(*(each.numpy() for each in x))) for run in runs)


def _openvino(models: Sequence[nn.Module], call: onnx.Inputs, threads: int, folder: Path) -> tuple[Any, ...]:
    openvino = require("openvino", extra="openvino", why="OpenVINO")
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    made = [openvino.Core().compile_model(str(file), "CPU", settings) for file in _exported(models, call, folder)]
    return openvino.__version__, *(
        (lambda *x, run=run: list(run([each.numpy() for each in x]).values())) for run in made
    )


RUNTIMES: Mapping[str, Callable[..., tuple[Any, ...]]] = {
    "eager": _eager,
    "compile": _compiled,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
"""The runtimes by name: PyTorch as it is, `torch.compile`, ONNX Runtime and OpenVINO in float32."""
