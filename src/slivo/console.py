"""What the command line draws: progress, tables, messages. Nothing else knows of a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from slivo.artifact import Packed
from slivo.graph import Graph
from slivo.recipe.watch import Watch

if TYPE_CHECKING:
    from slivo.search import Found, Row

_LINE_EVERY = 5.0
"""Seconds between lines of a training where there is no terminal to draw a bar on."""


def out() -> Console:
    """Return the console for results."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def error(message: str) -> None:
    """Say on stderr what went wrong."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}")


@contextmanager
def watching(*, quiet: bool) -> Iterator[Watch]:
    """Give something that shows a run's progress: bars on a terminal, plain lines elsewhere, nothing if quiet."""
    if quiet:
        yield Watch()
    elif not out().is_terminal:
        yield Lines()
    else:
        bars = Bars()
        with bars.progress_bars:
            yield bars


class Lines(Watch):
    """Plain lines: one when a step is done, and every few seconds one in between."""

    def __init__(self) -> None:
        self.console = out()
        self.began = self.said = time.monotonic()
        self.place = ""

    def started(self, label: str, index: int, count: int) -> None:
        """Note the step; its line comes when it is done."""
        del label
        self.place = f"[{min(index + 1, count)}/{count}]"
        self.began = self.said = time.monotonic()
        if index == count:
            self.console.print("measuring teacher and student on the test data", markup=False)

    def progress(self, label: str, done: int, total: int, fields: Mapping[str, float]) -> None:
        """Say how far a training is."""
        now = time.monotonic()
        if now - self.said < _LINE_EVERY or not done:
            return
        self.said = now
        rate = done / (now - self.began)
        text = f"{self.place} {label}: {done}/{total} steps, {rate:.1f}/s, {_left(total - done, rate)} left"
        self.console.print(f"{text}{_loss(fields)}", markup=False)

    def finished(self, record: Mapping[str, Any]) -> None:
        """Say what the step left."""
        self.console.print(f"{self.place} {_told(record)}", markup=False)


class Bars(Watch):
    """A bar for the step that runs, and a line for each that is done."""

    def __init__(self) -> None:
        self.console = out()
        self.progress_bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Rate(),
            TextColumn("{task.fields[loss]}"),
            console=self.console,
            transient=True,
        )
        self.bar = self.progress_bars.add_task("", total=None, visible=False, loss="")
        self.place = ""

    def started(self, label: str, index: int, count: int) -> None:
        """Show the step; a bar without a length until it says how long it is."""
        self.place = f"[{min(index + 1, count)}/{count}]"
        name = "measuring on the test data" if index == count else label
        self.progress_bars.reset(
            self.bar, total=None, visible=True, description=escape(f"{self.place} {name}"), loss=""
        )

    def progress(self, label: str, done: int, total: int, fields: Mapping[str, float]) -> None:
        """Move the bar."""
        del label
        self.progress_bars.update(self.bar, completed=done, total=total, loss=_loss(fields))

    def finished(self, record: Mapping[str, Any]) -> None:
        """Say what the step left."""
        self.console.print(f"{self.place} {_told(record)}", markup=False)


class Searching:
    """What a search shows: a line for each trial that is over, and on a terminal a bar for the run that goes on."""

    def __init__(self, watch: Watch, *, quiet: bool) -> None:
        self.watch, self.quiet, self.console = watch, quiet, out()

    def note(self, text: str) -> None:
        """Say what is being prepared."""
        if not self.quiet:
            self.console.print(text, markup=False)

    def trial(self, row: Row) -> None:
        """Say what came of a trial."""
        if not self.quiet:
            self.console.print(_trial(row), markup=False)


class _Silent(Bars):
    """A bar for the run that goes on; its steps leave no lines."""

    def finished(self, record: Mapping[str, Any]) -> None:
        """Say nothing."""


@contextmanager
def searching(*, quiet: bool) -> Iterator[Searching]:
    """Give something that shows how far a search is."""
    if quiet or not out().is_terminal:
        yield Searching(Watch(), quiet=quiet)
    else:
        bars = _Silent()
        with bars.progress_bars:
            yield Searching(bars, quiet=False)


def _trial(row: Row) -> str:
    from slivo.report import text

    if row.values:
        quality, *costs = row.values
        told = f"{quality:.4g} at {', '.join(text.percent(cost) for cost in costs)}"
        missed = f", misses the target: {'; '.join(row.misses)}" if row.misses else ""
        return f"trial {row.number} ({row.strategy}): {told}{missed} ({text.duration(row.seconds)})"
    return f"trial {row.number} ({row.strategy}) {row.state}: {row.reason}"


