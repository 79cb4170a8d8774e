"""Ranks: losses between samples, over the batches of all processes of a data-parallel training."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, distributed

Loss = Callable[..., Tensor]


def gathered(function: Loss) -> Loss:
    """Have a loss that compares samples see those of all processes, not its own process's part of the batch alone.

    Args:
        function: ``(student, teacher, ..., **options)``, of activations whose first dimension is the batch, such as
            `slivo.distill.relations.rkd_distance`. What it is given beside (``adapter``) stays each process's own.

    Returns:
        The function of activations of all processes, which must be of equal shapes (``drop_last``). The same where
        there is one process. Each process gets the loss of the whole batch, and gradients that
        `torch.nn.parallel.DistributedDataParallel`, which averages them, makes those of the whole batch.

    Example:
        >>> from slivo.distill import Term, relations
        >>> term = Term(gathered(relations.rkd_distance), at="layer3")
        >>> term.name
        'rkd_distance'
    """

    @wraps(function)
    def over_all(student: Any, teacher: Any, *args: Any, **options: Any) -> Tensor:
        several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        if several:
            student, teacher = _gathered(student), _gathered(teacher)
        return function(student, teacher, *args, **options)

    return over_all


class _Gather(torch.autograd.Function):
    """Joins the parts of all processes; gives each the sum of what all say of its part.

    PyTorch's own (2.6 to 2.13) sends gradients as they lie in memory, and those that lie transposed arrive mixed up.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        """Return all parts, in the order of ranks."""
        parts = [torch.empty_like(part) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, part)
        ctx.size = len(part)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the gradient of the part of this process."""
        whole = gradient.contiguous().clone()
        distributed.all_reduce(whole)
        start = distributed.get_rank() * ctx.size
        return whole[start : start + ctx.size]


def _gathered(activations: Any) -> Any:
    if not isinstance(activations, Tensor):
        return [_gathered(each) for each in activations]
    return _Gather.apply(activations.contiguous())  # type: ignore[no-untyped-call]
