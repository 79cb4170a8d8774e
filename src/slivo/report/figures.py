"""The charts, as Plotly specifications.

Plain JSON, so that the same run gives the same bytes. Colors are written as CSS variables (``var(--student)``) and
looked up by the page's script, which lets a chart follow the reader's light or dark theme.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from slivo.report import text
from slivo.report.records import Axis, Epoch, Folder, Measured, Run
from slivo.report.view import COSTS, LABELS, baseline

Spec = dict[str, Any]
"""A part of a Plotly figure: a trace, a layout, an axis."""

_INK, _MUTED, _GRID, _BAND = "var(--ink)", "var(--muted)", "var(--line)", "var(--band)"
_COLORS = tuple(f"var(--series-{i})" for i in range(1, 7))
_LONGEST = 34
"""Letters of an axis's name that fit beside the chart; the whole name is in the hover text."""


@dataclass(frozen=True)
class Figure:
    """A chart: its place in the page, what it says in words, and the specification."""

    id: str
    label: str
    height: int
    spec: Spec


def stages(run: Run, metric: str) -> Figure | None:
    """Return what is left of the teacher's cost after every stage, above the metric."""
    base = baseline(run)
    done = [(stage.label, stage.after) for stage in run.stages if stage.after is not None]
    if base is None or len(done) < 2:
        return None
    ticks = list(range(len(done)))
    labels = [_escape(label) for label, _ in done]
    traces = []
    for cost, color, dash in zip(COSTS, _COLORS, ("solid", "dash", "dot"), strict=False):
        whole = getattr(base, cost)
        if whole:
            left = [_left(after, cost, whole) for _, after in done]
            trace = _line(LABELS[cost], ticks, left, color, "y", f"{LABELS[cost]}: %{{y:.1%}}", labels)
            # MACs and parameters often fall together; dashes let the line below show through.
            trace["line"]["dash"] = dash
            traces.append(trace)
    quality = [_finite(after.quality.get(metric)) for _, after in done]
    form = ".1%" if text.is_share(metric) else ".4g"
    name = text.title(metric)
    traces.append(_line(name, ticks, quality, _INK, "y2", f"{name}: %{{y:{form}}}", labels))
    layout = _layout(
        xaxis=_axis(tickvals=ticks, ticktext=labels, anchor="y2", showgrid=False, range=[-0.3, len(done) - 0.7]),
        yaxis=_axis(title="left of the teacher", tickformat=".0%", rangemode="tozero", domain=[0.42, 1]),
        yaxis2=_axis(title=f"{name.lower() if len(name) > 4 else name}", tickformat=form, domain=[0, 0.3], nticks=4),
    )
    costs = ", ".join(f"{t['name']} {t['y'][-1]:.0%}" for t in traces[:-1] if t["y"][-1] is not None)
    label = f"Line chart over {len(done)} stages. Left of the teacher after the last one: {costs}."
    return Figure("chart-stages", label, 440, {"data": traces, "layout": layout})


def _left(after: Measured, cost: str, whole: float) -> float | None:
    value: float | None = getattr(after, cost)
    return None if value is None else _finite(value / whole)


def training(folder: Folder, metric: str) -> Figure | None:
    """Return loss, its terms and the validation metrics of every stage that trained, one after another."""
    epochs = folder.epochs
    if not epochs:
        return None
    runs = [list(rows) for _, rows in groupby(epochs, key=lambda row: row.stage)]
    terms = _keys(row.terms for row in epochs if len(row.terms) > 1)
    metrics = sorted(_keys(row.val for row in epochs), key=lambda name: name != metric)
    traces = [_curve("Loss", runs, [row.loss for row in epochs], _INK, "y", ".4g")]
    for i, term in enumerate(terms):
        values = [row.terms.get(term) if len(row.terms) > 1 else None for row in epochs]
        traces.append(_curve(f"term: {term}", runs, values, _COLORS[(i + 1) % 6], "y", ".4g", dash="dot"))
    for i, name in enumerate(metrics):
        form = ".1%" if text.is_share(name) else ".4g"
        values = [row.val.get(name) for row in epochs]
        curve = _curve(f"val. {text.title(name)}", runs, values, _COLORS[(i * 2) % 6], "y2", form)
        traces.append(curve | ({} if i == 0 else {"visible": "legendonly"}))
    shapes, notes = _bands(folder, runs)
    losses = [value for row in epochs if (value := _finite(row.loss)) is not None and value > 0]
    log = len(losses) == len(epochs) and max(losses) > 50 * min(losses)
    both = bool(metrics)
    layout = _layout(
        xaxis=_axis(
            title="epoch, over all stages", anchor="y2" if both else "y", showgrid=False, range=[0.4, len(epochs) + 0.6]
        ),
        yaxis=_axis(title="loss", type="log" if log else "linear", domain=[0.46, 1] if both else [0, 1], nticks=6),
        shapes=shapes,
        annotations=notes,
    )
    if both:
        form = ".0%" if text.is_share(metrics[0]) else ".4g"
        layout["yaxis2"] = _axis(title="validation", tickformat=form, domain=[0, 0.38], nticks=5)
    label = f"Line chart of the training loss over {len(epochs)} epochs in {len(runs)} stages."
    return Figure("chart-training", label, 460 if both else 320, {"data": traces, "layout": layout})


