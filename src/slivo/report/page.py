"""One page that says what a run did, in one file that needs nothing else.

The page carries plotly.js (about 4.8 MB of its size): the charts answer to the pointer without a network, and the
page's own security policy lets nothing load from anywhere. Every number in a chart is in a table too, so that the
page loses little on paper or without scripts.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from slivo import files
from slivo.errors import require
from slivo.report import confusion, figures, text, view
from slivo.report.records import Folder, read

if TYPE_CHECKING:
    from jinja2 import Template

PAGE = "report.html"

_WHY = "the report page"


def write(run_folder: str | os.PathLike[str]) -> Path:
    """Make a run's report page from run.json, metrics.jsonl and summary.json alone.

    The same records give the same bytes. A run that is still going or that failed has a page too, which says so.

    Args:
        run_folder: The folder of the run; the page is written into it as report.html, whole or not at all.

    Returns:
        The path of the page.

    Raises:
        ArtifactError: If the folder is no run folder, a record in it is broken, or the page cannot be written.
        SlivoError: If jinja2 or plotly is not installed.

    Example:
        >>> import json, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "run.json").write_text(json.dumps({"name": "digits", "status": "running"}))
        >>> write(folder).name
        'report.html'
    """
    folder = Path(run_folder)
    page = render(read(folder))
    path = folder / PAGE
    files.write(path, page)
    return path


def render(folder: Folder) -> str:
    """Return the page of a run."""
    template, plotly = template_of("report.html.j2"), require("plotly.offline", extra="report", why=_WHY)
    metric = view.primary(folder)
    teacher, student, final = view.results(folder)
    charts = {figure.id: figure for figure in figures.all_of(folder, metric)}
    here = Path(__file__).parent
    return template.render(
        run=folder.run,
        summary=folder.summary,
        final=final,
        metric=text.title(metric),
        teacher=teacher,
        student=student,
        tiles=view.tiles(teacher, student, metric) if teacher and student else (),
        comparison=view.comparison(teacher, student) if final else (),
        checks=view.checks(folder.summary, metric) if folder.summary else (),
        stages=view.stage_rows(folder.run, metric),
        charts=charts,
        specs={figure.id: figure.spec for figure in charts.values()},
        matrices=confusion.tables(folder.run),
        moved=confusion.moved(folder.run),
        subtitle=view.subtitle(folder.run),
        decisions=view.decisions(folder.run),
        machine=view.machine(folder.run),
        recipe=view.recipe(folder.run),
        factory=view.factory(folder.run),
        exported=view.exported(folder.run),
        percent=text.percent,
        duration=text.duration,
        style=(here / "report.css").read_text(encoding="utf-8"),
        script=(here / "report.js").read_text(encoding="utf-8"),
        plotly=plotly.get_plotlyjs() if charts else "",
    )


def template_of(name: str) -> Template:
    """Return a template of this package.

    Raises:
        SlivoError: If jinja2 is not installed.
    """
    require("jinja2", extra="report", why=_WHY)
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
