"""Twins: modules that are alike but for the values of their tensors, so that one captured graph serves all of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from slivo.graph.capture import Capture, canonical_names, capture
from slivo.graph.inputs import ExampleInputs

_Seen = list[tuple[nn.Module, Any, Capture]]

_seen: ContextVar[_Seen | None] = ContextVar("_seen", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """Capture modules that are alike once, until this block ends.

    Modules that were captured must not change until then; the graphs of their twins have the tensors of the first
    (`slivo.graph.program.build` takes others).
    """
    token = _seen.set(list(_seen.get() or ()))
    try:
        yield
    finally:
        _seen.reset(token)


def capture_once(module: nn.Module, inputs: ExampleInputs, described: Any) -> Capture:
    """Capture a module for inputs of any size, or return the graph of one that is alike.

    Args:
        module: The module.
        inputs: What it is called with.
        described: What of the inputs the graph depends on.

    Raises:
        CaptureError: As `slivo.graph.capture.capture`.
    """
    seen = _seen.get()
    for other, given, found in seen or ():
        if given == described and alike(module, other):
            return found
    captured = capture(module, inputs, dynamic=True)
    if seen is not None and not captured.by_values:
        seen.append((module, described, captured))
    return captured


def alike(one: nn.Module, other: nn.Module) -> bool:
    """Tell whether two modules run the same code on tensors of the same shapes and dtypes.

    What cannot be compared is taken as different: everything but numbers, strings, tensors and containers of them
    has to be the same object.

    Example:
        >>> alike(nn.Linear(2, 3), nn.Linear(2, 3)), alike(nn.Linear(2, 3), nn.Linear(3, 3))
        (True, False)
    """
    if one is other:
        return True
    ours, theirs = (list(each.named_modules(remove_duplicate=False)) for each in (one, other))
    return (
        [path for path, _ in ours] == [path for path, _ in theirs]
        and all(_same_modules(left, right) for (_, left), (_, right) in zip(ours, theirs, strict=True))
        and canonical_names(one) == canonical_names(other)
    )


def _same_modules(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = vars(one), vars(other)
    if type(one) is not type(other) or ours.keys() != theirs.keys():
        return False
    tensors = ("_parameters", "_buffers")
    return all(_same_shapes(ours[kind], theirs[kind]) for kind in tensors) and all(
        _same(value, theirs[key]) for key, value in ours.items() if key not in (*tensors, "_modules")
    )


def _same_shapes(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> bool:
    def kind(tensor: Tensor | None) -> Any:
        return None if tensor is None else (type(tensor), tensor.shape, tensor.dtype, tensor.device)

    return list(ours) == list(theirs) and all(kind(ours[name]) == kind(theirs[name]) for name in ours)


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, bool | int | float | str | torch.Size | torch.dtype | torch.device):
        return bool(one == other)
    if isinstance(one, Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        return same and not one.is_meta and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, set | frozenset):
        return one == other and all(isinstance(each, int | str) for each in one)
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, functools.partial):
        return _same((one.func, one.args, one.keywords), (other.func, other.args, other.keywords))
    return False
