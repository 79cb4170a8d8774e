"""One page that says what a search found: the front, the recipe to take, and all trials; made from search.json."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from slivo import files
from slivo.errors import ArtifactError, require
from slivo.report import figures, text
from slivo.report.page import PAGE, template_of

FILE = "search.json"
FORMAT = 1


class Trial(BaseModel):
    """A trial of a search."""

    number: int
    state: str
    strategy: str = ""
    settings: dict[str, Any] = {}
    values: list[float] = []
    measured: dict[str, Any] = {}
    misses: list[str] = []
    reason: str = ""
    seconds: float = 0.0


class Search(BaseModel):
    """What a search wrote down."""

    format: int
    name: str = ""
    objectives: list[str] = []
    target: dict[str, Any] = {}
    teacher: dict[str, Any] = {}
    damages: dict[str, float] = {}
    trials: list[Trial] = []
    front: list[int] = []
    best: int | None = None
    seed: int = 0


def write(folder: str | os.PathLike[str]) -> Path:
    """Make a search's page from its search.json alone.

    Args:
        folder: The folder of the search; the page is written into it as report.html, whole or not at all.

    Returns:
        The path of the page.

    Raises:
        ArtifactError: If the folder is no folder of a search, or its record is broken.
        SlivoError: If jinja2 or plotly is not installed.

    Example:
        >>> import json, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "search.json").write_text(json.dumps({"format": 1, "name": "digits"}))
        >>> write(folder).name
        'report.html'
    """
    path = Path(folder)
    page = render(read(path), path)
    files.write(path / PAGE, page)
    return path / PAGE


def read(folder: Path) -> Search:
    """Read what a search wrote down.

    Raises:
        ArtifactError: If it cannot be read.
    """
    file = folder / FILE
    try:
        found = Search.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder} is not the folder of a search: it has no {FILE}") from error
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtifactError(f"{file} is damaged: {'.'.join(map(str, first['loc']))} {first['msg']}") from error
    if found.format != FORMAT:
        raise ArtifactError(f"{file} has format {found.format}; this version reads {FORMAT}")
    return found


def render(search: Search, folder: Path) -> str:
    """Return the page of a search."""
    plotly = require("plotly.offline", extra="report", why="the report page")
    metric, *costs = search.objectives or ["accuracy"]
    charts = {each.id: each for each in _charts(search, metric, costs)}
    by_number = {trial.number: trial for trial in search.trials}
    ahead = [by_number[number] for number in search.front if number in by_number]
    best = folder / "best.yaml"
    here = Path(__file__).parent
    return template_of("search.html.j2").render(
        search=search,
        head=["Trial", "Strategy", text.title(metric), *(_title(cost) for cost in costs), "Test", "Time"],
        front=[(trial.number == search.best, row(trial, metric)) for trial in ahead],
        teacher=_teacher(search, metric, costs),
        charts=charts,
        specs={each.id: each.spec for each in charts.values()},
        trials=[(trial, row(trial, metric), _settings(trial)) for trial in search.trials],
        damages=sorted(search.damages.items(), key=lambda pair: -pair[1]),
        best=best.read_text(encoding="utf-8") if search.best is not None and best.is_file() else "",
        counts=_counts(search),
        style=(here / "report.css").read_text(encoding="utf-8"),
        script=(here / "report.js").read_text(encoding="utf-8"),
        plotly=plotly.get_plotlyjs() if charts else "",
    )


def row(trial: Any, metric: str) -> list[str]:
    """Return the cells of a trial: number, strategy, metric, costs as shares of the teacher's, test metric, time."""
    test = (trial.measured.get("test") or {}).get(metric)
    quality, *costs = trial.values or (None,)
    return [
        str(trial.number),
        trial.strategy,
        text.metric(metric, quality),
        *(text.percent(cost) for cost in costs),
        text.metric(metric, test),
        text.duration(trial.seconds),
    ]


def _charts(search: Search, metric: str, costs: list[str]) -> Iterator[figures.Figure]:
    done = [trial for trial in search.trials if len(trial.values) == 1 + len(costs)]
    for number, cost in enumerate(costs, 1):
        points = [
            figures.Point(
                f"trial {trial.number}", trial.values[number], trial.values[0],
                "front" if trial.number in search.front else "trial",
            )
            for trial in done
        ]  # fmt: skip
        teacher = search.teacher.get(metric)
        if done and isinstance(teacher, int | float):
            points.append(figures.Point("teacher", 1.0, teacher, "teacher"))
        found = figures.trade(points, cost, metric)
        if found is not None:
            yield found


def _title(cost: str) -> str:
    return {"macs": "MACs", "params": "Parameters", "bytes": "Bytes", "latency": "Latency"}.get(cost, cost)


def _teacher(search: Search, metric: str, costs: list[str]) -> list[str]:
    test = (search.teacher.get("test") or {}).get(metric)
    values = [text.metric(metric, search.teacher.get(metric)), *("100 %" for _ in costs), text.metric(metric, test)]
    return ["", "teacher", *values, ""]


def _settings(trial: Trial) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in trial.settings.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]


def _counts(search: Search) -> Mapping[str, int]:
    states = [trial.state for trial in search.trials]
    return {state: states.count(state) for state in dict.fromkeys(states)}
