"""Criteria: how important each position of an axis is. One function each; the name in recipes is the function's.

A criterion sees the *axis matrix*: row i holds every entry, of every weight, that would go if position i of the axis
were cut (for a channel: the filter that writes it and the slices of all weights that read it). So it scores the whole
group, not one tensor. It returns one score a row; a higher score is more important.

A criterion whose second parameter is ``grads`` is called once for each batch with the loss's gradient, laid out as the
weights are, and its scores are averaged over the batches.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slivo.errors import RecipeError

Score = Callable[..., Tensor]


@dataclass(frozen=True)
class Criterion:
    """A scoring function and how it is to be applied.

    Args:
        score: ``(weights)`` or ``(weights, grads)``, each of shape (positions, entries), to scores of shape
            (positions,).
        on: Which weights make up the axis matrix: ``all``, or those that ``read`` the axis (the consumers). The
            gradient of a weight below a batch norm says nothing about its channel's size, because the norm undoes
            it; the consumers' gradient is that of the activation, weight for weight.
        relative: Whether scores of different axes are comparable only after division by their mean on the axis;
            True for magnitudes (a layer of small weights would be starved), False for estimates of the loss.
    """

    score: Score
    on: Literal["all", "read"]
    relative: bool

    @property
    def name(self) -> str:
        """The function's name, which is the criterion's in recipes."""
        return getattr(self.score, "__name__", "custom")

    @property
    def needs_grads(self) -> bool:
        """Whether batches and a loss are needed."""
        try:
            return "grads" in inspect.signature(self.score).parameters
        except ValueError:  # functions of PyTorch's own may have no signature
            return False

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (inspect.getdoc(self.score) or "").partition("\n")[0]


def criterion(*, on: Literal["all", "read"] = "all", relative: bool = True) -> Callable[[Score], Criterion]:
    """Make a criterion of a scoring function; see `Criterion` for the arguments."""

    def wrap(score: Score) -> Criterion:
        return Criterion(score, on, relative)

    return wrap


def names() -> list[str]:
    """Return the names of the criteria that there are, from this module's own functions."""
    return sorted(name for name, value in vars(sys.modules[__name__]).items() if isinstance(value, Criterion))


def resolve(which: str | Criterion) -> Criterion:
    """Return a criterion by name; a criterion is returned as it is.

    Raises:
        RecipeError: If there is none of that name; lists those that there are.
    """
    if isinstance(which, Criterion):
        return which
    if callable(which):
        raise RecipeError(
            "a function alone is no criterion; say what it scores: slivo.prune.criteria.criterion()(function)"
        )
    if which not in names():
        raise RecipeError(f"no criterion is called {which!r}; there are {', '.join(names())}")
    found: Criterion = vars(sys.modules[__name__])[which]
    return found


@criterion()
def l1(weights: Tensor) -> Tensor:
    """Sum of absolute values.

    Args:
        weights: Axis matrix, shape (positions, entries).

    Returns:
        Scores, shape (positions,): Σ|w|.

    Source: Li, Kadav, Durdanovic, Samet, Graf 2017, "Pruning Filters for Efficient ConvNets", arXiv:1608.08710 (there
    of one filter; here of everything that goes with it).
    """
    return weights.abs().sum(1)


@criterion()
def l2(weights: Tensor) -> Tensor:
    """Sum of squares: the squared L2 norm.

    Args:
        weights: Axis matrix, shape (positions, entries).

    Returns:
        Scores, shape (positions,): Σw².

    Source: Fang, Ma, Song, Mi, Wang 2023, "DepGraph", arXiv:2301.12900, eq. 6 (the norm of the whole group).
    """
    return weights.square().sum(1)


@criterion(relative=False)
def random(weights: Tensor) -> Tensor:
    """Uniform random scores from PyTorch's generator: the baseline that others must beat.

    Args:
        weights: Axis matrix, shape (positions, entries); only its height is used.

    Returns:
        Scores in [0, 1), shape (positions,).
    """
    return torch.rand(weights.shape[0])


@criterion()
def fpgm(weights: Tensor) -> Tensor:
    """Sum of distances to all other rows: what is near the geometric median is the most replaceable.

    Args:
        weights: Axis matrix, shape (positions, entries).

    Returns:
        Scores, shape (positions,): Σ_j ‖w_i − w_j‖.

    Source: He, Liu, Wang, Hu, Yang 2019, "Filter Pruning via Geometric Median", arXiv:1811.00250, eq. 4.
    """
    return torch.cdist(weights, weights).sum(1)


@criterion(on="read", relative=False)
def taylor(weights: Tensor, grads: Tensor) -> Tensor:
    """Squared first-order change of the loss when the position is zeroed.

    Args:
        weights: Axis matrix of the weights that read the axis, shape (positions, entries).
        grads: Gradient of the loss on one batch, same shape.

    Returns:
        Scores, shape (positions,): (Σ w·g)². The sum over the readers equals the sum of activation times gradient.

    Source: Molchanov, Mallya, Tyree, Frosio, Kautz 2019, "Importance Estimation for Neural Network Pruning",
    arXiv:1906.10771, eq. 8.
    """
    return (weights * grads).sum(1).square()


@criterion(on="read", relative=False)
def snip(weights: Tensor, grads: Tensor) -> Tensor:
    """Sum of absolute first-order changes of the loss, entry by entry.

    Args:
        weights: Axis matrix of the weights that read the axis, shape (positions, entries).
        grads: Gradient of the loss on one batch, same shape.

    Returns:
        Scores, shape (positions,): Σ|w·g|.

    Source: Lee, Ajanthan, Torr 2019, "SNIP", arXiv:1810.02340, eq. 4-5.
    """
    return (weights * grads).abs().sum(1)


@criterion(on="read", relative=False)
def gradient(weights: Tensor, grads: Tensor) -> Tensor:
    """Sum of squared gradients: how sharply the loss listens to the position.

    Args:
        weights: Axis matrix of the weights that read the axis, shape (positions, entries); not used.
        grads: Gradient of the loss on one batch, same shape.

    Returns:
        Scores, shape (positions,): Σg².
    """
    del weights
    return grads.square().sum(1)


@criterion(on="read", relative=False)
def fisher(weights: Tensor, grads: Tensor) -> Tensor:
    """Second-order change of the loss with the empirical Fisher diagonal: optimal brain damage, summed.

    Args:
        weights: Axis matrix of the weights that read the axis, shape (positions, entries).
        grads: Gradient of the loss on one batch, same shape.

    Returns:
        Scores, shape (positions,): ½ Σ w²g².

    Source: LeCun, Denker, Solla 1990, "Optimal Brain Damage"; the Hessian's diagonal as in Theis, Korshunova, Tejani,
    Huszár 2018, arXiv:1801.05787.
    """
    return 0.5 * (weights * grads).square().sum(1)
