"""Adapters: layers, trained along and then thrown away, from the student's features to the teacher's."""

from __future__ import annotations

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
