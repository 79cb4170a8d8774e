"""Losses between the logits of student and teacher. One function each; the name in recipes is the function's.

All are pure and scalar: a mean over the samples (all leading dimensions), in nats where they are divergences. Classes
are the last dimension; of logits (batch, classes, height, width) give ``logits.movedim(1, -1)``, or in an objective
``class_dim=1``: each place is then a sample, and the loss of larger maps no larger. They are computed in float32 at
least, and no gradient flows into the teacher. A class at minus infinity in either is masked: it is left out of both
distributions, and a sample (or token) with no class left is left out of the mean, as is one that ``mask`` does not
count (True or 1 where it does). The mask of a batch's tokens is of no account for logits that have no tokens, such as
of a text's class. Options out of range raise a RecipeError.

Where there is a temperature T the loss is multiplied by T², without which its gradient would fade as 1/T²: a weight
found at one temperature then holds for others. (Not for `dist`: correlations do not fade, its T² is the authors'.)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from slivo.distill._probabilities import checked, kl, log_probabilities, mean, mixed, softened
from slivo.distill._tensors import center, class_indices, positive, shape, share, unit, weight
from slivo.errors import ShapeError


def kd(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, temperature: float = 4.0) -> Tensor:
    """Kullback-Leibler divergence of the softened classes, teacher to student, times T².

    Args:
        student: Logits, shape (..., classes), any float type.
        teacher: Logits of the same shape.
        mask: Which samples or tokens count, shape (...); None for all.
        temperature: T > 0. 4 suits a hundred classes or fewer; 1-2 thousands, where a hot softmax is nearly uniform.

    Returns:
        Scalar, T² KL(p_t ‖ p_s), the mean over samples.

    Raises:
        ShapeError: If the shapes differ.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.

    Example:
        >>> kd(torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 6.0]])).item()
        0.0
    """
    log_t, log_s, masked = softened(student, teacher, mask, temperature)
    return temperature**2 * mean(kl(log_t, log_s), masked)


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, temperature: float = 4.0
) -> Tensor:
    """Cross-entropy of the student under the teacher's softened classes, times T².

    Its gradient is that of `kd`; its value has the teacher's entropy in it and does not reach 0.

    Args:
        student: Logits, shape (..., classes), any float type.
        teacher: Logits of the same shape.
        mask: Which samples or tokens count, shape (...); None for all.
        temperature: T > 0, as in `kd`.

    Returns:
        Scalar, −T² Σ p_t log p_s, the mean over samples.

    Raises:
        ShapeError: If the shapes differ.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.
    """
    log_t, log_s, masked = softened(student, teacher, mask, temperature)
    return temperature**2 * mean(-(log_t.exp() * log_s).sum(-1), masked)


def mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of the logits, over samples and classes.

    Args:
        student: Logits, shape (..., classes), any float type.
        teacher: Logits of the same shape.
        mask: Which samples or tokens count, shape (...); None for all.

    Returns:
        Scalar.

    Raises:
        ShapeError: If the shapes differ.

    Source: Ba, Caruana 2014, "Do Deep Nets Really Need to be Deep?", arXiv:1312.6184, eq. 2 (there half the sum).
    """
    student, teacher, masked = checked(student, teacher, mask)
    return _entrywise((student - teacher).masked_fill(masked, 0.0).square(), masked)


