"""Where in a recipe something is wrong, and how to say it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from slivo.errors import RecipeError
from slivo.recipe.schema import SHARE, Recipe

Path = tuple[str | int, ...]
"""Where in the recipe: keys and positions from the top."""


@dataclass(frozen=True)
class Source:
    """Where a recipe came from, for messages.

    Args:
        name: File as the user gave it, or what else to call the recipe.
        lines: Line of each key and item, from 1; empty where there is no file.
        overrides: Settings from the command line, as they were given, by place.
    """

    name: str
    lines: Mapping[Path, int] = field(default_factory=dict)
    overrides: Mapping[Path, str] = field(default_factory=dict)

    def place(self, path: Path) -> str:
        """Return ``file:line`` of a place, or the ``--set`` that set it."""
        for given, text in self.overrides.items():
            if path[: len(given)] == given or given[: len(path)] == path:
                return f"--set {text}"
        for length in range(len(path), -1, -1):
            if path[:length] in self.lines:
                return f"{self.name}:{self.lines[path[:length]]}"
        return self.name

    def error(self, path: Path, text: str) -> RecipeError:
        """Return the error for a place; the text goes on after the place's name."""
        return RecipeError(f"{self.place(path)}: {spell(path)} {text}" if path else f"{self.place(path)}: {text}")


def spell(path: Path) -> str:
    """Write a place as one would in Python.

    Example:
        >>> spell(("stages", 1, "prune", "keep"))
        'stages[1].prune.keep'
    """
    text = ""
    for part in path:
        if isinstance(part, str) and not (part.isprintable() and len(part) <= 60):
            part = shown(part)  # one line, whatever somebody called a key
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def near(word: object, names: Iterable[str]) -> str:
    """Return " Did you mean …?" if a name is close to the word, else nothing.

    Example:
        >>> near("prun", ["prune", "distill"])
        ' Did you mean prune?'
    """
    found = difflib.get_close_matches(str(word), list(names), n=1, cutoff=0.6)
    return f" Did you mean {found[0]}?" if found else ""


def unknown(word: object, names: Sequence[str], what: str) -> str:
    """Say that a value is none of the names there are; goes on after the place's name."""
    return f"is {shown(word)}; {what}: {', '.join(names)}.{near(word, names)}"


def shown(value: object) -> str:
    """Return a value as a message shows it."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def from_validation(error: ValidationError, data: object, source: Source) -> RecipeError:
    """Turn pydantic's errors into one of ours: the first in full, and how many more there are."""
    first, *others = error.errors(include_url=False)
    path = _real(first["loc"], data, missing=first["type"] == "missing")
    found = source.error(path, _text(first, path))
    # Each branch of a choice between types gives an error of its own for the same place.
    more = len({_real(other["loc"], data, missing=other["type"] == "missing") for other in others} - {path})
    return RecipeError(f"{found} ({more} more like this)") if more else found


def _real(loc: Sequence[str | int], data: Any, *, missing: bool) -> Path:
    """Return a place without the names of branches that pydantic puts in, which the data does not have."""
    path: list[str | int] = []
    for number, part in enumerate(loc):
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            if not (missing and number == len(loc) - 1):
                continue
        path.append(part)
    return tuple(path)


def _text(error: ErrorDetails, path: Path) -> str:
    """Say what is wrong and what is allowed; goes on after the place's name."""
    value = error["input"]
    if error["type"] == "extra_forbidden":
        names = _keys(path[:-1])
        return f"is no key here; allowed: {', '.join(names)}.{near(path[-1], names)}"
    found = _field(path)
    allowed = found.description if found is not None and found.description else error["msg"]
    if error["type"] == "missing":
        return f"is missing; {allowed}."
    hint = ""
    if allowed == SHARE and isinstance(value, int | float) and not isinstance(value, bool) and value > 1:
        hint = f" Did you mean {_as_share(value):g}?"
    elif isinstance(value, str) and error["type"] == "literal_error":
        hint = near(value, allowed.replace(" or ", ", ").split(", "))
    return f"is {shown(value)}; {allowed}.{hint}"


def _as_share(value: float) -> float:
    while value > 1:
        value /= 10
    return value


def _keys(path: Path) -> list[str]:
    model = _model(path)
    return [] if model is None else [info.alias or name for name, info in model.model_fields.items()]


def _model(path: Path) -> type[BaseModel] | None:
    """Return the schema of the mapping at a place."""
    model: type[BaseModel] | None = Recipe
    free = False  # the next part is a key of the user's own
    for part in path:
        if free:
            free = False
        elif isinstance(part, str) and model is not None:
            info = _named(model, part)
            model = None if info is None else _inner(info.annotation)
            free = part == "vary"
    return model


def _field(path: Path) -> FieldInfo | None:
    """Return the schema of a key."""
    while path and isinstance(path[-1], int):
        path = path[:-1]
    if path[-2:-1] == ("vary",):  # a key of the user's own: what is said of all of them
        path = path[:-1]
    model = _model(path[:-1])
    return None if model is None or not path else _named(model, str(path[-1]))


def _named(model: type[BaseModel], key: str) -> FieldInfo | None:
    return next((info for name, info in model.model_fields.items() if (info.alias or name) == key), None)


def _inner(annotation: Any) -> type[BaseModel] | None:
    """Return the schema in ``Schema | None``, ``list[Schema]`` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := _inner(each)) is not None), None)
