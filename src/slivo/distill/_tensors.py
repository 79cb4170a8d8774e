"""Arithmetic that the losses share; everything in float32 at least, whatever autocast says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slivo.errors import RecipeError, ShapeError


def positive(name: str, value: float) -> None:
    """Refuse an option that is not a number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise RecipeError(f"{name} is {value}; it must be a number above 0")


def weight(name: str, value: float) -> None:
    """Refuse an option that is not a number from 0 up."""
    if not (math.isfinite(value) and value >= 0):
        raise RecipeError(f"{name} is {value}; it must be 0 or above")


def share(name: str, value: float, *, zero: bool) -> None:
    """Refuse an option that is not below 1 and above 0, or 0 itself if that is allowed."""
    if not (0 < value < 1 or (zero and value == 0)):
        raise RecipeError(f"{name} is {value}; it must be {'0 or above' if zero else 'above 0'} and below 1")


def widen(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the wider of their types, float32 at least, the teacher cut off from its gradient."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def same_batch(student: Tensor, teacher: Tensor, *, least: int) -> None:
    """Refuse tensors of different numbers of samples, or of fewer dimensions than a loss needs."""
    if min(student.dim(), teacher.dim()) < least or len(student) != len(teacher):
        raise ShapeError(
            f"student {shape(student)} and teacher {shape(teacher)} do not fit: both need {least} dimensions or more, "
            "of which the first is the batch and of one size"
        )


def class_indices(labels: Tensor, classes: int) -> Tensor:
    """Return labels as int64, or refuse what cannot be class indices; below 0 stands for no class."""
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not whole or bool((labels >= classes).any()):
        raise ShapeError(
            f"labels have shape {shape(labels)} and type {labels.dtype}; they must be integers below {classes}"
        )
    return labels.long()


def shape(tensor: Tensor) -> str:
    """Return a shape for messages."""
    return str(tuple(tensor.shape))


def gram(first: Tensor, second: Tensor) -> Tensor:
    """Return the products of all rows of two (stacks of) matrices, not rounded by autocast."""
    with torch.autocast(first.device.type, enabled=False):
        return first @ second.transpose(-1, -2)


def unit(tensor: Tensor) -> Tensor:
    """Scale to Euclidean norm 1 over the last dimension; zeros stay zeros, and their gradient goes through as it is.

    Scaled by the largest entry first, so that squares neither overflow nor vanish. The scale may be cut off from the
    gradient because the result does not depend on it.
    """
    largest = _largest(tensor)
    scaled = tensor / torch.where(largest > 0, largest, 1.0)
    squares = scaled.square().sum(-1, keepdim=True)
    return scaled * torch.where(squares > 0, squares, 1.0).rsqrt()


def center(tensor: Tensor, left_out: Tensor | None = None) -> Tensor:
    """Subtract the mean over the last dimension; what is constant up to rounding becomes exactly 0.

    Otherwise a norm taken afterwards would blow the rounding errors up.

    Args:
        tensor: Any float tensor.
        left_out: True where an entry does not count; it becomes 0.
    """
    counted = tensor if left_out is None else tensor.masked_fill(left_out, 0.0)
    count = tensor.shape[-1] if left_out is None else (~left_out).sum(-1, keepdim=True).clamp(min=1)
    centered = counted - counted.sum(-1, keepdim=True) / count
    if left_out is not None:
        centered = centered.masked_fill(left_out, 0.0)
    noise = 8 * torch.finfo(tensor.dtype).eps * _largest(counted)
    return centered.masked_fill(_largest(centered) <= noise, 0.0)


def kernel(rows: Tensor) -> Tensor:
    """Return the centered products of all samples, flat and of length 1: two agree as their product is large.

    Args:
        rows: Features, shape (samples, features).
    """
    centered = center(rows.T).T
    # Any one scale will do, and this one keeps the squares of the products in range.
    largest = centered.detach().abs().amax()
    centered = centered / torch.where(largest > 0, largest, 1.0)
    return unit(gram(centered, centered).flatten())


def _largest(tensor: Tensor) -> Tensor:
    """Return the largest magnitude over the last dimension, 0 if there is none, as in a batch of no samples."""
    return tensor.detach().abs().amax(-1, keepdim=True) if tensor.shape[-1] else tensor.new_zeros(*tensor.shape[:-1], 1)


def nothing(student: Tensor) -> Tensor:
    """Return a loss of 0, for a batch too small to have relations, such as the last of an epoch."""
    return student.flatten()[:0].to(torch.promote_types(student.dtype, torch.float32)).sum()


def logits_of(output: Any) -> Tensor:
    """Return what a model's output is about, or refuse one without a tensor."""
    found = first_tensor(output)
    if found is None:
        raise ShapeError(f"the model puts out {type(output).__name__} without a tensor; return logits")
    return found


def classes_last(logits: Tensor, class_dim: int | None) -> Tensor:
    """Return logits with their classes in the last dimension.

    Args:
        logits: Of any shape.
        class_dim: Where the classes are; None for the last dimension of up to three.

    Raises:
        ShapeError: If there is no such dimension, or it must be said which it is.

    Example:
        >>> classes_last(torch.zeros(2, 5, 4, 4), 1).shape
        torch.Size([2, 4, 4, 5])
    """
    if class_dim is None and logits.dim() > 3:
        raise ShapeError(
            f"logits {shape(logits)} have more than three dimensions; say which holds the classes: class_dim=1 for "
            "(batch, classes, height, width), -1 for the last"
        )
    try:
        return logits if class_dim is None else logits.movedim(class_dim, -1)
    except IndexError:
        raise ShapeError(f"class_dim is {class_dim}, and logits {shape(logits)} have no such dimension") from None


def first_tensor(output: Any) -> Tensor | None:
    """Return what a model's or module's output is about: its logits, or else the first tensor in it."""
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((found for found in map(first_tensor, items) if found is not None), None)