def l1(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean absolute difference of the logits, over samples and classes.

    Args:
        student: Logits, shape (..., classes), any float type.
        teacher: Logits of the same shape.
        mask: Which samples or tokens count, shape (...); None for all.

    Returns:
        Scalar.

    Raises:
        ShapeError: If the shapes differ.
    """
    student, teacher, masked = checked(student, teacher, mask)
    return _entrywise((student - teacher).masked_fill(masked, 0.0).abs(), masked)


def cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """One minus the cosine between the logits of a sample, from 0 (same direction) to 2.

    Args:
        student: Logits, shape (..., classes), any float type.
        teacher: Logits of the same shape.
        mask: Which samples or tokens count, shape (...); None for all.

    Returns:
        Scalar, the mean over samples. Logits that are all 0 have no direction: their cosine is 0.

    Raises:
        ShapeError: If the shapes differ.

    Source: Sanh, Debut, Chaumond, Wolf 2019, "DistilBERT", arXiv:1910.01108, section 2 (there of hidden states).
    """
    student, teacher, masked = checked(student, teacher, mask)
    directions = [unit(logits.masked_fill(masked, 0.0)) for logits in (student, teacher)]
    return mean(1 - (directions[0] * directions[1]).sum(-1), masked)


def dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Decoupled distillation: the label against the rest, and the classes of the rest, weighted apart, times T².

    With alpha 1 and beta one minus the teacher's probability of the label it would be `kd`, which so neglects the
    other classes of just those samples that the teacher is sure of.

    Args:
        student: Logits, shape (..., classes), any float type; three classes or more.
        teacher: Logits of the same shape.
        labels: Class of each sample, shape (...), integers. A sample with a label below 0 or one that is masked is
            left out, and so is one with no other class.
        mask: Which samples or tokens count, shape (...); None for all.
        temperature: T > 0, as in `kd`.
        alpha: Weight of KL between (label, rest).
        beta: Weight of KL within the rest. 8 as in most of the paper's runs; 1-2 where teacher and student are close.

    Returns:
        Scalar, the mean over samples.

    Raises:
        ShapeError: If the shapes differ, there are fewer than three classes, or labels are no class indices.

    Source: Zhao, Cui, Song, Qiu, Liang 2022, "Decoupled Knowledge Distillation", arXiv:2203.08679, eq. 7.
    """
    positive("temperature", temperature)
    weight("alpha", alpha)
    weight("beta", beta)
    student, teacher, masked = checked(student, teacher, mask)
    classes = student.shape[-1]
    if classes < 3:
        raise ShapeError(f"dkd got {classes} classes and needs 3: with 2 the rest is one class; use kd")
    labels = _labels(labels, student)
    target = F.one_hot(labels.clamp(min=0), classes).bool()
    valid = (labels >= 0) & ~(masked & target).any(-1) & ~(masked | target).all(-1)
    student, teacher, masked, target = (each[valid] for each in (student, teacher, masked, target))
    if not len(student):
        return student.sum()
    label = [
        _against_rest(log_probabilities(logits, masked, temperature), target, masked) for logits in (teacher, student)
    ]
    rest = [log_probabilities(logits, masked | target, temperature) for logits in (teacher, student)]
    return temperature**2 * (alpha * kl(*label) + beta * kl(*rest)).mean()


def dist(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> Tensor:
    """One minus the Pearson correlation of the softened classes, within samples and within classes, times T².

    Asks only for the teacher's relations, not for its probabilities: for teachers far stronger than the student.

    Args:
        student: Logits, shape (..., classes), any float type.
        teacher: Logits of the same shape.
        mask: Which samples or tokens count, shape (...); None for all.
        temperature: T > 0. 1 on thousands of classes, 4 on a hundred.
        beta: Weight of the correlation over the classes of a sample.
        gamma: Weight of the correlation over the samples of a class; needs dozens of samples to mean anything.

    Returns:
        Scalar. Samples and classes on which the teacher is constant have no correlation and are left out.

    Raises:
        ShapeError: If the shapes differ.

    Source: Huang, You, Wang, Qian, Xu 2022, "Knowledge Distillation from A Stronger Teacher", arXiv:2205.10536,
    eq. 8-10.
    """
    weight("beta", beta)
    weight("gamma", gamma)
    log_t, log_s, masked = softened(student, teacher, mask, temperature)
    probs_t, probs_s = (logs.exp().masked_fill(masked, 0.0).flatten(0, -2) for logs in (log_t, log_s))
    masked = masked.flatten(0, -2)
    within_samples = _uncorrelated(probs_s, probs_t, masked)
    within_classes = _uncorrelated(probs_s.T, probs_t.T, masked.T)
    return temperature**2 * (beta * within_samples + gamma * within_classes)


def standardized_kd(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, temperature: float = 2.0
) -> Tensor:
    """`kd` of logits standardized per sample, which frees the student from matching the teacher's scale.

    Args:
        student: Logits, shape (..., classes), any float type; two classes or more.
        teacher: Logits of the same shape.
        mask: Which samples or tokens count, shape (...); None for all.
        temperature: T > 0 after standardization. 2, with weight 9, in the paper.

    Returns:
        Scalar, the mean over samples. It changes neither when a constant is added to logits nor when they are scaled.

    Raises:
        ShapeError: If the shapes differ.

    Source: Sun, Ren, Li, Wang, Cao 2024, "Logit Standardization in Knowledge Distillation", arXiv:2403.01427, alg. 1.
    """
    student, teacher, masked = checked(student, teacher, mask)
    student, teacher = (_standardized(logits, masked).masked_fill(masked, -math.inf) for logits in (student, teacher))
    return kd(student, teacher, temperature=temperature)


def jsd(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """Generalized Jensen-Shannon divergence of the softened classes, times T².

    Args:
        student: Logits, shape (..., classes), any float type.
        teacher: Logits of the same shape.
        mask: Which samples or tokens count, shape (...); None for all.
        temperature: T > 0.
        beta: Share of the teacher in the mixture, above 0 and below 1. Small values act as `kd` does (times beta),
            large ones as `reverse_kl` (times one minus beta).

    Returns:
        Scalar, T² (β KL(p_t ‖ m) + (1−β) KL(p_s ‖ m)) with m = β p_t + (1−β) p_s, the mean over samples.

    Raises:
        ShapeError: If the shapes differ.

    Source: Agarwal et al. 2023, "On-Policy Distillation of Language Models" (GKD), arXiv:2306.13649, eq. 1.
    """
    share("beta", beta, zero=False)
    log_t, log_s, masked = softened(student, teacher, mask, temperature)
    log_m = mixed(log_t, log_s, beta, masked)
    return temperature**2 * mean(beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m), masked)


def reverse_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of the softened classes, student to teacher, times T².

    Drops what the teacher finds possible rather than spread over all of it: for students too small to cover it.

    Args:
        student: Logits, shape (..., classes), any float type.
        teacher: Logits of the same shape.
        mask: Which samples or tokens count, shape (...); None for all.
        temperature: T > 0.

    Returns:
        Scalar, T² KL(p_s ‖ p_t), the mean over samples.

    Raises:
        ShapeError: If the shapes differ.

    Source: Gu, Dong, Wei, Huang 2023, "MiniLLM", arXiv:2306.08543, eq. 1.
    """
    log_t, log_s, masked = softened(student, teacher, mask, temperature)
    return temperature**2 * mean(kl(log_s, log_t), masked)


def skewed_kl(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0, alpha: float = 0.1
) -> Tensor:
    """Kullback-Leibler divergence from the teacher to a mixture of both, times T².

    The share of the teacher in the mixture bounds the loss, and with it the gradient, where the student misses a
    class that the teacher expects.

    Args:
        student: Logits, shape (..., classes), any float type.
        teacher: Logits of the same shape.
        mask: Which samples or tokens count, shape (...); None for all.
        temperature: T > 0.
        alpha: Share of the teacher in the mixture, from 0 (`kd`) up to, not including, 1.

    Returns:
        Scalar, T² KL(p_t ‖ α p_t + (1−α) p_s), the mean over samples.

    Raises:
        ShapeError: If the shapes differ.

    Source: Ko, Kim, Chen, Yun 2024, "DistiLLM", arXiv:2402.03898, eq. 4.
    """
    share("alpha", alpha, zero=True)
    log_t, log_s, masked = softened(student, teacher, mask, temperature)
    mixture = mixed(log_t, log_s, alpha, masked) if alpha > 0 else log_s
    return temperature**2 * mean(kl(log_t, mixture), masked)


def binary(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of independent yes/no labels, teacher to student, times T²: for multi-label tasks.

    Args:
        student: Logits, shape (..., labels), any float type; each is of its label alone (sigmoid, not softmax).
        teacher: Logits of the same shape.
        mask: Which samples or tokens count, shape (...); None for all.
        temperature: T > 0.

    Returns:
        Scalar, the sum over labels (the divergence of all answers together), the mean over samples.

    Raises:
        ShapeError: If the shapes differ.

    Source: Yang, Xie, Hou, Huang, Zhou, Huang 2023, "Multi-Label Knowledge Distillation", arXiv:2308.06453, eq. 2.
    """
    positive("temperature", temperature)
    student, teacher, masked = checked(student, teacher, mask)
    student, teacher = (logits.masked_fill(masked, 0.0) / temperature for logits in (student, teacher))
    yes_and_no = [torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], -1) for logits in (teacher, student)]
    return temperature**2 * mean(kl(*yes_and_no).sum(-1), masked)


