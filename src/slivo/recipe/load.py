"""Read recipes: YAML with line numbers, settings from the command line, and all that can be checked beforehand."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path as File
from typing import Any

import yaml
from pydantic import ValidationError

from slivo.errors import RecipeError
from slivo.recipe.checks import problems
from slivo.recipe.places import copied, put, split
from slivo.recipe.schema import Recipe
from slivo.recipe.text import Path, Source, from_validation, near, spell


@dataclass(frozen=True)
class Loaded:
    """A valid recipe, and where it came from."""

    recipe: Recipe
    source: Source


def shipped() -> dict[str, str]:
    """Return the recipes that ship with the package, as YAML, by name.

    Example:
        >>> "prune-then-distill" in shipped()
        True
    """
    folder = resources.files("slivo") / "recipes"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in files}


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
        lines, data = _parsed(text, name)
    if not isinstance(data, dict):
        raise RecipeError(f"{name}: a recipe is a mapping with task, teacher, target and stages")
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


def _parsed(text: str, name: str) -> tuple[dict[Path, int], Any]:
    """Return the line of every key and item, and the data."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        raise RecipeError(f"{where}: it is not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: it is not valid YAML: {str(error).splitlines()[0]}") from error
    lines: dict[Path, int] = {(): 1}
    for path, line in [] if root is None else _lines(root, ()):
        if path in lines and isinstance(path[-1], str):
            raise RecipeError(f"{name}:{line}: {spell(path)} is there twice, first on line {lines[path]}; keep one")
        lines[path] = line
    return lines, data


def _lines(node: yaml.Node, path: Path) -> Iterator[tuple[Path, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*path, str(key.value)), key.start_mark.line + 1
            yield from _lines(value, (*path, str(key.value)))
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield (*path, number), item.start_mark.line + 1
            yield from _lines(item, (*path, number))


def _override(data: dict[str, Any], settings: Sequence[str]) -> dict[Path, str]:
    """Change the data as the settings say; returns them by place."""
    places: dict[Path, str] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {setting}: write key=value, such as stages.0.prune.keep.macs=0.4")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {setting}: the value is not valid YAML") from error
        path = split(key)
        try:
            put(data, path, value)
        except KeyError as error:
            raise RecipeError(f"--set {setting}: {error.args[0]}") from None
        places[path] = setting
    return places