def found(search: Found, page: object | None) -> None:
    """Print what a search found: the front, the recipe to take, and where everything is."""
    from slivo.report import text

    metric, *costs = search.objectives
    states = [row.state for row in search.rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    title = f"What nothing beats of {len(states)} trials ({counts}); validation data, costs of the teacher's"
    drawn = Table(title=title, title_style="italic", title_justify="left")
    for name in ("trial", "strategy", metric, *costs, f"test {metric}"):
        drawn.add_column(name, justify="left" if name == "strategy" else "right")
    for row in search.front:
        best = search.best is not None and row.number == search.best.number
        cells = [str(row.number), row.strategy, text.metric(metric, row.values[0])]
        cells += [text.percent(value) for value in row.values[1:]]
        drawn.add_row(*cells, text.metric(metric, row.measured["test"].get(metric)), style="bold" if best else "")
    drawn.add_section()
    test = text.metric(metric, search.teacher["test"].get(metric))
    drawn.add_row("", "teacher", text.metric(metric, search.teacher[metric]), *("100 %" for _ in costs), test)
    console = out()
    console.print(drawn)
    if search.waiting:
        console.print(f"{search.waiting} trials were broken off; the same command goes on with them", markup=False)
    if search.best is not None and search.recipe is not None:
        missed = f", which misses the target: {'; '.join(search.best.misses)}" if search.best.misses else ""
        console.print(f"take trial {search.best.number}{missed}: slivo run {search.recipe}", markup=False)
    console.print(f"everything is in {search.folder}", markup=False)
    if page is not None:
        console.print(f"open {page}", markup=False)


class _Rate(ProgressColumn):
    """Steps a second and time left, once there is something to tell from."""

    def render(self, task: Task) -> Text:
        """Return the text."""
        if not task.speed or task.total is None:
            return Text(f"{task.elapsed or 0:.0f} s")
        return Text(f"{task.speed:.1f}/s, {_left(task.total - task.completed, task.speed)} left")


def _left(steps: float, rate: float) -> str:
    from slivo.report.text import duration

    return duration(steps / rate)


def _loss(fields: Mapping[str, float]) -> str:
    return f", loss {fields['loss']:.3f}" if "loss" in fields else ""


def _told(record: Mapping[str, Any]) -> str:
    from slivo.report import text

    after, costs = record["after"], ("params", "macs", "bytes")
    quality = ", ".join(f"{name} {text.metric(name, value)}" for name, value in after.items() if name not in costs)
    figures = f"{text.count(after['macs'])} MACs, {text.size(after['bytes'])}, validation {quality}"
    return f"{record['label']}: {figures} ({text.duration(record['seconds'])})"


def result(summary: Mapping[str, Any], misses: Sequence[str], folder: object, report: object | None) -> None:
    """Print teacher and student side by side, whether the target was met, and where everything is."""
    from slivo.report import text

    console = out()
    table = Table(title="Test data, which nothing was decided by", title_style="italic", title_justify="left")
    for name in ("", "teacher", "student", ""):
        table.add_column(name, justify="left" if not name and not table.columns else "right")
    for row in _rows(summary):
        table.add_row(*row)
    console.print(table)
    console.print(f"latency: {summary['runtime']}", markup=False)
    if summary["target"]:
        asked = ", ".join(
            f"{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in summary["target"].items()
        )
        verdict = "[green]met[/]" if not misses else f"[bold red]missed[/]: {escape('; '.join(misses))}"
        console.print(f"target ({escape(asked)}): {verdict}")
    console.print(f"everything is in {folder} ({text.duration(summary['seconds'])})", markup=False)
    if report is not None:
        console.print(f"open {report}", markup=False)


def _rows(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    from slivo.report import text

    teacher, student = summary["teacher"], summary["student"]
    costs = ("params", "macs", "bytes", "latency_ms")
    for name, before in teacher.items():
        if name not in costs:
            after = student.get(name)
            yield (
                text.title(name), text.metric(name, before), text.metric(name, after), text.change(name, before, after),
            )  # fmt: skip
    for name, label, show in (
        ("params", "Parameters", text.count), ("macs", "MACs", text.count), ("bytes", "Bytes on disk", text.size),
    ):  # fmt: skip
        yield label, show(teacher[name]), show(student[name]), text.percent(student[name] / teacher[name])
    for batch, pair in teacher["latency_ms"].items():
        for which, before in zip(("p50", "p95"), pair, strict=True):
            after = student["latency_ms"][batch][which == "p95"]
            yield (
                f"Latency {which}, batch {batch}", text.milliseconds(before), text.milliseconds(after),
                f"{text.times(before / after)} faster" if before > after else f"{text.times(after / before)} slower",
            )  # fmt: skip


def seeds(summaries: Sequence[Mapping[str, Any]], primary: str) -> tuple[float, float, float]:
    """Print several runs of one recipe and their medians.

    Returns:
        Medians of the share of MACs, of the share of bytes, and of the drop of the primary metric.
    """
    from slivo.report import text

    table = Table(title=f"{len(summaries)} seeds, test data", title_style="italic", title_justify="left")
    for name in ("seed", f"teacher {primary}", f"student {primary}", "drop", "MACs", "bytes", "seconds"):
        table.add_column(name, justify="right")
    rows = []
    for summary in summaries:
        teacher, student = summary["teacher"], summary["student"]
        shares = [student[name] / teacher[name] for name in ("macs", "bytes")]
        rows.append(
            [teacher[primary], student[primary], teacher[primary] - student[primary], *shares, summary["seconds"]]
        )

    def shown(values: Sequence[float]) -> list[str]:
        before, after, drop, macs, size, seconds = values
        points = f"{100 * drop:.2f} points"
        metrics = [text.metric(primary, value) for value in (before, after)]
        return [*metrics, points, text.percent(macs), text.percent(size), f"{seconds:.0f}"]

    for summary, row in zip(summaries, rows, strict=True):
        table.add_row(str(summary["seed"]), *shown(row))
    medians = [median(column) for column in zip(*rows, strict=True)]
    table.add_section()
    table.add_row("median", *shown(medians), style="bold")
    out().print(table)
    return medians[3], medians[4], medians[2]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Print a table; columns whose numbers are in ``right`` are aligned there."""
    drawn = Table(box=None, pad_edge=False)
    for number, name in enumerate(head):
        drawn.add_column(name, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(escape(cell) for cell in row))
    out().print(drawn)


def packed(found: Packed) -> None:
    """Print what is in a packed file: bytes, codec and bits for each tensor, and the whole."""
    from slivo.report import text

    rows = [
        [each.name, each.dtype, "×".join(map(str, each.shape)), each.codec, str(each.packed_bytes),
         _times(each.dense_bytes, each.packed_bytes), f"{each.bits:.2f}"]
        for each in found.tensors
    ]  # fmt: skip
    rows.append(["header", "", "", "", str(found.header_bytes), "", ""])
    rows.append(["whole file", "", "", "", str(found.bytes), text.times(found.ratio), f"{found.bits:.2f}"])
    table(("tensor", "dtype", "shape", "codec", "bytes", "smaller", "bits each"), rows, right=(4, 5, 6))
    out().print(f"{found.path}: {text.size(found.bytes)}", markup=False)


def _times(dense: int, packed: int) -> str:
    from slivo.report import text

    return text.times(dense / packed) if packed else ""


def tree(graph: Graph) -> None:
    """Print the prunable axes with the parameters that each is part of."""
    root = Tree("what moves together", guide_style="dim")
    for axis in graph.prunable:
        branch = root.add(f"{escape(axis.name)} [dim]({axis.size})[/]")
        members: dict[str, list[str]] = {}
        for member in axis.members:
            members.setdefault(member.tensor, []).append(str(member.dim))
        for name, dims in members.items():
            branch.add(f"{escape(name)} [dim]dim {', '.join(dims)}[/]")
    out().print(root)


def benches(rows: Sequence[Mapping[str, Any]]) -> None:
    """Show what was measured on runtimes, and why nothing was on others; of the qualities, the first."""
    from slivo.report import text

    def cells(row: Mapping[str, Any]) -> list[str]:
        times = [text.milliseconds(row[name]) for name in ("p50_ms", "p95_ms")]
        faster = "" if row["faster"] is None else f"{row['faster']:.2f} x"
        quality = next((text.metric(name, value) for name, value in row["metrics"].items()), "")
        return [row["artifact"], row["runtime"], str(row["batch"]), *times, faster, quality]

    measured = [row for row in rows if not row["reason"]]
    names = list(dict.fromkeys(name for row in measured for name in [*row["metrics"]][:1]))
    columns = ("artifact", "runtime", "batch", "p50", "p95", "vs teacher", ", ".join(names) or "quality")
    if measured:
        table(columns, [cells(row) for row in measured], right=(2, 3, 4, 5, 6))
        versions = dict.fromkeys(f"{row['runtime']} {row['version']}" for row in measured)
        threads = measured[0]["threads"]
        out().print(f"{', '.join(versions)}; {threads} thread{'s' * (threads > 1)}", highlight=False)
    for row in rows:
        if row["reason"]:
            out().print(escape(f"{row['artifact']} not on {row['runtime']}: {row['reason']}"), highlight=False)
