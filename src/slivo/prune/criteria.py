"""Criteria: how important each position of an axis is. One function each; the name in recipes is the function's.

A criterion sees the *axis matrix*: row i holds every entry, of every weight, that would go if position i of the axis
were cut (for a channel: the filter that writes it and the slices of all weights that read it). So it scores the whole
group, not one tensor. It returns one score a row; a higher score is more important.

What it is given is what its parameters are called; see `Criterion`. One that asks for gradients is called once for each
batch, and its scores are averaged over the batches.
"""

from __future__ import annotations

import inspect
import sys

import torch
from torch import Tensor
from torch.nn import functional as F

from slivo.errors import RecipeError
from slivo.measure.readers import Reader
from slivo.prune.criterion import Criterion as Criterion
from slivo.prune.criterion import criterion as criterion
from slivo.prune.effects import masking as masking
from slivo.prune.effects import movement as movement
from slivo.prune.reconstruction import gain as gain
from slivo.prune.reconstruction import inverse_covariance as inverse_covariance
from slivo.prune.reconstruction import reconstruction as reconstruction
from slivo.prune.reconstruction import thinet as thinet
from slivo.prune.sparse.entropy import entropy as entropy


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
    norms: Tensor = torch.linalg.vector_norm(weights, dim=1)  # without a matrix of squares
    return norms.square()


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


@criterion(on="scale", relative=False)
def bn_scale(weights: Tensor) -> Tensor:
    """Absolute scale of the norms on the axis: what is scaled to nothing can go.

    Args:
        weights: Scales (γ) of the norms on the axis, shape (positions, norms × entries).

    Returns:
        Scores, shape (positions,): mean of |γ|. Norms make them comparable between layers as they are.

    Source: Liu, Li, Shen, Huang, Yan, Zhang 2017, "Learning Efficient Convolutional Networks through Network
    Slimming", arXiv:1708.06519, section 3.

    Example:
        >>> bn_scale.score(torch.tensor([[0.5], [-2.0]])).tolist()
        [0.5, 2.0]
    """
    return weights.abs().mean(1)


@criterion(relative=False)
def lamp(weights: Tensor) -> Tensor:
    """Squared norm as a share of all that are not smaller: the best of each axis scores 1, whatever its size.

    Args:
        weights: Axis matrix, shape (positions, entries).

    Returns:
        Scores in [0, 1], shape (positions,): ‖w_i‖² / Σ_{j: ‖w_j‖ ≥ ‖w_i‖} ‖w_j‖². Equal norms get equal scores.

    Source: Lee, Park, Mo, Ahn, Shin 2021, "Layer-Adaptive Sparsity for the Magnitude-Based Pruning", arXiv:2010.07611
    (there of single weights in a layer; here of the positions of an axis).

    Example:
        >>> lamp.score(torch.tensor([[1.0], [2.0], [0.0]])).tolist()
        [0.20000000298023224, 1.0, 0.0]
    """
    norms = weights.square().sum(1)
    order = norms.argsort()
    # Sums from each rank upward; the first of equal norms has all of them in its sum.
    sums = norms[order].flip(0).cumsum(0).flip(0)
    above = sums[torch.searchsorted(norms[order], norms)]
    return torch.where(above > 0, norms / above, 0)


@criterion(on="read")
def wanda(weights: Tensor, inputs: Tensor) -> Tensor:
    """Sum of absolute weights times the norm of the activation that each reads.

    Args:
        weights: Axis matrix of the weights that read the axis, shape (positions, entries).
        inputs: Sum of squares of the activation that each of them multiplies, same shape.

    Returns:
        Scores, shape (positions,): Σ |w| · ‖x‖₂.

    Source: Sun, Liu, Bair, Kolter 2023, "A Simple and Effective Pruning Approach for Large Language Models",
    arXiv:2306.11695, eq. 1 (there of single weights).

    Example:
        >>> wanda.score(torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[4.0, 4.0], [0.0, 0.0]])).tolist()
        [6.0, 0.0]
    """
    return (weights.abs() * inputs.sqrt()).sum(1)


@criterion(on="read")
def activation(inputs: Tensor) -> Tensor:
    """Norm of the activation: what is hardly ever active can go.

    Args:
        inputs: Sum of squares of the activation that each weight that reads the axis multiplies, shape (positions,
            entries).

    Returns:
        Scores, shape (positions,): mean over the weights of ‖x‖₂.

    Source: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation" (Minitron),
    arXiv:2407.14679, with the L2 norm over batch and places.

    Example:
        >>> activation.score(torch.tensor([[4.0, 16.0], [0.0, 0.0]])).tolist()
        [3.0, 0.0]
    """
    return inputs.sqrt().mean(1)


