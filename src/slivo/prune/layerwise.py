"""Layerwise: which weights of one matrix become zero, by what it reads, and what becomes of those that stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slivo.errors import SlivoError
from slivo.measure.hessian import check_damping, inverse_factor


@dataclass(frozen=True)
class Zeros:
    """How many weights become zero.

    Args:
        share: Of all weights, 0 to 1.
        group: Size M of the groups of consecutive inputs, each of which has the share for itself; None for no groups.
    """

    share: float
    group: int | None = None

    def least(self, scores: Tensor) -> Tensor:
        """Tell which entries become zero: in each row, or in each group of it, those of the least scores.

        Args:
            scores: Shape (rows, columns).

        Returns:
            Bool, same shape. Of a row or group the nearest whole number goes.

        Example:
            >>> Zeros(0.5).least(torch.tensor([[1.0, 2.0, 4.0, 3.0]])).tolist()
            [[True, True, False, False]]
            >>> Zeros(0.5, 2).least(torch.tensor([[1.0, 2.0, 4.0, 3.0]])).tolist()
            [[True, False, False, True]]
        """
        parted = scores if self.group is None else scores.reshape(len(scores), -1, self.group)
        order = parted.argsort(dim=-1, stable=True)
        gone = torch.zeros_like(parted, dtype=torch.bool)
        gone.scatter_(-1, order[..., : round(self.share * parted.shape[-1])], True)
        return gone.reshape(scores.shape)


def magnitude(weight: Tensor, zeros: Zeros) -> Tensor:
    """Return a matrix without its weights of least magnitude: of the whole matrix, or of each group.

    Args:
        weight: Shape (outputs, inputs).
        zeros: How many go.

    Example:
        >>> magnitude(torch.tensor([[1.0, -2.0], [3.0, 4.0]]), Zeros(0.5)).tolist()
        [[0.0, 0.0], [3.0, 4.0]]
    """
    scores = weight.abs() if zeros.group is not None else weight.abs().reshape(1, -1)
    return weight.masked_fill(zeros.least(scores).reshape(weight.shape), 0)


def wanda(weight: Tensor, squares: Tensor, zeros: Zeros) -> Tensor:
    """Return a matrix without the weights that least change its outputs, each for itself.

    Args:
        weight: Shape (outputs, inputs).
        squares: Sum of squares of each input over all samples, shape (inputs,).
        zeros: How many go, of each output's weights.

    Returns:
        The matrix without those of each output that have the least ``|w| · ‖x‖₂``. Where inputs are never active, the
        smallest of their weights go first.

    Source: Sun, Liu, Bair, Kolter 2023, "A Simple and Effective Pruning Approach for Large Language Models",
    arXiv:2306.11695, eq. 1; compared within each output, section 3.

    Example:
        >>> wanda(torch.tensor([[3.0, -2.0]]), torch.tensor([1.0, 4.0]), Zeros(0.5)).tolist()
        [[0.0, -2.0]]
    """
    norms = squares.sqrt()
    scores = weight.abs().to(norms.dtype) * norms.clamp(min=1e-12 * float(norms.max()) or 1)
    return weight.masked_fill(zeros.least(scores), 0)


def sparsegpt(weight: Tensor, gram: Tensor, zeros: Zeros, *, damping: float = 0.01, columns: int = 128) -> Tensor:
    """Return a sparse matrix whose weights that stay make up for those that go, column by column.

    Args:
        weight: W, shape (outputs, inputs).
        gram: H = XᵀX of what it reads, shape (inputs, inputs), float32 at least: it is computed in its dtype.
        zeros: How many go.
        damping: Added to the diagonal of H, as a share of its mean, so that equal and dead inputs do no harm.
        columns: How many columns choose their zeros together; with groups, each group chooses for itself.

    Returns:
        The matrix of least error ‖(W − Ŵ) X‖² that is reached by going through the columns from first to last: weights
        of the least ``w² / [H⁻¹]ⱼⱼ`` are zeroed, where H is that of the columns from j on, and those columns take over
        what is lost.

    Source: Frantar, Alistarh 2023, "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot",
    arXiv:2301.00774, algorithm 1. Dead inputs have the damping for their square; there, their weights are all zeroed.

    Example:
        >>> gram = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)  # two inputs that are nearly the same
        >>> sparsegpt(torch.tensor([[1.0, 2.0]]), gram, Zeros(0.5), damping=1e-9).round(decimals=6).tolist()
        [[0.0, 2.9000000953674316]]
    """
    factor = inverse_factor(gram, damping)
    left, size = weight.to(gram.dtype, copy=True), weight.shape[1]
    gone = torch.zeros_like(left, dtype=torch.bool)
    step = columns // zeros.group * zeros.group if zeros.group is not None else columns
    for start in range(0, size, step):
        stop = min(start + step, size)
        part, inner = left[:, start:stop], factor[start:stop, start:stop]
        if zeros.group is None:
            count = round(zeros.share * stop * len(left)) - round(zeros.share * start * len(left))
            scores = (part / inner.diagonal()).square().flatten()
            here = torch.zeros_like(scores, dtype=torch.bool)
            here[scores.argsort(stable=True)[:count]] = True
            gone[:, start:stop] = here.reshape(part.shape)
        errors = torch.zeros_like(part)
        for place in range(stop - start):
            if zeros.group is not None and place % zeros.group == 0:
                these = slice(place, place + zeros.group)
                scores = (part[:, these] / inner.diagonal()[these]).square()
                gone[:, start:stop][:, these] = zeros.least(scores)
            errors[:, place] = part[:, place] * gone[:, start + place] / inner[place, place]
            part[:, place:] -= errors[:, place, None] * inner[place, place:]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return left.masked_fill_(gone, 0).to(weight.dtype)


def check_options(damping: float, columns: int, zeros: Zeros) -> None:
    """Look whether the options of `sparsegpt` are in their ranges.

    Raises:
        SlivoError: If one is not.
    """
    check_damping(damping)
    least = zeros.group or 1
    if isinstance(columns, bool) or not isinstance(columns, int) or columns < least:
        raise SlivoError(f"columns is {columns!r}; an int of at least {least}, 128 as in the paper")
