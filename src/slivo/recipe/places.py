"""Places in a recipe by their keys: read what is there, and put something else there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slivo.recipe.text import Path, spell


def split(key: str) -> Path:
    """Return the place that a key names.

    Example:
        >>> split("stages.0.prune.criterion")
        ('stages', 0, 'prune', 'criterion')
    """
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


def get(data: Any, path: Path) -> Any:
    """Return what is at a place; None if nothing is.

    Example:
        >>> get({"stages": [{"prune": {}}]}, ("stages", 0, "prune")), get({}, ("target", "macs"))
        ({}, None)
    """
    for part in path:
        if isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif isinstance(data, Mapping):
            data = data.get(part)
        else:
            return None
    return data


def put(data: Any, path: Path, value: object) -> None:
    """Put a value at a place; mappings on the way are made, items of lists must be there.

    Raises:
        KeyError: If there is no such place; says why.

    Example:
        >>> recipe = {"stages": [{}]}
        >>> put(recipe, ("stages", 0, "prune", "criterion"), "l2")
        >>> recipe
        {'stages': [{'prune': {'criterion': 'l2'}}]}
    """
    for number, part in enumerate(path):
        last = number == len(path) - 1
        if isinstance(data, list):
            if not isinstance(part, int) or part >= len(data):
                raise KeyError(f"{spell(path[:number])} has items 0 to {len(data) - 1}")
        elif not isinstance(data, dict):
            raise KeyError(f"{spell(path[:number])} is {data!r} and has no keys")
        if last:
            data[part] = value
        elif isinstance(data, dict) and data.get(part) is None:
            data[part] = data = {}
        else:
            data = data[part]


def copied(data: Any) -> Any:
    """Return mappings and lists as ones of their own, which may be changed."""
    if isinstance(data, Mapping):
        return {key: copied(value) for key, value in data.items()}
    return [copied(item) for item in data] if isinstance(data, list | tuple) else data
