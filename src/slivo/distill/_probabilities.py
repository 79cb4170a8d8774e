"""Softened class probabilities, which the losses on logits and on attention share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slivo.distill._tensors import positive, shape, widen
from slivo.errors import ShapeError


def checked(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return both widened, the teacher detached, and which classes are masked: all of what does not count."""
    if student.dim() < 2 or student.shape != teacher.shape:
        classes = student.shape[-1:] != teacher.shape[-1:]
        remedy = "give a class_map (ClassMap) that says which classes are shared" if classes else "use the same batch"
        if not classes and student.dim() > 2:
            remedy += ", and class_dim=1 if classes are the second dimension"
        raise ShapeError(
            f"student logits {shape(student)} and teacher logits {shape(teacher)} must have one shape "
            f"(..., classes); {remedy}"
        )
    student, teacher = widen(student, teacher)
    masked = (student == -math.inf) | (teacher == -math.inf)
    if mask is None or mask.dim() >= student.dim():
        return student, teacher, masked
    if mask.shape != student.shape[:-1]:
        raise ShapeError(
            f"mask has shape {shape(mask)}; there must be one for each row of logits, shape "
            f"{tuple(student.shape[:-1])}; distillation(..., mask=...) says how to take it out of a batch"
        )
    return student, teacher, masked | ~mask.bool().unsqueeze(-1)


def softened(
    student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities of the teacher and of the student, and which classes are masked."""
    positive("temperature", temperature)
    student, teacher, masked = checked(student, teacher, mask)
    return log_probabilities(teacher, masked, temperature), log_probabilities(student, masked, temperature), masked


def log_probabilities(logits: Tensor, left_out: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log-probabilities of the softened classes; 0 at classes left out, so that they add nothing to a KL."""
    return (logits / temperature).masked_fill(left_out, -math.inf).log_softmax(-1).masked_fill(left_out, 0.0)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence over the last dimension, p to q, in nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mixed(log_p: Tensor, log_q: Tensor, portion: float, masked: Tensor) -> Tensor:
    """Return the logarithm of ``portion`` p + (1 - ``portion``) q; exactly 0 at masked classes."""
    return torch.logaddexp(log_p + math.log(portion), log_q + math.log1p(-portion)).masked_fill(masked, 0.0)


def mean(values: Tensor, masked: Tensor) -> Tensor:
    """Return the mean over samples that have a class left."""
    some = ~masked.all(-1)
    return values.masked_fill(~some, 0.0).sum() / some.sum().clamp(min=1)
