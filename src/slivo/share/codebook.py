"""Codebooks: the few values that many numbers are rounded to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from slivo.errors import SlivoError
from slivo.options import is_count, said


def density(values: Tensor, total: Tensor, count: int) -> Tensor:
    """Steps of equal height up the distribution function, from the least value to the greatest."""
    return _at(values, total, torch.linspace(0, 1, count, dtype=torch.float64))


def linear(values: Tensor, total: Tensor, count: int) -> Tensor:
    """Steps of equal width from the least value to the greatest."""
    del total
    return torch.linspace(float(values[0]), float(values[-1]), count, dtype=torch.float64)


def quantile(values: Tensor, total: Tensor, count: int) -> Tensor:
    """The middles of so many parts of equal weight."""
    return _at(values, total, (torch.arange(count, dtype=torch.float64) + 0.5) / count)


INITS: Mapping[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "density": density,
    "linear": linear,
    "quantile": quantile,
}
"""Where clusters begin, from ascending values, their summed weights and the number of clusters."""


def _at(values: Tensor, total: Tensor, shares: Tensor) -> Tensor:
    return values[torch.searchsorted(total, shares * total[-1]).clamp(max=len(values) - 1)]


def kmeans(
    values: Tensor, clusters: int, *, init: str = "linear", weights: Tensor | None = None, steps: int = 100
) -> Tensor:
    """Return the centers of clusters of numbers, of least squared error near where they begin.

    Args:
        values: Shape (n,), finite.
        clusters: How many; fewer come back if there are fewer different values.
        init: ``linear`` begins with equal steps from the least to the greatest: it keeps the few large values, which
            matter most, and is the best of the three in the paper. ``density`` begins where the distribution function
            has risen by equal amounts, extremes included; ``quantile`` in the middles of parts of equal weight.
        weights: How much each number counts, 0 or above, shape (n,); all the same if None. With second derivatives
            of the loss, what is least is the loss that rounding costs.
        steps: At most so many rounds of Lloyd's algorithm; it ends by itself when no number changes its cluster. Where
            clusters end up empty, the one of the greatest error is split, and it goes on.

    Returns:
        Centers, ascending, float64, on the CPU. Each is the weighted mean of the numbers that are nearest to it.

    Raises:
        SlivoError: If there are no clusters, no numbers, or no such init.

    Source: Han, Mao, Dally 2015, "Deep Compression", arXiv:1510.00149, section 3; weights: Choi, El-Khamy, Lee 2016,
    "Towards the Limit of Network Quantization", arXiv:1612.01543, eq. 7.

    Example:
        >>> kmeans(torch.tensor([0.0, 0.5, 2.0, 2.5, 3.0]), 2).tolist()
        [0.25, 2.5]
    """
    check(clusters, init)
    if not len(values):
        raise SlivoError("there are no values to cluster")
    ordered, order = values.detach().double().cpu().sort()
    counted = torch.ones_like(ordered) if weights is None else weights.detach().double().cpu()[order]
    if not bool(counted.sum() > 0):
        counted = torch.ones_like(ordered)  # nothing matters: all alike
    different = _different(ordered)
    if len(different) <= clusters:
        return different
    mass, moment, square = (_running(each) for each in (counted, counted * ordered, counted * ordered.square()))
    centers = _different(INITS[init](ordered, mass[1:], clusters))
    while True:
        centers, bounds = _settled(ordered, mass, moment, centers, steps)
        if len(centers) >= clusters:
            return centers
        # Clusters of none began where there are no numbers: the worst of the others is split instead.
        weight, first, second = (each[bounds].diff() for each in (mass, moment, square))
        worst = int((second - first.square() / weight).argmax())
        mine = ordered[bounds[worst] : bounds[worst + 1]]
        far = mine[0] if centers[worst] - mine[0] > mine[-1] - centers[worst] else mine[-1]
        if bool((centers == far).any()):
            return centers  # what is left to split has no weight
        centers = torch.cat([centers, far[None]]).sort().values


def _settled(ordered: Tensor, mass: Tensor, moment: Tensor, centers: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Move centers to the means of the numbers nearest to them, until none changes; return where each one's begin."""
    bounds = torch.empty(0)
    for _ in range(steps):
        before, bounds = bounds, _bounds(ordered, centers)
        weight = mass[bounds].diff()
        if torch.equal(before, bounds):
            break
        filled = weight > 0
        centers = _different(moment[bounds].diff()[filled] / weight[filled])
        if len(centers) < len(filled):
            bounds = torch.empty(0)
    return centers, _bounds(ordered, centers)


def _different(values: Tensor) -> Tensor:
    found: Tensor = torch.unique(values)
    return found


def _running(values: Tensor) -> Tensor:
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def _bounds(ordered: Tensor, centers: Tensor) -> Tensor:
    """Return where the numbers of each center begin, and where the last one's end."""
    inner = torch.searchsorted(ordered, (centers[1:] + centers[:-1]) / 2)
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(ordered))])


def powers_of_two(values: Tensor, count: int) -> Tensor:
    """Return powers of two, of either sign, that numbers are rounded to: multiplying by them is shifting.

    Args:
        values: Shape (n,), finite.
        count: How many, even: half of them negative. Zero comes beside them.

    Returns:
        Ascending, float64: ±2ᵉ for e from e₁ − count/2 + 1 to e₁ = ⌊log₂(4/3 · max |x|)⌋, so that the greatest number
        is rounded to the nearest.

    Raises:
        SlivoError: If the count is not even and positive.

    Source: Zhou, Yao, Guo, Xu, Chen 2017, "Incremental Network Quantization", arXiv:1702.03044, eq. 1-3.

    Example:
        >>> powers_of_two(torch.tensor([0.3, -1.1]), 4).tolist()
        [-1.0, -0.5, 0.5, 1.0]
    """
    if not is_count(count, least=2) or count % 2:
        raise SlivoError(f"there cannot be {said(count)} powers of two; an even number, half of them negative")
    most = float(values.detach().abs().max()) if len(values) else 0.0
    top = math.floor(math.log2(most * 4 / 3)) if most > 0 else 0
    powers = 2.0 ** torch.arange(top - count // 2 + 1, top + 1, dtype=torch.float64)
    return torch.cat([-powers.flip(0), powers])


def check(clusters: object, init: object) -> None:
    """Look whether clusters are a count, and begin in a way there is.

    Raises:
        SlivoError: If not.
    """
    if not is_count(clusters, least=1):
        raise SlivoError(f"clusters is {said(clusters)}; a whole number of 1 or more, 16 for codes of 4 bits")
    if init not in INITS:
        raise SlivoError(f"init is {said(init)}; there are {', '.join(INITS)}")


def nearest(values: Tensor, centers: Tensor) -> Tensor:
    """Return the number of the nearest center for each value, int64; of two as near, the greater.

    Args:
        values: Any shape.
        centers: Ascending, shape (count,).
    """
    middles = ((centers[1:] + centers[:-1]) / 2).to(values.device)
    return torch.searchsorted(middles, values.detach().to(middles.dtype).contiguous(), right=True)
