"""Signals that ask a run to stop: it does so between two steps, or within seconds wherever it is."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SOFT, HARD = 2.0, 4.0
"""Seconds after which a run that has not stopped by itself is interrupted, and ended."""


class Stop:
    """Whether a run was asked to stop; called after each step of a training.

    Attributes:
        signal: The number of the signal that asked, or 0.
        late: Whether it has taken so long that whatever is being done is broken off.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.late = False

    def __call__(self) -> bool:
        """Tell whether to stop."""
        return self.signal != 0

    @property
    def code(self) -> int:
        """The exit code by which shells know what ended a process: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)


@contextmanager
def stopping(end: Callable[[Stop], None]) -> Iterator[Stop]:
    """Turn Ctrl-C and SIGTERM into a request to stop, which is carried out one way or another.

    At first a training gets the time to finish its step and write a checkpoint. After two seconds whatever is being
    done is broken off by a `KeyboardInterrupt`. After four, or at the second signal, ``end`` is called in another
    thread and must end the process at once; since every file is whole at any instant, nothing is lost.

    Args:
        end: Says how to go on, and ends the process.

    Yields:
        What a run asks.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals are not for this thread to handle
        return

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        stop.signal = stop.signal or number
        if stop.late:
            raise KeyboardInterrupt

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
    guard = threading.Thread(target=_guard, args=(reader, stop, end, threading.get_ident()), daemon=True)
    guard.start()
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        signal.set_wakeup_fd(woken)
        os.close(writer)  # which ends the guard
        guard.join()
        os.close(reader)


def _guard(reader: int, stop: Stop, end: Callable[[Stop], None], main: int) -> None:
    """Wait for signals; bytes come even while the main thread is in code that does not look at them."""
    got = _next(reader, None)
    if not got:
        return
    stop.signal = stop.signal or got
    began = time.monotonic()
    got = _next(reader, SOFT)
    if got == 0:
        return
    if got is None:
        stop.late = True
        signal.pthread_kill(main, stop.signal)  # ends what waits for a file or another process, too
        _next(reader, 0.1)  # which is the one just sent
        got = _next(reader, HARD - (time.monotonic() - began))
        if got == 0:
            return
    end(stop)


def _next(reader: int, seconds: float | None) -> int | None:
    """Return the next signal's number; 0 at the end, None if there was none in that time."""
    ready, _, _ = select.select([reader], [], [], None if seconds is None else max(0.0, seconds))
    if not ready:
        return None
    found = os.read(reader, 1)
    return found[0] if found else 0
