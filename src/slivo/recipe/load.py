"""Read recipes: YAML with line numbers, settings from the command line, and all that can be checked beforehand."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from pydantic import ValidationError

from slivo.errors import RecipeError
from slivo.recipe.checks import problems
from slivo.recipe.places import copied, put, split
from slivo.recipe.reading import parsed
from slivo.recipe.schema import Recipe
from slivo.recipe.shipped import shipped
from slivo.recipe.text import Path, Source, from_validation, near


@dataclass(frozen=True)
class Loaded:
    """A valid recipe, and where it came from."""

    recipe: Recipe
    source: Source


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes, by which editors complete keys, explain them and mark what is wrong.

    It says what keys and types there are. What else can be wrong, such as a criterion that does not exist, `load` says.

    Example:
        >>> json_schema()["properties"]["stages"]["type"]
        'array'
    """
    found = Recipe.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": "A recipe of slivo"}


def load(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    settings: Sequence[str] = (),
    *,
    target: Mapping[str, float | str] | None = None,
) -> Loaded:
    """Read and check a recipe.

    Args:
        recipe: A YAML file, the name of a recipe that ships, or a mapping as YAML would give.
        settings: Overrides such as ``"stages.0.prune.keep.macs=0.4"``; values are YAML.
        target: In place of the recipe's.

    Returns:
        The recipe with every default filled in.

    Raises:
        RecipeError: If it cannot be read or is not valid; says file, line, key and what is allowed.

    Example:
        >>> load("prune-then-distill", ["teacher.fit.epochs=3"]).recipe.teacher.fit.epochs
        3
        >>> load("prune-then-distill", ["target.macs=7"])
        Traceback (most recent call last):
        slivo.errors.RecipeError: --set target.macs=7: target.macs is 7; a share between 0 and 1 (0.5 keeps half). \
Did you mean 0.7?
    """
    lines: dict[Path, int] = {}
    data: Any
    if isinstance(recipe, Mapping):
        name, data = "recipe", copied(recipe)
    else:
        name, text = _text(recipe)
        lines, data = parsed(text, name)
    if not isinstance(data, dict):
        where = f"{name}:1" if lines else name
        raise RecipeError(f"{where}: a recipe is a mapping with task, teacher, target and stages")
    if target is not None:
        data["target"] = dict(target)
    source = Source(name, lines, _override(data, settings))
    try:
        valid = Recipe.model_validate(data)
    except ValidationError as error:
        raise from_validation(error, data, source) from None
    if not valid.name:
        valid = valid.model_copy(update={"name": File(name).stem})
    for path, text in problems(valid):
        raise source.error(path, text)
    return Loaded(valid, source)


def _text(recipe: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the name and the YAML of a recipe."""
    name, file = os.fspath(recipe), File(recipe)
    ships = shipped()
    if not file.is_file() and name in ships:
        return name, ships[name]
    try:
        return name, file.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = near(file.stem, ships)
        raise RecipeError(f"{name} is no file, and no recipe that ships: {', '.join(ships)}.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"{name} cannot be read: {reason}") from error


def _override(data: dict[str, Any], settings: Sequence[str]) -> dict[Path, str]:
    """Change the data as the settings say; returns them by place."""
    places: dict[Path, str] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {setting}: write key=value, such as stages.0.prune.keep.macs=0.4")
        try:
            value = parsed(text, "value")[1]
        except RecipeError as error:
            raise RecipeError(f"--set {setting}: the value is not valid YAML") from error
        path = split(key)
        try:
            put(data, path, value)
        except KeyError as error:
            raise RecipeError(f"--set {setting}: {error.args[0]}") from None
        places[path] = setting
    return places
