"""Options as callers give them, looked at before anything takes time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any, TypeGuard

from torch import Tensor

from slivo.errors import SlivoError, TargetError
from slivo.graph import Axis, Call, as_args

MinWidth = float | int | Mapping[str, float | int]
"""Least size of axes: a share or a count for all, or for each glob over axis names and module paths its own."""


def said(value: object) -> str:
    """Return a value as it is written, or its type if that would be long.

    Example:
        >>> said(0.5), said([0] * 100)
        ('0.5', 'of type list')
    """
    written = repr(value)
    return written if len(written) <= 40 else f"of type {type(value).__name__}"


def is_number(value: object) -> TypeGuard[float]:
    """Tell numbers, numpy's included, from what is none; truth values are none.

    Example:
        >>> is_number(0.5), is_number(True), is_number("1")
        (True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def is_count(value: object, *, least: int = 0) -> bool:
    """Tell whole numbers of at least so much from what is none.

    Example:
        >>> is_count(2), is_count(0, least=1), is_count(2.0)
        (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def calls_of(batches: Iterable[Any]) -> list[Call]:
    """Return batches as calls of a model.

    Raises:
        SlivoError: If they are one batch, or none.
    """
    check_batches(batches)
    calls = [Call(*as_args(batch)) for batch in batches]
    if not calls:
        raise SlivoError("there are no batches; give at least one, as batches=[inputs]")
    return calls


def check_batches(batches: object) -> None:
    """Look whether something is batches, and not one batch.

    Raises:
        SlivoError: If it is not.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, Tensor | str | Mapping):
        raise SlivoError(f"batches is {said(batches)}; give a list of batches or a loader, as batches=[batch]")


def check_widths(min_width: object, round_to: object) -> None:
    """Look whether least widths are shares or counts, and the multiple a count.

    Raises:
        TargetError: If any is not.
    """
    if not is_count(round_to, least=1):
        raise TargetError(f"round_to is {said(round_to)}; an int of at least 1 (8 makes widths multiples of 8)")
    widths = min_width if isinstance(min_width, Mapping) else {"": min_width}
    for glob, width in widths.items():
        if not isinstance(glob, str):
            raise TargetError(f"min_width has the key {said(glob)}; a glob, as min_width={{'layer1.*': 0.5, '*': 0.1}}")
        if not is_count(width) and not (isinstance(width, float) and 0 <= width <= 1):
            of = f" of {glob!r}" if isinstance(min_width, Mapping) else ""
            raise TargetError(
                f"min_width{of} is {said(width)}; a share from 0.0 to 1.0 (0.1 is a tenth) or a count, an int"
            )


def places(axis: Axis, *, readers: bool) -> set[str]:
    """Return what globs may call an axis: its name and the paths of the modules that write it, or take part in it."""
    return {axis.name, *(m.tensor.rpartition(".")[0] for m in axis.members if readers or not m.reads)}


def matches(glob: str, named: Iterable[str]) -> bool:
    """Tell whether a glob matches one of the names, or a parent of it, or is itself one: names may have brackets.

    Example:
        >>> matches("layer1", ["layer1.0.conv"]), matches("layer", ["layer1.0.conv"])
        (True, False)
    """
    return any(name == glob or fnmatchcase(name, glob) or fnmatchcase(name, f"{glob}.*") for name in named)


def few(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are.

    Example:
        >>> few(list("abcdef"))
        'a, b, c, d and 2 more'
    """
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def wanted(name: str, only: Iterable[str], exclude: Iterable[str]) -> bool:
    """Tell whether globs leave a name: one of ``only`` matches it, if there are any, and none of ``exclude``.

    Example:
        >>> wanted("layer1.conv", (), ["layer2"]), wanted("head", ["layer*"], ())
        (True, False)
    """
    only = tuple(only)
    return (not only or any(matches(glob, [name]) for glob in only)) and not any(
        matches(glob, [name]) for glob in exclude
    )


def listed(given: Sequence[str] | str, what: str) -> tuple[str, ...]:
    """Return names or globs as a tuple; one that stands alone is one, not its characters.

    Raises:
        SlivoError: If there is anything but strings.

    Example:
        >>> listed("layer1.*", "only"), listed(["a", "b"], "only")
        (('layer1.*',), ('a', 'b'))
    """
    names = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence | set) else (given,)
    for name in names:
        if not isinstance(name, str):
            raise SlivoError(f"{what} holds {said(name)}; give names or globs, as {what}=['layer1.*']")
    return names
