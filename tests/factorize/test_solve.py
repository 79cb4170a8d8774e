"""Thin layers of one layer: by hand, against NumPy and independent sums, and against what is optimal."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from slivo.errors import SlivoError
from slivo.factorize.solve import basis, losses, pieces, rebuilt

KINDS = ["outputs", "inputs", "spatial", "tucker2"]
SHAPES = [(6, 4, 3, 3), (3, 8, 2, 5), (9, 2, 3, 1), (2, 2, 1, 3)]


def full(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The ranks at which nothing is lost, counted anew."""
    out, into, *kernel = shape
    places = int(np.prod(kernel))
    if kind == "tucker2":
        return min(into, out * places), min(out, into * places)
    sizes = {
        "outputs": (out, into * places),
        "svd": (out, into),
        "inputs": (into, out * places),
        "spatial": (into * (kernel or [1])[0], out * (kernel or [1])[-1]),
    }
    return (min(sizes[kind]),)


def weight_of(kind: str, thin: list[Tensor]) -> Tensor:
    """The weight that layers in a row amount to, by sums written out for each kind."""
    two = {"svd": "ri,or->oi", "outputs": "riyx,or->oiyx", "inputs": "ri,oryx->oiyx", "spatial": "riy,orx->oiyx"}
    flat = [each.double() for each in thin]
    if kind == "svd":
        return torch.einsum(two[kind], *flat)
    if kind == "outputs":
        return torch.einsum(two[kind], flat[0], flat[1][..., 0, 0])
    if kind == "inputs":
        return torch.einsum(two[kind], flat[0][..., 0, 0], flat[1])
    if kind == "spatial":
        return torch.einsum(two[kind], flat[0][..., 0], flat[1][:, :, 0])
    if kind == "tucker2":
        return torch.einsum("ri,sryx,os->oiyx", flat[0][..., 0, 0], flat[1], flat[2][..., 0, 0])
    point, column, row, out = flat
    return torch.einsum("ri,ry,rx,or->oiyx", point[..., 0, 0], column[:, 0, :, 0], row[:, 0, 0], out[..., 0, 0])


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram_of(columns: int, rows: int, *, seed: int = 1) -> Tensor:
    """Of inputs that are far from alike in size, and correlated."""
    x = sample(rows, columns, seed=seed) * torch.linspace(0.1, 3, columns, dtype=torch.float64)
    x = x @ (torch.eye(columns, dtype=torch.float64) + 0.5 * sample(columns, columns, seed=seed + 1) / columns**0.5)
    return x.mT @ x


def lost(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    """The squared error of the outputs, as a share."""
    gone, whole = (weight - other).flatten(1), weight.flatten(1)
    return float(((gone @ gram) * gone).sum() / ((whole @ gram) * whole).sum())


def test_two_by_two_by_hand() -> None:
    # [[3, 0], [4, 5]] has the singular values √45 and √5; the left vectors are (1, 3)/√10 and (3, -1)/√10.
    weight = torch.tensor([[3.0, 0.0], [4.0, 5.0]])
    found = basis("svd", weight)
    assert found.values.tolist() == pytest.approx([45**0.5, 5**0.5])
    best = torch.tensor([[1.5, 1.5], [4.5, 4.5]], dtype=torch.float64)
    assert torch.allclose(rebuilt("svd", pieces(found, (1,)), (2, 2)), best)
    assert losses(found, [(1,), (2,)]).tolist() == pytest.approx([0.1, 0.0])


def test_two_by_two_by_hand_with_samples() -> None:
    # Where the second input is 100 times as loud, rank 1 keeps its column, and of the first what lies along it.
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    gram = torch.diag(torch.tensor([0.0, 1e4]))
    made = rebuilt("svd", pieces(basis("svd", weight, gram), (1,)), (2, 2))
    assert torch.allclose(made, torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64))


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6), (1, 4), (4, 1)])
def test_a_matrix_comes_as_close_as_eckart_and_young_say(shape: tuple[int, int]) -> None:
    weight = sample(*shape)
    left, values, right = np.linalg.svd(weight.numpy(), full_matrices=False)
    ranks = [(rank,) for rank in range(1, min(shape) + 1)]
    told = losses(basis("svd", weight), ranks)
    for (rank,), share in zip(ranks, told, strict=True):
        made = rebuilt("svd", pieces(basis("svd", weight), (rank,)), shape).numpy()
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        np.testing.assert_allclose(made, best, atol=1e-12)
        assert share == pytest.approx((values[rank:] ** 2).sum() / (values**2).sum(), abs=1e-12)


