"""YAML of a recipe: its data, and the line of every key and item; what YAML can hide is found before it does harm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from slivo.errors import RecipeError
from slivo.recipe.text import Path, spell

_DEEPEST = 60
"""Mappings and lists within one another; more is no recipe, and Python's own stack is finite."""

_MOST = 50_000
"""Keys and items, those that aliases stand for counted each time."""


class _TooDeep(yaml.MarkedYAMLError):
    """Nested too deeply."""


class _Loader(yaml.SafeLoader):
    """Refuses depth as it reads: later, each letter would take time in proportion to it."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Return the next node."""
        if self.depth > _DEEPEST:
            raise _TooDeep(problem=f"more than {_DEEPEST} levels", problem_mark=self.get_mark())
        self.depth += 1
        try:
            found: yaml.Node | None = super().compose_node(parent, index)
        finally:
            self.depth -= 1
        return found


@dataclass
class _Places:
    """Walks a document."""

    name: str
    lines: dict[Path, int] = field(default_factory=lambda: {(): 1})
    within: list[yaml.Node] = field(default_factory=list)

    def walk(self, node: yaml.Node, path: Path) -> None:
        """Note the lines of all that a node holds."""
        if any(node is each for each in self.within):
            raise self.error(node, "it holds itself, by an alias; write it out")
        self.within.append(node)
        for key, at, value in _items(node):
            inner = (*path, key)
            if inner in self.lines and isinstance(key, str):
                first = self.lines[inner]
                raise RecipeError(f"{self.name}:{at}: {spell(inner)} is there twice, first on line {first}; keep one")
            self.lines[inner] = at
            if isinstance(key, str) and key.isdecimal():  # YAML reads it as a number, and so does who looks it up
                self.lines[(*path, int(key[:9]))] = at
            if len(self.lines) > _MOST:
                raise self.error(
                    node, f"it holds more than {_MOST} values, by aliases of aliases; write out what counts"
                )
            self.walk(value, inner)
        self.within.pop()

    def error(self, node: yaml.Node, text: str) -> RecipeError:
        return RecipeError(f"{self.name}:{node.start_mark.line + 1}: {text}")


def parsed(text: str, name: str) -> tuple[dict[Path, int], Any]:
    r"""Return the line of every key and item, and the data.

    Args:
        text: The YAML.
        name: What to call it in errors.

    Raises:
        RecipeError: If it is no YAML, has a key twice, or aliases stand for too much.

    Example:
        >>> parsed("name: mine\nstages:\n- prune: {}\n", "my.yaml")[0][("stages", 0, "prune")]
        3
        >>> parsed("a: &a [*a]", "my.yaml")
        Traceback (most recent call last):
        slivo.errors.RecipeError: my.yaml:1: it holds itself, by an alias; write it out
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1 if isinstance(error.position, int) else 1
        raise RecipeError(f"{name}:{line}: it is not valid YAML: {_first(error.reason)}") from error
    except yaml.MarkedYAMLError as error:
        raise _invalid(error, name) from error
    places = _Places(name)
    if root is None:
        return places.lines, None
    places.walk(root, ())
    probe = yaml.SafeLoader("")
    for node in _leaves(root):
        _construct(probe, node, name)
    try:
        return places.lines, loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        raise _invalid(error, name) from error


def _construct(loader: yaml.SafeLoader, node: yaml.ScalarNode, name: str) -> None:
    """Refuse what looks like a date or a number and is none, which YAML's reader does not say where it is."""
    try:
        loader.construct_object(node)
    except yaml.MarkedYAMLError as error:
        raise _invalid(error, name) from error
    except (ValueError, OverflowError, KeyError, IndexError, AttributeError, TypeError) as error:
        line = node.start_mark.line + 1
        raise RecipeError(f"{name}:{line}: {node.value[:40]!r} is not valid YAML: {_first(str(error))}") from error


def _invalid(error: yaml.MarkedYAMLError, name: str) -> RecipeError:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark is not None else 1
    return RecipeError(
        f"{name}:{line}: it is not valid YAML: {_first(error.problem or error.context or 'it ends early')}"
    )


def _items(node: yaml.Node) -> Iterator[tuple[str | int, int, yaml.Node]]:
    """Yield key or position, line and value of all that a node holds."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield str(key.value), key.start_mark.line + 1, value
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield number, item.start_mark.line + 1, item


def _leaves(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            for each in pair:
                yield from _leaves(each)
    else:
        for item in node.value:
            yield from _leaves(item)


def _first(text: str) -> str:
    return (text.splitlines() or [""])[0]
