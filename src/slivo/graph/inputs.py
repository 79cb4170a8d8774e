"""Example inputs in the forms that people hand them in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from slivo.errors import CaptureError

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


def fresh(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Normalize example inputs as `as_args`, with copies of the tensors: a model may change those in place."""
    args, kwargs = pytree.tree_map_only(Tensor, lambda each: each.detach().clone(), as_args(example_inputs))
    return args, kwargs


def describe(args: tuple[object, ...], kwargs: dict[str, object]) -> str:
    """Say in a few words what a model was called with, for messages."""

    def one(value: object) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{key}: {one(each)}" for key, each in value.items()) + "}"
        return type(value).__name__

    return ", ".join([*map(one, args), *(f"{key}={one(value)}" for key, value in kwargs.items())])


def batch_size(example_inputs: ExampleInputs) -> int:
    """Return the size of the batch: of the first dimension of the first tensor that has any.

    Raises:
        CaptureError: If it is 0, with which nothing is computed that could be counted or compared.

    Example:
        >>> import torch
        >>> batch_size((torch.tensor(0.5), torch.zeros(3, 4)))
        3
    """
    args, kwargs = as_args(example_inputs)
    for value in [*args, *kwargs.values()]:
        if isinstance(value, Tensor) and value.dim():
            if not len(value):
                raise CaptureError(
                    f"the example inputs ({describe(args, kwargs)}) are a batch of no samples; give one sample at least"
                )
            return len(value)
    return 1
