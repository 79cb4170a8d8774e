"""The page of a run: whole, alone, true to the records, and able to say that something is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from report.browser import visit
from report.runs import build, epochs, run, summary
from slivo import report
from slivo.errors import ArtifactError

FAILED = {"format": 1, "name": "x", "status": "failed", "error": "out of luck"}


def page(folder: Path, **records: Any) -> str:
    return report.write(build(folder, **records)).read_text(encoding="utf-8")


@pytest.fixture
def whole(tmp_path: Path) -> str:
    return page(tmp_path / "run", run=run(), epochs=epochs(), summary=summary())


def test_in_a_browser_there_is_no_error_and_no_request_to_any_host(tmp_path: Path) -> None:
    folder = build(tmp_path / "run", run=run(), epochs=epochs(), summary=summary())
    seen = visit(report.write(folder), tmp_path)
    assert seen.console == []
    assert seen.requests == []
    assert seen.dom.count("main-svg") >= 3  # the charts are drawn


def test_the_browser_would_have_seen_an_error_and_a_request(tmp_path: Path) -> None:
    file = tmp_path / "bad.html"
    file.write_text('<script>console.error("oops"); missing()</script><img src="http://127.0.0.1:9/a.png">')
    seen = visit(file, tmp_path)
    assert seen.console[0] == "oops"
    assert "missing is not defined" in seen.console[1]
    assert seen.requests == ["http://127.0.0.1:9/a.png"]


def test_the_page_loads_nothing(whole: str) -> None:
    outside = re.sub(r"<script.*?</script>", "", whole, flags=re.S)
    assert not re.findall(r'(?:src|href)="(?!#|student|teacher|data:)[^"]*"', outside)
    assert not re.findall(r"@import|url\((?!data:|#)", re.sub(r"<script.*?</script>", "", whole, flags=re.S))
    assert "default-src 'none'" in whole  # and the browser would not let it


def test_the_figures_are_those_of_the_records(whole: str) -> None:
    text = " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<script.*?</script>", "", whole, flags=re.S)).split())
    for figure in (
        "98.66 %", "98.33 %", "−0.33 points", "4.79 M", "1.19 M", "452 kB", "33.5 kB", "112 k", "28.1 k", "0.284 ms",
        "0.0912 ms", "9.84 ms", "2.71 ms", "24.9 %", "7.4 %", "Target met", "prune 3/3", "1 min 1 s", "AMD EPYC",
        "onnxruntime 1.31.1, 2 threads", "the last layer stays in float32",
    ):  # fmt: skip
        assert figure in text, figure


def test_the_same_records_give_the_same_bytes(whole: str, tmp_path: Path) -> None:
    assert page(tmp_path / "again", run=run(), epochs=epochs(), summary=summary()) == whole


def test_names_are_not_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    book = run() | {"name": evil, "classes": [evil] * 10}
    book["stages"][1]["label"] = evil
    book["axes"][0]["name"] = evil
    book["decisions"][0]["why"] = evil
    text = page(tmp_path / "run", run=book, epochs=epochs(), summary=summary())
    assert evil not in text
    seen = visit(tmp_path / "run" / "report.html", tmp_path)
    assert seen.console == []
    assert evil not in seen.dom


@pytest.mark.parametrize(
    "missing", ["confusion", "classes", "axes", "agreement", "decisions", "machine", "recipe", "seed"]
)
def test_what_was_not_written_down_is_left_out(tmp_path: Path, missing: str) -> None:
    book = run()
    del book[missing]
    assert "Teacher and student" in page(tmp_path / "run", run=book, epochs=epochs(), summary=summary())


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ({"run": FAILED}, "out of luck"),
        ({"run": {"status": "running", "name": "mine"}}, "mine"),
        ({"run": run() | {"status": "running", "stages": run()["stages"][:3]}, "epochs": epochs()[:14]}, "prune 2/3"),
        ({"run": run() | {"status": "failed", "stages": run()["stages"][:1]}, "epochs": epochs()[:10]}, "teacher"),
        (
            {"run": run(), "summary": summary() | {"met": False, "target": {"macs": 0.1, "latency_ms": 0.01}}},
            "target not met",
        ),
        ({"run": run(), "summary": summary() | {"target": {}, "met": True}}, "Teacher and student"),
        ({"run": run(), "epochs": [{**row, "loss": None, "val": {}} for row in epochs()]}, "Training"),
    ],
)
def test_a_run_that_is_not_whole_has_a_page_too(tmp_path: Path, records: dict[str, Any], said: str) -> None:
    assert said.lower() in page(tmp_path / "run", **records).lower()
    seen = visit(tmp_path / "run" / "report.html", tmp_path, width=420)
    assert seen.console == []


def test_stages_that_were_not_done_are_no_rows_and_latencies_are_compared(tmp_path: Path) -> None:
    whole = run()
    last = {**whole["stages"][-1], "index": 99, "label": "round 9 of 9", "details": {"left out": "no need"}}
    target = {"latency": 0.5, "latency_ms": 0.01, "runtime": "onnxruntime"}
    records = {"run": {**whole, "stages": [*whole["stages"], last]}, "summary": summary() | {"target": target}}
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page(tmp_path / "run", **records)))
    assert "round 9 of 9" not in text
    assert "32.1 %" in text
    assert "≤ 0.0100 ms" in text
    assert "0.0912 ms" in text


def test_another_kind_of_task_shows_its_own_metrics(tmp_path: Path) -> None:
    book = {**run(), "confusion": None, "classes": []}
    for stage in book["stages"]:
        for measured in (stage["before"], stage["after"]):
            if measured is not None and "accuracy" in measured:  # one stage's after is the next one's before
                measured["wer"] = 1 - measured.pop("accuracy")
    costs = {"params": 100, "macs": 1000, "bytes": 400}
    result = {"teacher": {"wer": 0.11, "mae": 0.5, **costs}, "student": {"wer": 0.128, "mae": 0.5, **costs}}
    text = page(tmp_path / "run", run=book, summary={**result, "target": {"max_drop": 0.05}, "met": True})
    for figure in ("WER", "11.00 %", "+1.80 points", "0.5", "±0"):
        assert figure in text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", None, "has no run.json; give the folder that `slivo run` wrote"),
        ("run.json", '{"name": ', r"run.json is not valid JSON: .*restore it, or run again"),
        ("run.json", '{"status": "asleep"}', r"run.json: status: "),
        ("run.json", '{"status": "done", "format": 2}', "has format 2, this slivo reads up to 1; upgrade"),
        ("run.json", b"\xff\xfe", r"run.json cannot be read: "),
        ("summary.json", "[]", r"summary.json: the whole: "),
        ("metrics.jsonl", '{"stage": 0}\n', r"metrics.jsonl:1: label: "),
        ("metrics.jsonl", "{\n", r"metrics.jsonl:1 is not valid JSON"),
    ],
)
def test_a_damaged_record_is_named_and_no_page_is_written(
    tmp_path: Path, file: str, content: str | bytes | None, message: str
) -> None:
    folder = build(tmp_path / "run", run=run(), epochs=epochs(), summary=summary())
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ArtifactError, match=message):
        report.write(folder)
    assert not (folder / "report.html").exists()


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    folder = build(tmp_path / "run", run=run(), epochs=epochs())
    before = report.write(folder).read_text()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": 4, "lab')
    assert report.write(folder).read_text() == before


def test_numbers_that_are_not_finite_do_not_break_the_page(tmp_path: Path) -> None:
    rows = epochs()
    rows[3] |= {"loss": None, "terms": {"label": None}, "val": {"accuracy": None}}
    result = json.loads(json.dumps(summary()))
    result["student"]["f1"] = None
    page(tmp_path / "run", run=run(), epochs=rows, summary=result)
    assert visit(tmp_path / "run" / "report.html", tmp_path).console == []
