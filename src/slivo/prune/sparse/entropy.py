"""The maximum-entropy choice, as a criterion."""

from __future__ import annotations

import torch
from torch import Tensor

from slivo.prune.criterion import criterion


@criterion(relative=False)
def entropy(weights: Tensor, bins: int = 64) -> Tensor:
    """Rank within the histogram's bin: what stays is as spread over all values as it can be.

    Args:
        weights: Axis matrix, shape (positions, entries). A position's value is the sum of its entries: of a single
            weight, the weight itself.
        bins: Of equal width between the least and the greatest value.

    Returns:
        Scores in (0, 1], shape (positions,): 1 / r for the r-th of its bin, counted from the greatest absolute value.
        Whatever number K of positions is kept by these scores, bin b keeps k_b = min(n_b, λ) of its n_b (or one less,
        for some bins, where K leaves no choice), and that is what maximizes the entropy −Σ_b (k_b/K)·ln(k_b/K) of what
        is kept: it takes from the fullest bins until all are level.

    Source: Jaynes 1957, "Information Theory and Statistical Mechanics", for the principle of maximum entropy. The
    solution under the bounds k_b ≤ n_b is ours; it is that of water-filling.

    Example:
        >>> entropy.score(torch.tensor([[0.0], [0.1], [0.2], [1.0]]), bins=2).tolist()
        [0.3333333432674408, 0.5, 1.0, 1.0]
    """
    values = weights.sum(1)
    low, high = values.min(), values.max()
    width = (high - low) / bins
    bin_of = ((values - low) / width).long().clamp(max=bins - 1) if width > 0 else torch.zeros_like(values).long()
    # By bin, and in a bin by absolute value; equal ones in the order in which they stand.
    order = values.abs().argsort(descending=True, stable=True)
    order = order[bin_of[order].argsort(stable=True)]
    counts = bin_of.bincount(minlength=bins)
    starts = counts.cumsum(0) - counts
    places = torch.arange(len(values), device=values.device)
    ranks = torch.empty_like(values)
    ranks[order] = (places - starts[bin_of[order]] + 1).to(values.dtype)
    return 1 / ranks