def _labels(labels: Tensor, logits: Tensor) -> Tensor:
    if labels.shape != logits.shape[:-1]:
        raise ShapeError(
            f"labels have shape {shape(labels)}; there must be one for each row of logits, shape "
            f"{tuple(logits.shape[:-1])}"
        )
    return class_indices(labels, logits.shape[-1])


def _entrywise(values: Tensor, masked: Tensor) -> Tensor:
    return values.sum() / (~masked).sum().clamp(min=1)


def _against_rest(log_probs: Tensor, target: Tensor, masked: Tensor) -> Tensor:
    """Return log-probabilities of the label and of all other classes together, shape (samples, 2)."""
    rest = log_probs.masked_fill(target | masked, -math.inf).logsumexp(-1)
    return torch.stack([log_probs[target], rest], -1)


def _uncorrelated(student: Tensor, teacher: Tensor, masked: Tensor) -> Tensor:
    """Return the mean over rows of one minus Pearson's correlation."""
    student, teacher = (unit(center(rows, masked)) for rows in (student, teacher))
    counted = teacher.ne(0).any(-1)
    distances = 1 - (student * teacher).sum(-1)
    return distances.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)


def _standardized(logits: Tensor, masked: Tensor) -> Tensor:
    centered = center(logits, masked)
    freedom = ((~masked).sum(-1, keepdim=True) - 1).clamp(min=1)
    variance = centered.square().sum(-1, keepdim=True) / freedom
    # Constant logits, as of a last layer that starts at zero, have no spread to divide by.
    deviation = torch.where(variance > 0, variance, 1.0).sqrt()
    return centered / (deviation + 1e-7)
