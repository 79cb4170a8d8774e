"""What the page says, worked out from the records: every number is a string here, ready to print."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import yaml
from pydantic import JsonValue

from slivo.report import text
from slivo.report.records import Folder, Measured, Run, Stage, Summary

COSTS = ("macs", "params", "bytes")
"""The costs that every stage reports."""

LABELS = {"macs": "MACs", "params": "Parameters", "bytes": "Size on disk"}
_LESS = {"macs": "fewer MACs", "params": "fewer parameters", "bytes": "smaller", "latency": "faster"}
_MORE = {"macs": "more MACs", "params": "more parameters", "bytes": "larger", "latency": "slower"}


@dataclass(frozen=True)
class Tile:
    """One of the big figures: ``4.2×``, ``fewer MACs``, ``1.20 M → 286 k``."""

    figure: str
    label: str
    note: str


@dataclass(frozen=True)
class Row:
    """A row of the comparison; `share` is the student's part of the teacher's, for the bar."""

    name: str
    teacher: str
    student: str
    change: str
    share: float | None = None


@dataclass(frozen=True)
class Check:
    """One thing that the target asked for, and what came out; `met` is None where nothing can be said."""

    name: str
    asked: str
    got: str
    met: bool | None


@dataclass(frozen=True)
class StageRow:
    """A row of the table of stages; each cell is before and after."""

    label: str
    cells: tuple[tuple[str, str], ...]
    seconds: str
    details: tuple[tuple[str, str], ...]


def primary(folder: Folder) -> str:
    """Return the name of the metric that the run was judged by: the one that its stages report."""
    sources = [stage.after for stage in folder.run.stages]
    if folder.summary is not None:
        sources.append(folder.summary.teacher)
    for measured in sources:
        if measured is not None and measured.quality:
            return "accuracy" if "accuracy" in measured.quality else next(iter(measured.quality))
    return "accuracy"


def baseline(run: Run) -> Measured | None:
    """Return what the stages started from: the trained teacher."""
    for stage in run.stages:
        first = stage.after if stage.kind == "teacher" else stage.before or stage.after
        if first is not None:
            return first
    return None


def results(folder: Folder) -> tuple[Measured | None, Measured | None, bool]:
    """Return teacher, student and whether they are the final result, or only how far the stages came.

    Without a summary the numbers of the stages stand in, which were measured on validation data.
    """
    if folder.summary is not None:
        return folder.summary.teacher, folder.summary.student, True
    stages = [stage for stage in folder.run.stages if stage.kind != "teacher" and stage.after is not None]
    return baseline(folder.run), stages[-1].after if stages else None, False


def tiles(teacher: Measured, student: Measured, metric: str) -> tuple[Tile, ...]:
    """Return the big figures: MACs, size, speed and quality, those of them that were measured."""
    found = []
    for cost, show in (("macs", text.count), ("bytes", text.size)):
        before, after = getattr(teacher, cost), getattr(student, cost)
        figure = _ratio(cost, before, after)
        if figure is not None:
            found.append(Tile(*figure, f"{show(before)} → {show(after)}"))
    found.extend(_speed(teacher, student))
    before, after = teacher.quality.get(metric), student.quality.get(metric)
    if before is not None and after is not None:
        delta, _, unit = text.change(metric, before, after).partition(" ")
        note = f"{text.metric(metric, before)} → {text.metric(metric, after)}"
        found.append(Tile(delta, f"{unit} {text.title(metric) if len(metric) <= 4 else metric}".strip(), note))
    return tuple(found)


def _speed(teacher: Measured, student: Measured) -> Iterator[Tile]:
    ratios = []
    for batch in _batches(teacher, student):
        if batch in teacher.latency_ms and batch in student.latency_ms:
            figure = _ratio("latency", teacher.latency_ms[batch][0], student.latency_ms[batch][0])
            if figure is not None:
                ratios.append((batch, *figure))
    if ratios:
        (batch, number, word), *others = ratios
        rest = ", ".join(f"{r} {w if w != word else ''} at {b}".replace("  ", " ") for b, r, w in others)
        yield Tile(number, word, f"at batch {batch}" + (f"; {rest}" if rest else ""))


def _ratio(cost: str, before: float | None, after: float | None) -> tuple[str, str] | None:
    """Say how much better the second is, always as a number of at least one."""
    if not before or not after:
        return None
    if before >= after:
        return text.times(before / after), _LESS[cost]
    return text.times(after / before), _MORE[cost]


def _batches(*measured: Measured | None) -> list[str]:
    """Return the batch sizes that were timed, small ones first."""
    names = {batch for m in measured if m is not None for batch in m.latency_ms}
    return sorted(names, key=lambda batch: (len(batch), batch))


def comparison(teacher: Measured | None, student: Measured | None) -> tuple[tuple[str, tuple[Row, ...]], ...]:
    """Return the table of teacher and student in groups: quality, cost, latency."""
    one, two = teacher or Measured(), student or Measured()
    names = list(dict.fromkeys([*one.quality, *two.quality]))
    quality = tuple(
        Row(
            text.title(name),
            text.metric(name, one.quality.get(name)),
            text.metric(name, two.quality.get(name)),
            text.change(name, one.quality.get(name), two.quality.get(name)),
        )
        for name in names
    )
    cost = tuple(
        _row(LABELS[name], getattr(one, name), getattr(two, name), text.size if name == "bytes" else text.count)
        for name in COSTS
    )
    latency = tuple(
        _row(f"Batch {batch}, {name}", _timed(one, batch, i), _timed(two, batch, i), text.milliseconds)
        for batch in _batches(one, two)
        for i, name in enumerate(("median", "p95"))
    )
    groups = (("Quality on test data", quality), ("Cost", cost), ("Latency", latency))
    return tuple((name, rows) for name, rows in groups if rows)


def _timed(measured: Measured, batch: str, which: int) -> float | None:
    return measured.latency_ms[batch][which] if batch in measured.latency_ms else None


def _row(name: str, before: float | None, after: float | None, show: Callable[[float | None], str]) -> Row:
    share = after / before if before and after is not None else None
    change = text.MISSING
    if before and after:
        change = text.times(before / after) if before >= after else f"{text.times(after / before)} more"
    return Row(name, show(before), show(after), change, share)


def checks(summary: Summary, metric: str) -> tuple[Check, ...]:
    """Return what the target asked for beside what came out."""
    return tuple(_check(name, asked, summary, metric) for name, asked in summary.target.items() if asked is not None)


def _check(name: str, asked: JsonValue, summary: Summary, metric: str) -> Check:
    if not isinstance(asked, int | float) or isinstance(asked, bool):
        return Check(text.title(name), _plain(asked), "", None)
    if name in COSTS:
        return _check_cost(name, asked, summary)
    if name == "max_drop":
        return _check_drop(metric, asked, summary)
    if name.startswith("latency"):
        return _check_latency(name, asked, summary)
    return Check(text.title(name), f"{asked:g}", "", None)


def _check_cost(name: str, asked: float, summary: Summary) -> Check:
    before, after = getattr(summary.teacher, name, None), getattr(summary.student, name, None)
    limit = f"≤ {100 * asked:.4g} % of the teacher's"
    if not before or after is None:
        return Check(LABELS[name], limit, "", None)
    return Check(LABELS[name], limit, text.percent(after / before), after / before <= _most(asked))


def _check_latency(name: str, asked: float, summary: Summary) -> Check:
    share = name == "latency"
    limit = f"≤ {100 * asked:.4g} % of the teacher's" if share else f"≤ {text.milliseconds(asked)}"
    before, after = (None if m is None else _timed(m, "1", 0) for m in (summary.teacher, summary.student))
    if not before or after is None:
        return Check("Latency, batch 1", limit, "", None)
    got = text.percent(after / before) if share else text.milliseconds(after)
    return Check("Latency, batch 1", limit, got, (after / before if share else after) <= asked)


def _check_drop(metric: str, asked: float, summary: Summary) -> Check:
    before = summary.teacher.quality.get(metric) if summary.teacher else None
    after = summary.student.quality.get(metric) if summary.student else None
    limit = text.points(asked) if text.is_share(metric) else f"{asked:.3g}"
    name = f"{text.title(metric)} drop"
    if before is None or after is None:
        return Check(name, f"≤ {limit}", "", None)
    # How much an error rate may grow is for the run to judge: "drop" does not say which way it counts.
    if metric in text.LOWER_IS_BETTER:
        return Check(name, f"≤ {limit}", text.change(metric, before, after), None)
    drop = before - after
    got = text.change(metric, after, before).lstrip("+") if drop > 0 else f"none, {text.change(metric, before, after)}"
    return Check(name, f"≤ {limit}", got, drop <= _most(asked))


def _most(asked: float) -> float:
    """A share that was met exactly is met, whatever the rounding."""
    return asked * (1 + 1e-9) + 1e-12


def stage_rows(run: Run, metric: str) -> tuple[StageRow, ...]:
    """Return the table of stages."""
    return tuple(
        StageRow(
            stage.label,
            tuple(_cell(stage, name, metric) for name in (*COSTS, metric)),
            text.duration(stage.seconds),
            tuple((key.replace("_", " "), _plain(value)) for key, value in stage.details.items()),
        )
        for stage in run.stages
    )


def _cell(stage: Stage, name: str, metric: str) -> tuple[str, str]:
    def show(measured: Measured | None) -> str:
        if measured is None:
            return ""
        if name == metric:
            return text.metric(metric, measured.quality.get(metric))
        value: float | None = getattr(measured, name)
        return text.size(value) if name == "bytes" else text.count(value)

    before, after = show(stage.before), show(stage.after) or text.MISSING
    return ("" if before in (after, text.MISSING) else before, after)


def subtitle(run: Run) -> str:
    """Return in one line what was compressed, on what, and how long it took."""
    parts = []
    task = run.recipe.get("task")
    if isinstance(task, dict) and task.get("kind"):
        parts.append(_plain(task["kind"]) + (f" on {_plain(task['data'])}" if task.get("data") else ""))
    if model := factory(run):
        parts.append(f"teacher {model}")
    if run.seconds is not None:
        parts.append(f"{text.duration(run.seconds)} in all")
    return " · ".join(parts)


def decisions(run: Run) -> tuple[tuple[str, str, str], ...]:
    """Return what the run chose, why, and at which stage."""
    labels = {str(stage.index): stage.label for stage in run.stages}
    rows = ((str("" if d.stage is None else d.stage), d) for d in run.decisions)
    return tuple((d.what, d.why, labels.get(stage, stage)) for stage, d in rows)


def machine(run: Run) -> tuple[tuple[str, str], ...]:
    """Return what the run ran on, and what else it takes to have it again."""
    names = {"cpu": "Processor", "python": "Python", "torch": "PyTorch"}
    rows = [("Seed", text.MISSING if run.seed is None else str(run.seed)), ("slivo", run.slivo or text.MISSING)]
    rows += [(names.get(key, key[:1].upper() + key[1:]), _plain(value)) for key, value in run.machine.items()]
    if run.started:
        rows.append(("Started", run.started))
    return tuple(rows)


def recipe(run: Run) -> str:
    """Return the recipe as YAML, as it was validated: with every default that was filled in."""
    return yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, width=100) if run.recipe else ""


def factory(run: Run) -> str | None:
    """Return the reference of the function that makes the teacher, if the recipe names one."""
    teacher = run.recipe.get("teacher")
    model = teacher.get("model") if isinstance(teacher, dict) else None
    return model if isinstance(model, str) else None


def exported(run: Run) -> bool:
    """Whether a stage wrote student.onnx."""
    return any(stage.kind == "export" and stage.details.get("to", "onnx") == "onnx" for stage in run.stages)


def _plain(value: JsonValue) -> str:
    """A JSON value as a person would write it."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return json.dumps(value, ensure_ascii=False)
