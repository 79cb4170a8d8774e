"""Tasks by name, for recipes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from slivo.errors import RecipeError
from slivo.tasks.base import Task
from slivo.tasks.digits import digits


def kinds() -> Mapping[str, Mapping[str, Callable[..., Task]]]:
    """Return the data sets that ship, by kind of task and by name.

    Example:
        >>> sorted(kinds()["image-classification"])
        ['digits']
    """
    return {"image-classification": {function.__name__: function for function in (digits,)}}


def make(kind: str, data: str, **options: Any) -> Task:
    """Return a task by name.

    Args:
        kind: Kind of task, such as ``"image-classification"``.
        data: A data set that ships, such as ``"digits"``, or ``"package.module:callable"`` that returns a `Task`.
        **options: Keyword arguments of the function that makes the task.

    Returns:
        The task.

    Raises:
        RecipeError: If there is no such kind, data set, function or option; says what there is.

    Example:
        >>> make("image-classification", "digits").name
        'digits'
    """
    if kind not in kinds():
        raise RecipeError(f"task.kind is {kind!r}; allowed: {', '.join(sorted(kinds()))}")
    function = _imported(data) if ":" in data else kinds()[kind].get(data)
    if function is None:
        names = ", ".join(sorted(kinds()[kind]))
        raise RecipeError(f"task.data is {data!r}; for {kind} there is: {names}, or give 'package.module:callable'")
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        allowed = ", ".join(inspect.signature(function).parameters) or "none"
        raise RecipeError(f"task.options of {data!r}: {error}; allowed: {allowed}") from error
    task = function(**options)
    if not isinstance(task, Task):
        raise RecipeError(f"task.data: {data!r} returned {type(task).__name__}, not a slivo.tasks.Task")
    if task.kind != kind:
        raise RecipeError(f"task.kind is {kind!r}, but {data!r} makes a task of kind {task.kind!r}")
    return task


def _imported(reference: str) -> Callable[..., object]:
    module, _, name = reference.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(f"task.data: {reference!r} cannot be imported: {error}") from error
    if not callable(function):
        raise RecipeError(f"task.data: {reference!r} is not callable; give a function that returns a Task")
    return function  # type: ignore[no-any-return]
