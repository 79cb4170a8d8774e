"""Losses between the relations of samples. One function each; the name in recipes is the function's.

They compare how the samples of a batch lie to one another, so student and teacher may have different shapes after the
batch dimension. All are pure, scalar, computed in float32 at least, and let no gradient flow into the teacher. Larger
batches have more relations: 64 samples or more are good. A batch too small to have any gives 0.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from slivo.distill._tensors import gram, kernel, nothing, same_batch, unit, widen
from slivo.errors import RecipeError


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the distances of all pairs of samples, as multiples of their mean.

    Args:
        student: Activations, shape (batch, ...).
        teacher: Activations, shape (batch, ...); the rest may differ.

    Returns:
        Scalar, the mean over pairs of different samples. 25 is the usual weight, beside 50 for `rkd_angle`.

    Raises:
        ShapeError: If the batches differ.

    Source: Park, Kim, Lu, Cho 2019, "Relational Knowledge Distillation", arXiv:1904.05068, eq. 5-8.
    """
    student, teacher = _flat(student, teacher)
    if len(student) < 2:
        return nothing(student)
    pairs = torch.triu_indices(len(student), len(student), 1, device=student.device)
    distances = [_distances(rows, pairs) for rows in (student, teacher)]
    relative = [each / torch.where(each.sum() > 0, each.mean(), 1.0) for each in distances]
    return F.smooth_l1_loss(relative[0], relative[1])


def rkd_angle(student: Tensor, teacher: Tensor, *, chunk: int = 32) -> Tensor:
    """Huber loss between the cosines of the angles of all triples of samples.

    Args:
        student: Activations, shape (batch, ...).
        teacher: Activations, shape (batch, ...); the rest may differ.
        chunk: Vertices looked at at once; memory is chunk x batch x (batch + features). Does not change the result.

    Returns:
        Scalar, the mean over triples of different samples.

    Raises:
        ShapeError: If the batches differ.

    Source: Park, Kim, Lu, Cho 2019, "Relational Knowledge Distillation", arXiv:1904.05068, eq. 9-10.
    """
    if chunk < 1:
        raise RecipeError(f"chunk is {chunk}; it must be 1 or more")
    student, teacher = _flat(student, teacher)
    size = len(student)
    if size < 3:
        return nothing(student)
    total = student.new_zeros(())
    for start in range(0, size, chunk):
        vertices = slice(start, start + chunk)
        # Done again in the backward pass, since all the cosines that it needs would be batch³ numbers.
        part = checkpoint(_angles_differ, student, teacher, vertices, use_reentrant=False, preserve_rng_state=False)
        total = total + part
    return total / (size * (size - 1) * (size - 2))


def correlation_congruence(student: Tensor, teacher: Tensor, *, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Squared difference of the Gaussian kernel between the samples of a batch, by its Taylor series.

    Args:
        student: Activations, shape (batch, ...); made of length 1.
        teacher: Activations, shape (batch, ...); the rest may differ.
        gamma: Width of the kernel, above 0: exp(−γ‖f_i − f_j‖²).
        order: Last power of the series, 1 or more.

    Returns:
        Scalar, ‖K_s − K_t‖² / batch².

    Raises:
        ShapeError: If the batches differ.

    Source: Peng et al. 2019, "Correlation Congruence for Knowledge Distillation", arXiv:1904.01802, eq. 6 and 9.
    """
    if not (math.isfinite(gamma) and gamma > 0) or order < 1:
        raise RecipeError(f"gamma is {gamma} and order {order}; gamma must be above 0 and order 1 or more")
    student, teacher = _flat(student, teacher)
    if not len(student):
        return nothing(student)
    kernels = []
    for rows in map(unit, (student, teacher)):
        cosines = gram(rows, rows)
        terms = [(2 * gamma) ** p / math.factorial(p) * cosines**p for p in range(order + 1)]
        kernels.append(math.exp(-2 * gamma) * torch.stack(terms).sum(0))
    return F.mse_loss(kernels[0], kernels[1])


def cka(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the linear centered kernel alignment of the batch, from 0 (alike up to rotation and scale) to 1.

    Args:
        student: Activations, shape (batch, ...).
        teacher: Activations, shape (batch, ...); the rest may differ.

    Returns:
        Scalar.

    Raises:
        ShapeError: If the batches differ.

    Source: Kornblith, Norouzi, Lee, Hinton 2019, "Similarity of Neural Network Representations Revisited",
    arXiv:1905.00414, section 3.
    """
    student, teacher = _flat(student, teacher)
    if len(student) < 2:
        return nothing(student)
    return 1 - (kernel(student) * kernel(teacher)).sum()


def _flat(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    same_batch(student, teacher, least=2)
    student, teacher = widen(student, teacher)
    return student.flatten(1), teacher.flatten(1)


def _distances(rows: Tensor, pairs: Tensor) -> Tensor:
    """Return the Euclidean distances of pairs of rows; equal rows get no gradient, not an infinite one."""
    # Not by products of rows, which loses all digits of small distances.
    whole = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return whole[pairs[0], pairs[1]]


def _angles_differ(student: Tensor, teacher: Tensor, vertices: slice) -> Tensor:
    """Return the sum of losses over the triples with these vertices."""
    cosines = []
    same = torch.eye(len(student), dtype=torch.bool, device=student.device)
    for rows in (student, teacher):
        edges = unit(rows.unsqueeze(0) - rows[vertices].unsqueeze(1))
        cosines.append(gram(edges, edges).masked_fill(same, 0.0))
    return F.smooth_l1_loss(cosines[0], cosines[1], reduction="sum")