@criterion(on="read")
def activation_mean(levels: Tensor) -> Tensor:
    """Mean magnitude of the activation in each batch, as a norm over the batches: few loud places do not decide.

    Args:
        levels: Square of the mean magnitude of the activation that each weight that reads the axis multiplies, summed
            over the batches, shape (positions, entries). Give batches of one sequence each.

    Returns:
        Scores, shape (positions,): mean over the weights of ‖mean over the batch |x|‖₂.

    Source: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation" (Minitron),
    arXiv:2407.14679, section 2.2: mean over the sequence, L2 norm over the samples.

    Example:
        >>> activation_mean.score(torch.tensor([[4.0, 16.0], [0.0, 0.0]])).tolist()
        [3.0, 0.0]
    """
    return levels.sqrt().mean(1)


@criterion(on="read")
def obs(readers: tuple[Reader, ...], damping: float = 0.01) -> Tensor:
    """Error in what the readers give out after the best correction of their other weights: optimal brain surgeon.

    Args:
        readers: The weights W that read the axis, with H = XᵀX of all that they read.
        damping: Added to the diagonal of H, as a share of its mean, so that dead and equal columns do no harm.

    Returns:
        Scores, shape (positions,): Σ over readers of tr(W_iᵀ [(H⁻¹)_ii]⁻¹ W_i), where i stands for all columns of the
        position.

    Source: Hassibi, Stork 1993, "Second order derivatives for network pruning: Optimal Brain Surgeon"; layer-wise and
    for groups of weights, Frantar, Singh, Alistarh 2022, "Optimal Brain Compression", arXiv:2208.11580.

    Example:
        >>> gram = torch.diag(torch.tensor([4.0, 1.0]))
        >>> reader = Reader(torch.tensor([[[1.0]], [[2.0]]]), gram, torch.tensor([[0], [1]]))
        >>> obs.score((reader,), damping=0.0).tolist()
        [4.0, 4.0]
    """
    scores = []
    for reader in readers:
        weights, gram, places = reader.weights.double(), reader.gram.double(), reader.places
        mean = gram.diagonal().mean()
        added = damping * (mean if mean > 0 else torch.ones_like(mean))
        inverse = torch.linalg.inv(gram + added * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        blocks = inverse[places[:, :, None], places[:, None, :]]
        scores.append((weights * torch.linalg.solve(blocks, weights)).sum((1, 2)))
    return torch.stack(scores).sum(0)


@criterion(relative=False, on="read")
def information(units: Tensor, labels: Tensor, bins: int = 8) -> Tensor:
    """Mutual information of the unit's activation with the label: how much it tells of the class.

    Args:
        units: Mean activation of each position on each sample, shape (positions, samples).
        labels: Class of each sample, shape (samples,).
        bins: Activations are quantized into so many bins of as equal counts as ties allow; 8 tell most of what there
            is without needing many samples each.

    Returns:
        Scores, shape (positions,): I(bin; label) in nats, at most the entropy of the labels. Few samples (less than
        ten times bins times classes) bias all of them upward.

    Source: Battiti 1994, "Using mutual information for selecting features in supervised neural net learning".
    Quantiles, so that no scaling of a unit matters.

    Example:
        >>> units = torch.tensor([[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
        >>> information.score(units, torch.tensor([0, 0, 1, 1]), bins=2)
        tensor([0.6931, 0.0000], dtype=torch.float64)
    """
    shares = torch.arange(1, bins, dtype=torch.float64, device=units.device) / bins
    edges = units.double().quantile(shares, dim=1).T.contiguous()
    binned = torch.searchsorted(edges, units.double().contiguous(), right=True)
    classes = F.one_hot(torch.unique(labels, return_inverse=True)[1]).double()
    joint = F.one_hot(binned, bins).double().mT @ classes / len(labels)
    apart = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)
    told: Tensor = torch.special.xlogy(joint, torch.where(joint > 0, joint / apart, 1)).sum((1, 2))
    return told.clamp(min=0)


@criterion(on="read", relative=False)
def kl(weights: Tensor, drawn: Tensor) -> Tensor:
    """Divergence of the output's distribution when the position is zeroed, to second order; needs no labels.

    Args:
        weights: Axis matrix of the weights that read the axis, shape (positions, entries).
        drawn: Gradient of the log-likelihood of outputs drawn from the model, over √samples, same shape.

    Returns:
        Scores, shape (positions,): ½ (Σ w·g)², whose mean over draws is the mean over samples of ½ δᵀFδ, where F is
        the Fisher information of the output and δ the removal of the position: KL(p ‖ p without it) for small δ.

    Source: Kullback 1959, "Information Theory and Statistics", chapter 2, for the expansion; the Fisher information
    of draws, Martens 2020, "New Insights and Perspectives on the Natural Gradient Method", arXiv:1412.1193.

    Example:
        >>> kl.score(torch.tensor([[1.0, 2.0], [1.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, -1.0]])).tolist()
        [8.0, 0.0]
    """
    return 0.5 * (weights * drawn).sum(1).square()


# Doctest looks at functions and classes only.
__test__ = {name: inspect.getdoc(resolve(name).score) or "" for name in names()}