def _curve(
    name: str,
    runs: list[list[Epoch]],
    values: list[float | None],
    color: str,
    axis: str,
    form: str,
    dash: str = "solid",
) -> Spec:
    """One line that breaks between stages: what is minimized changes there."""
    x: list[float | None] = []
    y: list[float | None] = []
    where: list[str | None] = []
    position = 0
    for rows in runs:
        for row in rows:
            x.append(position + 1)
            y.append(_finite(values[position]))
            where.append(f"{_escape(row.label)}, epoch {row.epoch}")
            position += 1
        x.append(None)
        y.append(None)
        where.append(None)
    name = _escape(name)
    trace = _line(name, x, y, color, axis, f"{name}: %{{y:{form}}}", where)
    trace["line"] |= {"dash": dash, "width": 1.5 if dash == "dot" else 2}
    trace["mode"] = "lines+markers" if position <= 60 else "lines"
    return trace


def _bands(folder: Folder, runs: list[list[Epoch]]) -> tuple[list[Spec], list[Spec]]:
    """Shade every other group of stages of one kind, and name those that are wide enough."""
    kinds = {stage.index: stage.kind for stage in folder.run.stages}

    def kind_of(rows: list[Epoch]) -> str:
        return kinds.get(rows[0].stage, rows[0].label)

    shapes, notes = [], []
    start, total = 0.5, sum(len(rows) for rows in runs)
    groups = [(kind, list(of)) for kind, of in groupby(runs, key=kind_of)]
    for i, (kind, of) in enumerate(groups):
        end = start + sum(len(rows) for rows in of)
        if i % 2 == 0:
            corners = {"x0": start, "x1": end, "y0": 0, "y1": 1}
            shapes.append(
                {"type": "rect", "yref": "paper", "layer": "below", "line": {"width": 0}, "fillcolor": _BAND, **corners}
            )
        name = kind if len(of) > 1 else of[0][0].label
        # About 80 letters fit across the narrowest chart that still has its full width.
        if (end - start) / total * 80 >= len(name):
            at = {"x": (start + end) / 2, "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False}
            notes.append({"text": _escape(name), "font": {"color": _MUTED, "size": 12}, **at})
        start = end
    return shapes, notes


def widths(axes: list[Axis]) -> Figure | None:
    """Return the width of every axis that was looked at, before and after."""
    if not axes:
        return None
    rows = list(range(len(axes)))
    names = [_escape(axis.name) for axis in axes]
    hover = "%{customdata[0]}<br>%{customdata[1]} → %{customdata[2]}<extra></extra>"
    data = [[name, axis.before, axis.after] for name, axis in zip(names, axes, strict=True)]
    common: Spec = {"type": "bar", "orientation": "h", "y": rows, "customdata": data, "hovertemplate": hover}
    before = {
        "name": "before",
        "x": [axis.before for axis in axes],
        "marker": {"color": "var(--before)"},
        "width": 0.74,
    }
    after = {"name": "after", "x": [axis.after for axis in axes], "marker": {"color": "var(--student)"}, "width": 0.74}
    after |= {
        "text": [f"{axis.after} of {axis.before}" if axis.after != axis.before else "" for axis in axes],
        "textposition": "auto",
        "insidetextfont": {"color": "var(--on-student)"},
        "outsidetextfont": {"color": _INK},
    }
    layout = _layout(
        barmode="overlay",
        hovermode="closest",
        xaxis=_axis(rangemode="tozero", title="width"),
        yaxis=_axis(tickvals=rows, ticktext=[_short(axis.name) for axis in axes], autorange="reversed", showgrid=False),
    )
    cut = sum(axis.after < axis.before for axis in axes)
    row = 26 if len(axes) <= 40 else 15
    label = f"Bar chart of the widths of {len(axes)} axes before and after; {cut} were made narrower."
    return Figure(
        "chart-widths", label, 110 + row * len(axes), {"data": [common | before, common | after], "layout": layout}
    )


@dataclass(frozen=True)
class Point:
    """A network in a chart of quality over cost: what to call it, both numbers, and what sort it is."""

    name: str
    cost: float
    quality: float
    sort: str


def trade(points: Iterable[Point], cost: str, metric: str) -> Figure | None:
    """Return what networks cost and how good they are: those that nothing beats are joined by a line."""
    points = sorted(points, key=lambda point: point.cost)
    form = ".1%" if text.is_share(metric) else ".4g"
    looks = {"front": ("var(--student)", "circle", 10), "trial": (_MUTED, "circle-open", 7), "teacher": (_INK, "x", 9)}
    traces = []
    for sort, (color, symbol, size) in looks.items():
        mine = [point for point in points if point.sort == sort]
        if mine:
            x, y = [point.cost for point in mine], [_finite(point.quality) for point in mine]
            trace = _line(sort, x, y, color, "y", f"%{{x:.1%}}, %{{y:{form}}}", [_escape(point.name) for point in mine])
            trace |= {"mode": "lines+markers" if sort == "front" else "markers"}
            trace["line"] |= {"shape": "hv", "dash": "dot"}
            trace["marker"] |= {"symbol": symbol, "size": size}
            traces.append(trace)
    if not traces:
        return None
    layout = _layout(
        xaxis=_axis(title=f"{cost} left of the teacher", tickformat=".0%"),
        yaxis=_axis(title=f"{metric}, validation", tickformat=form),
    )
    label = f"Chart of {metric} over {cost} of {len(points)} networks."
    return Figure(f"chart-{cost}", label, 420, {"data": traces, "layout": layout})


def _line(
    name: str,
    x: Iterable[float | None],
    y: list[float | None],
    color: str,
    axis: str,
    hover: str,
    where: list[str] | list[str | None],
) -> Spec:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(x),
        "y": y,
        "yaxis": axis,
        "line": {"color": color, "width": 2},
        "marker": {"color": color, "size": 6},
        "text": where,
        "hovertemplate": f"%{{text}}<br>{hover}<extra></extra>",
    }


