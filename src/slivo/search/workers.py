"""Several workers on one machine: processes that each do what a worker elsewhere would."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from slivo.errors import SlivoError
from slivo.search.record import Row

_POLL = 0.2


def many(
    jobs: int,
    told: tuple[Any, ...],
    deadline: float | None,
    rows: Callable[[], Sequence[Row]],
    tell: Callable[[Row], None],
) -> None:
    """Let processes work until there are enough trials.

    Args:
        jobs: How many processes.
        told: What each is told: the first arguments of `slivo.search.study.join`.
        deadline: On the clock of `time.monotonic`, or None.
        rows: Returns the trials so far.
        tell: Hears of each trial that is over.

    Raises:
        SlivoError: If the task or model cannot be sent to other processes, or a process breaks down.
    """
    spawn = multiprocessing.get_context("spawn")
    stop, errors = spawn.Event(), spawn.Queue()
    threads = max(1, torch.get_num_threads() // jobs)
    left = None if deadline is None else deadline - time.monotonic()
    try:
        pickle.dumps(told)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SlivoError(
            f"the task or model cannot be sent to other processes: {error}; name them in the recipe, or leave jobs at 1"
        ) from error
    sent = (told, left, threads, stop, errors)
    workers = [spawn.Process(target=_work, args=sent) for _ in range(jobs)]
    heard = {row.number for row in rows() if row.state != "running"}
    try:
        for each in workers:
            each.start()
        while any(each.is_alive() for each in workers):
            time.sleep(_POLL)
            _hear(rows(), heard, tell)
    finally:
        stop.set()
        for each in workers:
            each.join()
        _hear(rows(), heard, tell)
    found = [errors.get() for _ in range(errors.qsize())]
    if found:
        raise SlivoError(found[0])
    if all(each.exitcode for each in workers):
        raise SlivoError(f"the workers broke down (exit code {workers[0].exitcode}); try jobs=1 to see why")


def _hear(rows: Sequence[Row], heard: set[int], tell: Callable[[Row], None]) -> None:
    for row in rows:
        if row.state != "running" and row.number not in heard:
            heard.add(row.number)
            tell(row)


def _work(told: tuple[Any, ...], left: float | None, threads: int, stop: Any, errors: Any) -> None:
    """Be one of the processes; it ends when the event is set, and leaves interrupts to the one that started it."""
    from slivo.search.study import join

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    try:
        join(*told, timeout=left, stopped=stop.is_set)
    except SlivoError as error:
        errors.put(str(error))
