"""Criteria of how well what reads an axis could do without a position: its outputs, or its gradient, reconstructed."""

from __future__ import annotations

import torch
from torch import Tensor

from slivo.measure.readers import Reader
from slivo.prune.criterion import criterion


@criterion(on="read")
def thinet(readers: tuple[Reader, ...]) -> Tensor:
    """Error in what the readers give out when positions go one after the other, the most harmless first.

    Args:
        readers: The weights W that read the axis, with XᵀX of all that they read.

    Returns:
        Scores, shape (positions,): ‖Σ_{j ∈ T} X_j W_j‖², where T holds the position and those that went before it. The
        next to go is the one with which this is least. Scores rise in the order in which positions go.

    Source: Luo, Wu, Lin 2017, "ThiNet", arXiv:1707.06342, eq. 6 and algorithm 1 (there on sampled places of the
    outputs; here on all).

    Example:
        >>> alike = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0], [0.5, 0.0, 1.0]])
        >>> weights = torch.tensor([[[1.0]], [[2.0]], [[-1.0]]])
        >>> thinet.score((Reader(weights, alike, torch.arange(3)[:, None]),)).tolist()
        [1.0, 5.0, 1.0000000000000002]
    """
    products = torch.stack([_contributions(reader) for reader in readers]).sum(0)
    scores, left = torch.zeros_like(products[0]), list(range(len(products)))
    added, error, least = products.diagonal().clone(), products.new_zeros(()), products.new_zeros(())
    while left:
        best = left.pop(int(added[left].argmin()))
        error = error + added[best]
        scores[best] = torch.maximum(error, least)
        least, added = torch.nextafter(scores[best], least + torch.inf), added + 2 * products[best]
    return scores


@criterion(on="read")
def reconstruction(readers: tuple[Reader, ...], damping: float = 0.01) -> Tensor:
    """Error in what the readers give out, at best, when positions go one after the other, the most harmless first.

    As `thinet`, but after each step the readers' other weights make up for it by least squares; the first step is that
    of `obs`. What two positions tell alike is lost only with the second.

    Args:
        readers: The weights W that read the axis, with H = XᵀX of all that they read.
        damping: Added to the diagonal of H, as a share of its mean, so that dead and equal columns do no harm.

    Returns:
        Scores, shape (positions,): min over V of ‖XW − X_S V‖², with S all but the position and those that went before.

    Source: He, Zhang, Sun 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv:1707.06168, eq. 1
    (the error; the choice by elimination in place of their lasso).

    Example:
        >>> alike = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
        >>> reader = Reader(torch.tensor([[[1.0]], [[2.0]], [[3.0]]]), alike, torch.arange(3)[:, None])
        >>> [round(each, 2) for each in reconstruction.score((reader,), damping=1e-9).tolist()]  # one stands for both
        [0.0, 4.0, 20.0]
    """
    inverses, weights = [], []
    for reader in readers:
        inverse = torch.linalg.inv(_damped(reader.gram.double(), damping))
        places = reader.places.flatten()
        inverses.append(inverse[places][:, places])
        weights.append(reader.weights.double().flatten(0, 1))
    count = len(readers[0].places)
    scores, left, error = torch.zeros(count, dtype=torch.float64), list(range(count)), 0.0
    while left:
        pairs = list(zip(inverses, weights, strict=True))
        added = sum((_removal(inverse, weight, count)[left] for inverse, weight in pairs), torch.zeros(()))
        best = left[int(added.argmin())]
        error += float(added.min().clamp(min=0))
        scores[best] = error
        left.remove(best)
        for number, (inverse, weight) in enumerate(pairs):
            inverses[number], weights[number] = _without(inverse, weight, best, count)
    return scores.to(readers[0].weights.device)


