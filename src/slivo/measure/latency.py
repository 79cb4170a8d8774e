"""Latency: how long one call takes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from time import perf_counter_ns

import numpy as np

from slivo.errors import SlivoError


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
    p50, p95 = np.percentile(times, [50, 95])
    return float(p50), float(p95)
