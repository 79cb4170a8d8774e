"""Losses between activations of student and teacher. One function each; the name in recipes is the function's.

Activations are (batch, features), (batch, tokens, features) or (batch, channels, *space). All losses are pure, scalar,
computed in float32 at least, let no gradient flow into the teacher, and are means over the samples, so that their
weights hold for any batch size; without samples they are 0. Where maps must be of one size, each is average-pooled to
the smaller of both sizes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slivo.distill._maps import Adapter, aligned, fitted, places
from slivo.distill._tensors import gram, nothing, same_batch, unit, widen


def hint(student: Tensor, teacher: Tensor, adapter: Adapter | None = None) -> Tensor:
    """Mean squared difference of activations, over all entries.

    Args:
        student: Activations, shape (batch, features), (batch, tokens, features) or (batch, channels, *space).
        teacher: Activations of as many dimensions.
        adapter: Maps the student's features or channels to the teacher's, where they differ in number (a linear
            layer or 1x1 convolution that is trained along). `distillation` makes it by itself.

    Returns:
        Scalar.

    Raises:
        ShapeError: If the features still differ in number.

    Source: Romero et al. 2014, "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550, eq. 3 (there half the sum).
    """
    student, teacher = aligned(student, teacher)
    if not len(student):
        return nothing(student)
    return F.mse_loss(fitted(student, teacher, adapter), teacher)


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of normalized attention maps (the energy over channels at each place), the mean over samples.

    Args:
        student: Activations, shape (batch, channels, *space) or (batch, tokens, features).
        teacher: Activations of as many dimensions; channels may differ in number.

    Returns:
        Scalar, ‖Q_s − Q_t‖² with Q the map Σ_c F² as a vector of length 1: from 0 to 2 whatever the size of the maps.
        The authors' code divides by the number of places as well: their β = 1000 on 8x8 maps is a weight of 16 here.

    Raises:
        ShapeError: If the activations have no places.

    Source: Zagoruyko, Komodakis 2017, "Paying More Attention to Attention", arXiv:1612.03928, eq. 2
    (there half the norm, not squared).
    """
    student, teacher = aligned(student, teacher)
    maps = [unit(places(tensor).square().sum(1)) for tensor in (student, teacher)]
    if not len(student):
        return nothing(student)
    return (maps[0] - maps[1]).square().sum(-1).mean()


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the similarities between the samples of a batch, each sample's of length 1.

    Args:
        student: Activations, shape (batch, ...).
        teacher: Activations, shape (batch, ...); the rest may differ.

    Returns:
        Scalar, ‖G_s − G_t‖² / batch² with G the products of all pairs of samples, its rows of Euclidean length 1.

    Raises:
        ShapeError: If the batches differ.

    Source: Tung, Mori 2019, "Similarity-Preserving Knowledge Distillation", arXiv:1907.09682, eq. 4.
    """
    same_batch(student, teacher, least=2)
    if not len(student):
        return nothing(student)
    pair = (tensor.flatten(1) for tensor in widen(student, teacher))
    similarities = [unit(gram(rows, rows)) for rows in pair]
    return (similarities[0] - similarities[1]).square().mean()


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the probabilities that a sample has each other one as its neighbor.

    Args:
        student: Activations, shape (batch, ...).
        teacher: Activations, shape (batch, ...); the rest may differ.

    Returns:
        Scalar, the mean over samples, in nats: KL(K_t ‖ K_s) with K the cosines moved to 0-1, which for each sample
        sum to 1 over the others. The authors' code divides by the batch size once more. 0 for fewer than 3 samples.

    Raises:
        ShapeError: If the batches differ.

    Source: Passalis, Tefas 2018, "Learning Deep Representations with Probabilistic Knowledge Transfer",
    arXiv:1803.10837, eq. 4-6.
    """
    same_batch(student, teacher, least=2)
    if len(student) < 3:
        return nothing(student)
    log_s, log_t = (_neighbors(tensor.flatten(1)) for tensor in widen(student, teacher))
    return (log_t.exp() * (log_t - log_s)).sum(-1).mean()


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    """Maximum mean discrepancy between the sets of channel maps: they shall be alike as a set, in any order.

    Args:
        student: Activations, shape (batch, channels, *space) or (batch, tokens, features).
        teacher: Activations of as many dimensions; channels may differ in number.

    Returns:
        Scalar, the mean over samples: E k(s, s') + E k(t, t') − 2 E k(s, t) with k(a, b) = (aᵀb)² and each channel's
        map of length 1.

    Raises:
        ShapeError: If the activations have no places.

    Source: Huang, Wang 2017, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", arXiv:1707.01219,
    eq. 7 with the polynomial kernel of order 2.
    """
    student, teacher = (unit(places(tensor)) for tensor in aligned(student, teacher))
    if not len(student):
        return nothing(student)
    pairs = ((student, student, 1), (teacher, teacher, 1), (student, teacher, -2))
    return torch.stack([sign * gram(a, b).square().mean() for a, b, sign in pairs]).sum()


def _neighbors(rows: Tensor) -> Tensor:
    """Return log-probabilities of each sample's neighbors, shape (batch, batch - 1)."""
    directions = unit(rows)
    size = len(rows)
    others = ~torch.eye(size, dtype=torch.bool, device=rows.device)
    # Rounding may take the cosine of opposite rows below -1.
    kernel = ((gram(directions, directions)[others].view(size, size - 1) + 1) / 2).clamp(min=1e-7)
    return (kernel / kernel.sum(-1, keepdim=True)).log()
