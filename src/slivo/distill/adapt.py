"""Adapters: layers, trained along and then thrown away, from the student's features to the teacher's.

`adapter` makes the usual one. A loss whose ``adapter`` is something else, such as a fusion of several layers, says by
`adapted` what makes it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from slivo.distill._tensors import widen


def channels(activation: Tensor) -> int:
    """Return the number of features or channels: the last dimension of (batch[, tokens], features), else the second.

    Example:
        >>> channels(torch.ones(2, 7, 5)), channels(torch.ones(2, 3, 8, 8))
        (5, 3)
    """
    return activation.shape[-1] if activation.dim() <= 3 else activation.shape[1]


def adapter(student: Tensor, teacher: Tensor, *, seed: int = 0) -> nn.Module | None:
    """Make a layer from a student's features to a teacher's, if they differ in number.

    Args:
        student: The student's activation, of which shape, type and device count.
        teacher: The teacher's, of as many dimensions; its type counts, too, for they are compared in the wider.
        seed: Of the initial weights, which do not touch the global random generator.

    Returns:
        A linear layer for (batch[, tokens], features), a 1x1 (1x1x1) convolution for maps, or None if none is needed.

    Example:
        >>> adapter(torch.ones(2, 3, 8, 8), torch.ones(2, 5, 8, 8))
        Conv2d(3, 5, kernel_size=(1, 1), stride=(1, 1))
    """
    sizes = channels(student), channels(teacher)
    if sizes[0] == sizes[1]:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer: nn.Module
        if student.dim() <= 3:
            layer = nn.Linear(*sizes)
        elif student.dim() == 4:
            layer = nn.Conv2d(*sizes, kernel_size=1)
        else:
            layer = nn.Conv3d(*sizes, kernel_size=1)
    return layer.to(student.device, widen(student, teacher)[0].dtype)


Activations = Tensor | Sequence[Tensor]
_Loss = TypeVar("_Loss", bound=Callable[..., Tensor])


def adapted(maker: Callable[..., nn.Module]) -> Callable[[_Loss], _Loss]:
    """Say of a loss function what makes its ``adapter``.

    Args:
        maker: ``(student, teacher, ...)``, one batch of activations as the loss gets them, to a module. Its
            keyword-only parameters are given the loss's options of the same names. Random weights come from PyTorch's
            generator, which is seeded and put back.

    Returns:
        A decorator that leaves the function as it is, but for an attribute.

    Example:
        >>> def scale(student, teacher):
        ...     return nn.Linear(1, 1)
        >>> @adapted(scale)
        ... def loss(student, teacher, adapter): ...
        >>> make(loss, {}, torch.ones(2, 3), torch.ones(2, 5), seed=0)
        Linear(in_features=1, out_features=1, bias=True)
    """

    def mark(function: _Loss) -> _Loss:
        function.__dict__["adapted_by"] = maker
        return function

    return mark


def made_by(function: Callable[..., Tensor]) -> Callable[..., nn.Module] | None:
    """Return what makes a loss's adapter, if it is not `adapter`."""
    found: Callable[..., nn.Module] | None = getattr(function, "adapted_by", None)
    return found


def make(
    function: Callable[..., Tensor], options: Mapping[str, Any], student: Any, teacher: Any, *, seed: int
) -> nn.Module | None:
    """Make what a loss function's ``adapter`` is to be; None if it needs none.

    Args:
        function: The loss.
        options: Its options.
        student: Activations as the loss gets them.
        teacher: The teacher's.
        seed: Of random weights, which do not touch the global random generator.
    """
    maker = made_by(function)
    if maker is None:
        return adapter(student, teacher, seed=seed)
    defaults = {name: each.default for name, each in inspect.signature(function).parameters.items()}
    asked = inspect.signature(maker).parameters.values()
    named = {each.name: (defaults | dict(options))[each.name] for each in asked if each.kind is each.KEYWORD_ONLY}
    first = student if isinstance(student, Tensor) else student[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = maker(student, teacher, **named)
    return made.to(first.device)


def sizes(student: Any, teacher: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the numbers of features or channels that an adapter is made for, of all places."""
    several = [each if isinstance(each, list | tuple) else (each,) for each in (student, teacher)]
    ours, theirs = (tuple(map(channels, each)) for each in several)
    return ours, theirs
