"""Fill the tables of the documentation from the code, so that they cannot fall behind it.

A line ``<!-- table: NAME -->`` in a page is replaced with what the function NAME of this file returns.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable

_MARK = re.compile(r"^<!-- table: (\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the marks in a page; called by MkDocs."""
    return _MARK.sub(lambda match: TABLES[match[1]](), markdown)


def criteria() -> str:
    """One row for each pruning criterion."""
    from slivo.prune import criteria as module

    rows = []
    for name in module.names():
        criterion = module.resolve(name)
        needs = "batches and a loss" if criterion.needs_grads else "nothing"
        sees = "those that read the axis" if criterion.on == "read" else "all of the axis"
        rows.append((f"`{name}`", criterion.summary, sees, needs))
    return _table(("name", "score", "weights it sees", "needs"), rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(head)
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _first_line(function: object) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


TABLES: dict[str, Callable[[], str]] = {"criteria": criteria}
