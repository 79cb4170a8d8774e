"""What is drawn on a terminal, and what is printed where there is none."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import pytest
from rich.console import Console

from slivo import console

RECORD: Mapping[str, Any] = {
    "label": "distill",
    "seconds": 3.2,
    "after": {"accuracy": 0.9917, "params": 1200, "macs": 34_000, "bytes": 5_600},
}
TEACHER = {"accuracy": 0.99, "params": 1000, "macs": 5000, "bytes": 900, "latency_ms": {"1": [0.2, 0.3]}}
STUDENT = {"accuracy": 0.985, "params": 100, "macs": 1000, "bytes": 90, "latency_ms": {"1": [0.25, 0.15]}}
SUMMARY = {
    "teacher": TEACHER, "student": STUDENT, "target": {"macs": 0.4}, "runtime": "PyTorch", "seconds": 3.0, "seed": 1,
}  # fmt: skip


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(console, "out", lambda: Console(file=stream, force_terminal=True, width=120, highlight=False))
    return stream


def test_on_a_terminal_there_is_a_bar_with_rate_and_time_left(terminal: io.StringIO) -> None:
    with console.watching(quiet=False) as watch:
        assert isinstance(watch, console.Bars)
        watch.started("distill", 1, 3)
        for done in range(50):
            watch.progress("distill", done, 100, {"loss": 0.5})
            watch.progress_bars.refresh()
        watch.finished(RECORD)
        watch.started("measure", 3, 3)
        watch.progress_bars.refresh()
    text = terminal.getvalue()
    for part in ("[2/3] distill", "49/100", "/s", " left", "loss 0.500", "34 k MACs", "99.17 %", "[3/3] measuring"):
        assert part in text


def test_without_a_terminal_there_are_plain_lines_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.watching(quiet=False) as watch:
        watch.started("distill", 0, 2)
        for done in range(101):
            now[0] += 0.2
            watch.progress("distill", done, 100, {})
        watch.finished(RECORD)
        watch.started("measure", 2, 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1/2] distill: 24/100 steps, 4.8/s, 15.8 s left"
    assert len(lines) == 6  # one in five seconds, of twenty
    assert lines[-2:] == [
        "[1/2] distill: 34 k MACs, 5.60 kB, validation accuracy 99.17 % (3.2 s)",
        "measuring teacher and student on the test data",
    ]


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with console.watching(quiet=True) as watch:
        watch.started("distill", 0, 2)
        watch.progress("distill", 1, 2, {})
        watch.finished(RECORD)
    assert capsys.readouterr().out == ""


def test_the_result_says_what_was_met_and_what_got_slower(capsys: pytest.CaptureFixture[str]) -> None:
    console.result(SUMMARY, ["macs [is] too many"], "runs/[x]", None)
    text = capsys.readouterr().out
    for part in ("−0.50 points", "20.0 %", "1.2× slower", "2.0× faster", "missed: macs [is] too many", "runs/[x]"):
        assert part in text
    console.result({**SUMMARY, "target": {}}, [], "x", "x/report.html")
    text = capsys.readouterr().out
    assert "target" not in text
    assert "open x/report.html" in text


def test_medians_are_of_each_column(capsys: pytest.CaptureFixture[str]) -> None:
    others = [{**SUMMARY, "student": {**STUDENT, "macs": macs, "accuracy": 0.99}} for macs in (500, 3000)]
    assert console.seeds([SUMMARY, *others], "accuracy") == pytest.approx((0.2, 0.1, 0.0))
    assert "median" in capsys.readouterr().out