@pytest.mark.parametrize(("shape", "rows"), [((5, 8), 40), ((8, 5), 40), ((6, 9), 4), ((9, 6), 3)])
def test_samples_give_the_optimum_of_whitening(shape: tuple[int, int], rows: int) -> None:
    weight, gram = sample(*shape), gram_of(shape[1], rows)
    values, vectors = np.linalg.eigh(gram.numpy())
    root = vectors * np.sqrt(np.maximum(values, 0))
    spectrum = np.linalg.svd(weight.numpy() @ root, compute_uv=False)
    for rank in range(1, min(shape) + 1):
        made = rebuilt("svd", pieces(basis("svd", weight, gram), (rank,)), shape)
        plain = rebuilt("svd", pieces(basis("svd", weight), (rank,)), shape)
        least = (spectrum[rank:] ** 2).sum() / (spectrum**2).sum()
        assert lost(weight, made, gram) == pytest.approx(least, abs=1e-12)
        assert lost(weight, made, gram) <= lost(weight, plain, gram) + 1e-12
        assert losses(basis("svd", weight, gram), [(rank,)])[0] == pytest.approx(least, abs=1e-12)


def test_dead_and_equal_inputs_do_no_harm() -> None:
    x = sample(20, 6)
    x[:, 1], x[:, 4] = x[:, 0], 0
    weight, gram = sample(7, 6, seed=3), x.mT @ x
    for damping in (0.0, 0.01):
        made = rebuilt("svd", pieces(basis("svd", weight, gram, damping=damping), (4,)), (7, 6))
        assert made.isfinite().all()
        assert lost(weight, made, gram) < 1e-3 + damping
    nothing = pieces(basis("svd", weight, torch.zeros(6, 6)), (2,))
    assert all(each.isfinite().all() for each in nothing)
    assert losses(basis("svd", weight, torch.zeros(6, 6)), [(1,)]).tolist() == [0.0]


@pytest.mark.parametrize(("kind", "shape"), [*product(KINDS, SHAPES), ("svd", (5, 3))])
@pytest.mark.parametrize("rows", [0, 60, 5])
def test_full_rank_is_the_layer(kind: str, shape: tuple[int, ...], rows: int) -> None:
    weight = sample(*shape)
    gram = gram_of(int(np.prod(shape[1:])), rows) if rows else None
    thin = pieces(basis(kind, weight, gram, damping=1e-3), full(kind, shape))
    torch.testing.assert_close(rebuilt(kind, thin, shape), weight, atol=1e-8, rtol=0)


