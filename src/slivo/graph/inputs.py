"""Example inputs in the forms that people hand them in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ExampleInputs = Any
"""One tensor, a sequence of positional arguments, a mapping of keyword arguments, or a `Call` with both."""


@dataclass(frozen=True)
class Call:
    """Positional and keyword arguments of a model's ``forward``."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def as_args(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Normalize example inputs to positional and keyword arguments of a model's ``forward``.

    Args:
        example_inputs: One tensor (or any single object), a tuple or list of positional arguments, or a mapping
            of keyword arguments. For a call with both give a `Call`; a tuple that ends with a mapping is *not*
            split.

    Returns:
        ``(args, kwargs)`` such that ``model(*args, **kwargs)`` is the intended call.

    Example:
        >>> as_args({"x": 1})
        ((), {'x': 1})
        >>> as_args((1, 2))
        ((1, 2), {})
        >>> as_args(3)
        ((3,), {})
    """
    if isinstance(example_inputs, Call):
        return example_inputs.args, dict(example_inputs.kwargs)
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}
