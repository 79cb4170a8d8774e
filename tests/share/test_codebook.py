"""Codebooks: against a slow Lloyd's algorithm, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slivo.errors import SlivoError
from slivo.share import INITS, kmeans, powers_of_two
from slivo.share.codebook import nearest


def slow(values: np.ndarray, centers: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Lloyd's algorithm, one number at a time."""
    for _ in range(500):
        near = np.array([int(np.abs(centers - value).argmin()) for value in values])
        means = []
        for each in range(len(centers)):
            mine = near == each
            if weights[mine].sum() > 0:
                means.append(float((values[mine] * weights[mine]).sum() / weights[mine].sum()))
        found = np.unique(means)
        if found.shape == centers.shape and np.array_equal(found, centers):
            break
        centers = found
    return centers


def error(values: Tensor, centers: Tensor, weights: Tensor) -> float:
    return float(((values.double() - centers[nearest(values, centers)]).square() * weights).sum())


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("clusters", [1, 3, 8])
def test_centers_are_those_of_lloyds_algorithm(init: str, weighted: bool, clusters: int) -> None:
    torch.manual_seed(clusters)
    values = torch.rand(200, dtype=torch.float64)
    weights = torch.rand(200, dtype=torch.float64) if weighted else torch.ones(200, dtype=torch.float64)
    ordered, order = values.sort()
    start = INITS[init](ordered, weights[order].cumsum(0), clusters)
    found = kmeans(values, clusters, init=init, weights=weights if weighted else None, steps=500)
    expected = slow(values.numpy(), np.unique(start.numpy()), weights.numpy())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
    assert error(values, found, weights) <= error(values, start.unique(), weights) + 1e-12


@pytest.mark.parametrize("init", INITS)
def test_no_cluster_is_empty(init: str) -> None:
    """Pruned weights leave a gap where equal steps begin; still each cluster is the mean of what is nearest to it."""
    torch.manual_seed(0)
    values = torch.rand(500, dtype=torch.float64) * 0.1 + 0.3
    values[::2] *= -1
    found = kmeans(values, 8, init=init)
    near = nearest(values, found)
    means = torch.stack([values[near == each].mean() for each in range(8)])
    torch.testing.assert_close(found, means)
    assert error(values, found, torch.ones(500)) < 500 * (0.2 / 8) ** 2 / 12 * 1.5


def test_where_clusters_begin() -> None:
    values = torch.tensor([0.0, 1.0, 2.0, 10.0], dtype=torch.float64)
    total = torch.ones(4).cumsum(0)
    assert INITS["linear"](values, total, 3).tolist() == [0, 5, 10]
    assert INITS["density"](values, total, 2).tolist() == [0, 10]
    assert INITS["quantile"](values, total, 2).tolist() == [0, 2]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([-3.0, -1.0, 0.5, 2.0, 7.0]), min_size=1, max_size=30), st.integers(1, 6))
def test_a_weight_is_as_good_as_a_repetition(drawn: list[float], clusters: int) -> None:
    values = torch.tensor(drawn, dtype=torch.float64)
    different, counts = values.unique(return_counts=True)
    repeated = kmeans(values, clusters, init="quantile")
    weighed = kmeans(different, clusters, init="quantile", weights=counts)
    torch.testing.assert_close(repeated, weighed)
    assert len(repeated) <= clusters


def test_few_values_are_their_own_centers() -> None:
    assert kmeans(torch.tensor([2.0, 1.0, 2.0]), 5).tolist() == [1.0, 2.0]
    assert kmeans(torch.tensor([1.0, 2.0, 3.0, 9.0]), 2, weights=torch.zeros(4)).tolist() == [2.0, 9.0]


def test_powers_of_two_by_hand() -> None:
    # The paper's s = 4 max / 3 = 1.2: n₁ = 0, and with 3 bits n₂ = n₁ + 1 - 2² / 2 = -1.
    assert powers_of_two(torch.tensor([0.9, -0.2]), 4).tolist() == [-1.0, -0.5, 0.5, 1.0]
    assert powers_of_two(torch.tensor([0.7]), 2).tolist() == [-0.5, 0.5]
    assert powers_of_two(torch.tensor([0.0]), 2).tolist() == [-1.0, 1.0]
    for most in torch.rand(50) * 8:
        top = float(powers_of_two(most[None], 2)[-1])
        assert min(abs(float(most) - top), abs(float(most) - 2 * top), abs(float(most) - top / 2)) == abs(
            float(most) - top
        )


def test_the_nearest_center() -> None:
    assert nearest(torch.tensor([[-9.0, 0.4], [0.5, 9.0]]), torch.tensor([0.0, 1.0, 2.0])).tolist() == [[0, 0], [1, 2]]


def test_what_is_wrong_is_said() -> None:
    values = torch.randn(9)
    with pytest.raises(SlivoError, match="clusters is 0; a whole number of 1 or more"):
        kmeans(values, 0)
    with pytest.raises(SlivoError, match="init is 'random'; there are density, linear, quantile"):
        kmeans(values, 2, init="random")
    with pytest.raises(SlivoError, match="no values"):
        kmeans(values[:0], 2)
    with pytest.raises(SlivoError, match="there cannot be 3 powers of two; an even number"):
        powers_of_two(values, 3)