@criterion(on="read")
def gain(readers: tuple[Reader, ...], slopes: tuple[Tensor, ...], damping: float = 0.01) -> Tensor:
    """Share of the readers' gradient that no other position explains: what training could learn from it alone.

    Args:
        readers: The weights that read the axis, with XᵀX of what they read.
        slopes: The gradient of the loss for each reader's weights, Xᵀg with g that of its outputs; shaped as they are.
        damping: ε, added to the diagonal of XᵀX as a share of its mean.

    Returns:
        Scores, shape (positions,): Σ over readers of tr(b_iᵀ [(C⁻¹)_ii]⁻¹ b_i) with b = C⁻¹Xᵀg and C = XᵀX + ε over the
        axis's columns. It is by how much the part of g that X explains, gᵀX C⁻¹ Xᵀg, is smaller without the position.
        Where columns have nothing to do with one another it is (Xᵀg)² / C.

    Source: Rao 1948, "Large sample tests of statistical hypotheses …" (the score test), for one position among others.

    Example:
        >>> reader = Reader(torch.ones(2, 1, 1), torch.diag(torch.tensor([4.0, 1.0])), torch.tensor([[0], [1]]))
        >>> gain.score((reader,), (torch.tensor([[[2.0]], [[3.0]]]),), damping=0.0).tolist()
        [1.0, 9.0]
    """
    scores = []
    for reader, slope in zip(readers, slopes, strict=True):
        inverse, flat = _inverse(reader, damping), slope.double().flatten(0, 1)
        scores.append(_removal(inverse, inverse @ flat, len(slope)))
    return torch.stack(scores).sum(0)


@criterion(on="read")
def inverse_covariance(readers: tuple[Reader, ...], slopes: tuple[Tensor, ...], damping: float = 0.01) -> Tensor:
    """Squared gradients times the inverse covariance of what is read; `gain` is the form to prefer.

    Args:
        readers: The weights that read the axis, with XᵀX of what they read.
        slopes: The gradient of the loss for each reader's weights, Xᵀg; shaped as they are.
        damping: ε, added to the diagonal of XᵀX as a share of its mean.

    Returns:
        Scores, shape (positions,): (XᵀX + ε)⁻¹ (Xᵀg)², the square taken entry by entry, summed over outputs and a
        position's columns. They may be negative where columns are alike, and change if a unit is made larger and its
        readers smaller by as much. Where columns have nothing to do with one another they are those of `gain`.

    Source: given as "information gain" in texts on compression, without derivation; offered to compare.

    Example:
        >>> reader = Reader(torch.ones(2, 1, 1), torch.diag(torch.tensor([4.0, 1.0])), torch.tensor([[0], [1]]))
        >>> inverse_covariance.score((reader,), (torch.tensor([[[2.0]], [[3.0]]]),), damping=0.0).tolist()
        [1.0, 9.0]
    """
    scores = []
    for reader, slope in zip(readers, slopes, strict=True):
        squares = slope.double().flatten(0, 1).square().sum(1)
        scores.append((_inverse(reader, damping) @ squares).reshape(len(slope), -1).sum(1))
    return torch.stack(scores).sum(0)


def _contributions(reader: Reader) -> Tensor:
    """Return inner products of what positions add to a reader's outputs, shape (positions, positions)."""
    count, columns = reader.places.shape
    weights, places = reader.weights.double().flatten(0, 1), reader.places.flatten()
    products: Tensor = (weights @ weights.mT) * reader.gram.double()[places][:, places]
    return products.reshape(count, columns, count, columns).sum((1, 3))


def _inverse(reader: Reader, damping: float) -> Tensor:
    """Return the inverse of the damped products of an axis's own columns."""
    places = reader.places.flatten()
    inverse: Tensor = torch.linalg.inv(_damped(reader.gram.double()[places][:, places], damping))
    return inverse


def _damped(gram: Tensor, damping: float) -> Tensor:
    mean: Tensor = gram.diagonal().mean()
    added: Tensor = damping * (mean if mean > 0 else torch.ones_like(mean))
    return gram + added * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def _removal(inverse: Tensor, weights: Tensor, count: int) -> Tensor:
    """Return for each position what least squares loses without it: tr(W_iᵀ [(H⁻¹)_ii]⁻¹ W_i)."""
    places = torch.arange(len(weights), device=weights.device).reshape(count, -1)
    blocks = inverse[places[:, :, None], places[:, None, :]]
    rows = weights[places]
    lost: Tensor = (rows * torch.linalg.solve(blocks, rows)).sum((1, 2))
    return lost


def _without(inverse: Tensor, weights: Tensor, position: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the inverse, and the weights that fit best, when a position is gone; its columns become unit ones."""
    columns = len(weights) // count
    gone = torch.arange(position * columns, (position + 1) * columns, device=weights.device)
    factor = torch.linalg.solve(inverse[gone][:, gone], torch.cat([inverse[gone], weights[gone]], dim=1))
    inverse, weights = (
        inverse - inverse[:, gone] @ factor[:, : len(inverse)],
        weights - inverse[:, gone] @ factor[:, len(inverse) :],
    )
    inverse[gone, gone], weights[gone] = 1.0, 0.0
    return inverse, weights
