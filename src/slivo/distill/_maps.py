"""What losses on activations share: bringing them to one size and number of features, and layers to train along.

Activations are (batch, features), (batch, tokens, features) or (batch, channels, *space).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slivo.distill._tensors import same_batch, shape, widen
from slivo.errors import ShapeError

Adapter = Callable[[Tensor], Tensor]


def aligned(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both widened and pooled to the smaller of their sizes of space, or numbers of tokens."""
    same_batch(student, teacher, least=2)
    student, teacher = widen(student, teacher)
    if student.dim() != teacher.dim() or student.dim() > 5:
        raise ShapeError(
            f"student activations {shape(student)} and teacher activations {shape(teacher)} must have one number of "
            "dimensions, 2 to 5; tap places of one kind, or use a relation (sp, rkd_distance), which takes any"
        )
    space = slice(1, -1) if student.dim() == 3 else slice(2, None)
    size = [min(pair) for pair in zip(student.shape[space], teacher.shape[space], strict=True)]
    return pooled(student, size), pooled(teacher, size)


def pooled(tensor: Tensor, size: list[int]) -> Tensor:
    """Return the averages over a coarser grid of places."""
    space = slice(1, -1) if tensor.dim() == 3 else slice(2, None)
    if list(tensor.shape[space]) == size:
        return tensor
    if tensor.dim() == 3:
        return F.adaptive_avg_pool1d(tensor.transpose(1, 2), size[0]).transpose(1, 2)
    if tensor.dim() == 4:
        return F.adaptive_avg_pool2d(tensor, (size[0], size[1]))
    return F.adaptive_avg_pool3d(tensor, (size[0], size[1], size[2]))


def places(tensor: Tensor) -> Tensor:
    """Return activations as (batch, channels, places)."""
    if tensor.dim() < 3:
        raise ShapeError(f"activations {shape(tensor)} have no places; tap a module whose output has space or tokens")
    return tensor.transpose(1, 2) if tensor.dim() == 3 else tensor.flatten(2)


def average(tensor: Tensor) -> Tensor:
    """Return the mean over space or tokens, shape (batch, features)."""
    return tensor if tensor.dim() == 2 else places(tensor).mean(-1)


def fitted(student: Tensor, teacher: Tensor, adapter: Adapter | None) -> Tensor:
    """Return the student's activation, of `aligned` ones, in the teacher's shape.

    Raises:
        ShapeError: If the features still differ in number.
    """
    if adapter is not None:
        with exact(student):
            student = adapter(student)
    if student.shape != teacher.shape:
        raise ShapeError(
            f"student activations {shape(student)} and teacher activations {shape(teacher)} differ in features; "
            "give an adapter, or let distillation(...).prepare(student, batch) make one"
        )
    return student


def exact(tensor: Tensor) -> torch.autocast:
    """Return a context in which autocast rounds nothing."""
    return torch.autocast(tensor.device.type, enabled=False)


def pointwise(like: Tensor, ins: int, outs: int) -> nn.Module:
    """Return a layer over the features or channels of activations of a kind."""
    if like.dim() <= 3:
        return nn.Linear(ins, outs)
    return nn.Conv2d(ins, outs, 1) if like.dim() == 4 else nn.Conv3d(ins, outs, 1)


class Norm(nn.BatchNorm2d):
    """Batch norm of maps that goes by the running statistics where there is but one value a channel to take them of."""

    def forward(self, maps: Tensor) -> Tensor:
        """Normalize maps (batch, channels, height, width)."""
        training = self.training and maps.numel() > maps.shape[1]
        return F.batch_norm(
            maps, self.running_mean, self.running_var, self.weight, self.bias, training, self.momentum or 0.0, self.eps
        )
