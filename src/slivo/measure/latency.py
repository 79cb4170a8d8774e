"""Latency: how long one call takes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from time import perf_counter_ns

import numpy as np
import torch
from torch import nn

from slivo.errors import SlivoError
from slivo.graph import ExampleInputs
from slivo.graph.capture import trying
from slivo.graph.inputs import fresh

Timer = Callable[[nn.Module], float]
"""``timer(model)``: how long one call of the model takes, in milliseconds, on whatever machine or runtime."""
Rounds = list[tuple[float, float]]
"""Milliseconds of a model and of another, timed one after the other, round by round."""

_ROUGH, _ROUNDS, _MOST = 3, 5, 30  # rounds of timings: for a table, for a verdict, and while they do not agree
_SURE = 0.005  # standard error of the median share at which no more rounds are needed


def latency(run: Callable[[], object], *, repeats: int = 50, warmup: int = 5) -> tuple[float, float]:
    """Time calls on the wall clock, one by one.

    Args:
        run: Does the work; for a device that computes in the background it must wait for the result.
        repeats: Calls that are timed. The 95th percentile needs 20 at least to mean something.
        warmup: Calls before those, in which caches fill and kernels are chosen.

    Returns:
        Median and 95th percentile, in milliseconds.

    Raises:
        SlivoError: If no call is to be timed.

    Example:
        >>> p50, p95 = latency(lambda: sum(range(1000)), repeats=20)
        >>> 0 < p50 <= p95
        True
    """
    p50, p95 = np.percentile(timings(run, repeats=repeats, warmup=warmup), [50, 95])
    return float(p50), float(p95)


def timings(run: Callable[[], object], *, repeats: int, warmup: int) -> list[float]:
    """Return the milliseconds of each call, as `latency` times them.

    Raises:
        SlivoError: If no call is to be timed.
    """
    if repeats < 1 or warmup < 0:
        raise SlivoError(f"repeats is {repeats} and warmup is {warmup}; at least 1 and 0 are needed")
    for _ in range(warmup):
        run()
    times = []
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of a call is not the call's
    try:
        for _ in range(repeats):
            start = perf_counter_ns()
            run()
            times.append((perf_counter_ns() - start) / 1e6)
    finally:
        if collecting:
            gc.enable()
    return times


def clock(example_inputs: ExampleInputs, *, lasting_ms: float = 50.0) -> Timer:
    """Return what times models in PyTorch, on the device and with the threads that there are.

    Args:
        example_inputs: What the models are called with: a tensor, a tuple of positional arguments or a mapping of
            keyword arguments, on the models' device. The size of the batch matters.
        lasting_ms: About how long one timing lasts. Fast models are called up to 100 times, slow ones three times.

    Returns:
        The timer: evaluates a model without gradients, and returns the median of the calls.

    Example:
        >>> time = clock(torch.randn(2, 3), lasting_ms=1.0)
        >>> time(nn.Linear(3, 4)) > 0
        True
    """
    args, kwargs = fresh(example_inputs)

    def time(model: nn.Module) -> float:
        def run() -> None:
            model(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        with trying(model), torch.inference_mode():
            once, _ = latency(run, repeats=1, warmup=1)
            return latency(run, repeats=int(np.clip(lasting_ms / max(once, 1e-6), 3, 100)), warmup=0)[0]

    return time


@dataclass(frozen=True)
class Timing:
    """How long a model takes.

    Args:
        ms: Milliseconds of one call, the median of the rounds.
        share: What that is of the other model, the median over rounds in which both were timed one after the other.
    """

    ms: float
    share: float


def compare(timer: Timer, model: nn.Module, other: nn.Module, *, rough: bool = False) -> Timing:
    """Time a model against another, in turns, so that whatever else the machine does befalls both alike.

    Args:
        timer: Returns the milliseconds of one call of a model.
        model: What the share is of.
        other: The model to be timed.
        rough: Whether three rounds are enough.

    Returns:
        Medians over 5 rounds, and over up to 30 while the shares of the rounds spread so much that the standard error
        of their median is above 0.5 %.

    Raises:
        SlivoError: If the timer returns anything but a number above 0.

    Example:
        >>> times = {nn.Identity: 4.0, nn.ReLU: 1.0}
        >>> compare(lambda model: times[type(model)], nn.Identity(), nn.ReLU())
        Timing(ms=1.0, share=0.25)
    """
    return verdict(rounds(timer, model, other, rough=rough))


def rounds(timer: Timer, model: nn.Module, other: nn.Module, *, rough: bool = False) -> Rounds:
    """Time a model and another in turns, round by round."""
    found: Rounds = []
    least, most = (_ROUGH, _ROUGH) if rough else (_ROUNDS, _MOST)
    while len(found) < least or (len(found) < most and _spread(found) > _SURE):
        base = _timed(timer, model)
        found.append((base, _timed(timer, other)))
    return found


def verdict(found: Rounds) -> Timing:
    """Return the medians of rounds."""
    pairs = np.array(found)
    return Timing(float(np.median(pairs[:, 1])), float(np.median(pairs[:, 1] / pairs[:, 0])))


def _timed(timer: Timer, model: nn.Module) -> float:
    value = timer(model)
    if not isinstance(value, Real) or not isfinite(value) or value <= 0:
        raise SlivoError(f"the timer returned {value!r}; it must return the milliseconds of one call, a number above 0")
    return float(value)


def _spread(found: Rounds) -> float:
    """Return the standard error of the median share, by the median absolute deviation of normal noise."""
    shares = np.array([after / before for before, after in found])
    deviation = 1.4826 * np.median(np.abs(shares - np.median(shares)))
    return float(1.2533 * deviation / np.median(shares) / len(shares) ** 0.5)