@pytest.mark.parametrize(("kind", "shape"), [*product(KINDS, SHAPES), ("cp", SHAPES[0]), ("svd", (5, 3))])
@pytest.mark.parametrize("samples", [False, True])
def test_layers_in_a_row_amount_to_the_sums(kind: str, shape: tuple[int, ...], samples: bool) -> None:
    weight = sample(*shape)
    gram = gram_of(int(np.prod(shape[1:])), 50) if samples else None
    ranks = tuple(max(1, rank // 2) for rank in (full(kind, shape) if kind != "cp" else (6,)))
    thin = pieces(basis(kind, weight, gram), ranks)
    torch.testing.assert_close(rebuilt(kind, thin, shape), weight_of(kind, thin), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("kind", "shape"), [*product(KINDS, SHAPES), ("cp", SHAPES[0])])
def test_samples_lose_no_more_than_weights_alone(kind: str, shape: tuple[int, ...]) -> None:
    weight, gram = sample(*shape), gram_of(int(np.prod(shape[1:])), 80)
    most = full(kind, shape) if kind != "cp" else (6,)
    for share in (0.3, 0.6):
        ranks = tuple(max(1, int(rank * share)) for rank in most)
        aware, plain = (pieces(basis(kind, weight, each), ranks) for each in (gram, None))
        error = lost(weight, weight_of(kind, aware), gram)
        assert error <= lost(weight, weight_of(kind, plain), gram) + 1e-10
        assert losses(basis(kind, weight, gram), [ranks])[0] == pytest.approx(error, abs=1e-9)


@pytest.mark.parametrize(("kind", "shape"), list(product(KINDS, SHAPES)))
def test_what_weights_alone_lose_is_known_beforehand(kind: str, shape: tuple[int, ...]) -> None:
    weight = sample(*shape)
    ladder = list(product(*(range(1, rank + 1) for rank in full(kind, shape))))
    told = losses(basis(kind, weight), ladder)
    eye = torch.eye(int(np.prod(shape[1:])), dtype=torch.float64)
    for ranks, share in zip(ladder, told, strict=True):
        error = lost(weight, weight_of(kind, pieces(basis(kind, weight), ranks)), eye)
        if kind == "tucker2":  # what is told is of truncated bases, which iteration makes better
            assert error <= share + 1e-9
        else:
            assert error == pytest.approx(share, abs=1e-12)


def test_iteration_finds_what_truncation_misses() -> None:
    weight = sample(8, 6, 3, 3)
    found = basis("tucker2", weight)
    eye = torch.eye(54, dtype=torch.float64)
    error = lost(weight, rebuilt("tucker2", pieces(found, (2, 3)), weight.shape), eye)
    assert error < float(losses(found, [(2, 3)])[0]) - 1e-4


def test_a_tensor_of_few_terms_is_found() -> None:
    factors = [sample(size, 2, seed=size) for size in (7, 5, 4, 3)]
    weight = torch.einsum("or,ir,yr,xr->oiyx", *factors)
    thin = pieces(basis("cp", weight), (2,))
    assert [tuple(each.shape) for each in thin] == [(2, 5, 1, 1), (2, 1, 4, 1), (2, 1, 1, 3), (7, 2, 1, 1)]
    torch.testing.assert_close(weight_of("cp", thin), weight, atol=1e-4, rtol=0)


def test_losses_of_a_canonical_decomposition_fall() -> None:
    found = losses(basis("cp", sample(4, 3, 2, 2)), [(rank,) for rank in range(1, 5)])
    assert (np.diff(found) <= 0).all()
    assert 0 < found[-1] < found[0] < 1


@pytest.mark.parametrize("kind", [*KINDS, "svd"])
def test_zeros_stay_zeros(kind: str) -> None:
    shape = (4, 3) if kind == "svd" else (4, 3, 3, 3)
    ranks = (1, 1) if kind == "tucker2" else (1,)
    found = basis(kind, torch.zeros(shape))
    assert all(not each.isnan().any() for each in pieces(found, ranks))
    assert not weight_of(kind, pieces(found, ranks)).any()
    assert losses(found, [ranks]).tolist() == [0.0]


def test_thin_layers_have_weights_of_equal_size() -> None:
    first, last = pieces(basis("svd", sample(9, 7) * 1000), (3,))
    torch.testing.assert_close(first.norm(dim=1), last.norm(dim=0))


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(SlivoError, match="holds NaN or infinite numbers"):
        basis("svd", torch.tensor([[1.0, torch.nan]]))


def test_without_the_library_canonical_decomposition_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorly", None)
    with pytest.raises(SlivoError, match=r"tensorly is not installed .*pip install 'slivo\[factorize\]'"):
        pieces(basis("cp", sample(4, 3, 3, 3)), (2,))
