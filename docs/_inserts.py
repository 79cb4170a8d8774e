"""Make parts of the documentation from the code, so that they cannot fall behind it.

A line ``<!-- insert: NAME -->`` in a page is replaced with what the public function NAME of this file returns.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

_ROOT = Path(__file__).parents[1]
_MARK = re.compile(r"^<!-- insert: (\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the marks in a page; called by MkDocs."""
    return _MARK.sub(lambda match: globals()[match[1]](), markdown)


def criteria() -> str:
    """One row for each pruning criterion."""
    from slivo.prune import criteria as module

    rows = []
    for name in module.names():
        criterion = module.resolve(name)
        sees = {"all": "all of the axis", "read": "those that read the axis", "scale": "scales of norms"}[criterion.on]
        rows.append((f"`{name}`", criterion.summary, sees, criterion.needs))
    return _table(("name", "score", "weights it sees", "needs"), rows)


def losses() -> str:
    """One row for each loss, with its own options; those that all losses have are explained on the page."""
    from slivo import losses as module

    rows = []
    shared = ("weight", "at", "head", "class_map", "class_dim", "labels", "mask")
    for loss in module.describe():
        own = [option for option in loss.parameters if option.partition(":")[0] not in shared]
        compares = "logits" if "at: path = ''" in loss.parameters else "activations"
        rows.append((f"`{loss.name}`", loss.summary, compares, "<br>".join(f"`{option}`" for option in own)))
    return _table(("name", "what it is", "compares", "options"), rows)


def recipes() -> str:
    """One row for each recipe that ships: its name, the comment at its top, and its stages."""
    from slivo.recipe.load import load
    from slivo.recipe.shipped import shipped

    rows = []
    for name, text in shipped().items():
        comment = [line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), text.splitlines())]
        rows.append((f"`{name}`", " ".join(comment), " → ".join(_kinds(load(name).recipe.stages))))
    return _table(("name", "what it does", "stages"), rows)


def recipe_files() -> str:
    """The recipes that ship, in full."""
    from slivo.recipe.shipped import shipped

    return "\n\n".join(f"### {name}\n\n```yaml\n{text.strip()}\n```" for name, text in shipped().items())


def recipe_keys() -> str:
    """One table for each mapping that a recipe may hold: its keys, what they may be, and their defaults."""
    from slivo.recipe.schema import Recipe

    parts = []
    for part in _parts(Recipe, []):
        rows = []
        for name, info in part.model_fields.items():
            default = "needed" if info.is_required() else _default(info.get_default())
            rows.append((f"`{info.alias or name}`", info.description or "", default))
        parts += [f"### {_title(part)}", inspect.getdoc(part) or ""]
        parts += [_table(("key", "what it may be", "default"), rows)] if rows else []
    return "\n\n".join(parts)


def commands() -> str:
    """A section for each command: what it does, how it is called, its arguments and options."""
    import typer

    from slivo.cli import app

    group: Any = typer.main.get_command(app)
    context = typer.Context(group, info_name="slivo")
    return "\n\n".join(_command(context, name, command) for name, command in group.commands.items())


def changelog() -> str:
    """CHANGELOG.md, whose place is the root of the repository."""
    return (_ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def contributing() -> str:
    """CONTRIBUTING.md likewise, with its links as they are from here."""
    text = (_ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.replace("](docs/", "](").replace("](CHANGELOG.md)", "](changelog.md)")


def _command(parent: Any, name: str, command: Any) -> str:
    """Return the section of one command."""
    context = type(parent)(command, info_name=name, parent=parent)
    usage = command.get_usage(context).removeprefix("Usage: ")
    rows = []
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        argument = parameter.param_type_name == "argument"
        spelled = parameter.name.upper() if argument else ", ".join([*parameter.opts, *parameter.secondary_opts])
        shown = parameter.show_default if isinstance(parameter.show_default, str) else parameter.get_default(context)
        default = "needed" if parameter.required else _default(shown)
        rows.append((f"`{spelled}`", getattr(parameter, "help", None) or "", default))
    text = inspect.cleandoc((command.help or "").replace("\b\n", ""))
    table = _table(("argument or option", "what it does", "default"), rows) if rows else ""
    return f"## slivo {name}\n\n{text}\n\n```text\n{usage}\n```\n\n{table}"


def _parts(part: type[BaseModel], seen: list[type[BaseModel]]) -> Sequence[type[BaseModel]]:
    """Return a mapping's schema and all below it, each once, from the top."""
    if part not in seen:
        seen.append(part)
        for info in part.model_fields.values():
            for inner in _schemas(info.annotation):
                _parts(inner, seen)
    return seen


def _schemas(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _schemas(argument)


def _title(part: type[BaseModel]) -> str:
    return {"Goal": "target", "TaskPart": "task"}.get(part.__name__, part.__name__.lower())


def _kinds(stages: Iterable[Any]) -> list[str]:
    """Name stages in their order, with those that others hold in parentheses."""
    names = []
    for stage in stages:
        for kind, part in stage.given.items():
            held = f" ({' → '.join(_kinds(part.stages))})" if hasattr(part, "stages") else ""
            names.append(f"{kind}{held}")
    return names


def _default(value: object) -> str:
    """Spell a default as YAML does; mappings and lists that hold nothing but defaults are not spelled out."""
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None or value in ("", [], {}, ()):
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