def _layout(**parts: Any) -> Spec:
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": _INK},
        "margin": {"l": 64, "r": 16, "t": 60, "b": 48},
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "var(--card)", "bordercolor": _GRID, "font": {"color": _INK}},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yref": "container", "yanchor": "top"},
        "dragmode": False,
        **parts,
    }


def _axis(title: str | None = None, **parts: Any) -> Spec:
    heading = {"title": {"text": _escape(title), "font": {"color": _MUTED, "size": 12}}} if title else {}
    return {
        "gridcolor": _GRID,
        "linecolor": _GRID,
        "zeroline": False,
        "automargin": True,
        "fixedrange": True,
        "tickfont": {"color": _MUTED},
        **heading,
        **parts,
    }


def _keys(rows: Iterable[dict[str, float | None]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _finite(value: float | None) -> float | None:
    """Return None for what JSON has no number for: a loss that ran away leaves a gap."""
    return value if value is not None and math.isfinite(value) else None


def _escape(name: str) -> str:
    """Plotly reads its labels as HTML."""
    return html.escape(name, quote=False)


def _short(name: str) -> str:
    return _escape(name if len(name) <= _LONGEST else "…" + name[1 - _LONGEST :])


def all_of(folder: Folder, metric: str) -> Iterator[Figure]:
    """Return every chart that the records allow."""
    for figure in (stages(folder.run, metric), training(folder, metric), widths(folder.run.axes)):
        if figure is not None:
            yield figure
