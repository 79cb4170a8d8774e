"""Solve: the thin layers that come closest to one layer, for given ranks, and what is lost at each rank.

Everything is computed in float64. What is lost is the share of a layer's squared output (without its bias) on the
samples, or of its squared weights where there are none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slivo.edits.factorize import Kind
from slivo.errors import SlivoError, require

Ranks = tuple[int, ...]

_GRID, _FEW = 7, 4  # ranks at which losses are computed where no spectrum says them, and where that takes long
_SWEEPS, _SETTLED = 50, 1e-8  # of orthogonal iteration
_LEAST_SQUARES = 100  # alternating ones, of a canonical decomposition


@dataclass(frozen=True)
class Basis:
    """A layer's weight, laid out for one kind of factorization.

    Args:
        kind: How the layer is parted.
        weight: Of the layer, float64, shape (outputs, inputs, kernel …).
        gram: H = XᵀX + damping of what the layer reads, shape (columns, columns), columns as in the flattened weight;
            None without samples.
        left: Orthonormal columns, best first: of ``tucker2`` those of inputs and of outputs, of ``cp`` none, of all
            others those of the matrix that is split.
        values: The singular values that belong to them (of ``tucker2`` those of outputs).
    """

    kind: Kind
    weight: Tensor
    gram: Tensor | None
    left: tuple[Tensor, ...]
    values: Tensor


def basis(kind: Kind, weight: Tensor, gram: Tensor | None = None, *, damping: float = 0.0) -> Basis:
    """Lay a weight out for one kind of factorization.

    ``svd`` and ``outputs`` split the weight as a matrix, W ≈ U V with U = the first left singular vectors of W S,
    S Sᵀ = H, and V = UᵀW. That is the optimum of truncation-aware whitening (U Σ Vᵀ S⁻¹ cut off at r is U UᵀW), and
    nothing has to be inverted: inputs that are never active, or equal, do no harm.

    Args:
        kind: How the layer is parted.
        weight: Shape (outputs, inputs, kernel …), any floating-point type.
        gram: XᵀX of what the layer reads, shape (columns, columns); None for the weight alone.
        damping: Added to the diagonal of XᵀX, as a share of its mean.

    Source: Eckart, Young 1936, "The approximation of one matrix by another of lower rank", Psychometrika 1; Wang,
    Zheng, Wan, Zhang 2024, "SVD-LLM", arXiv:2403.07378; Zhang, Zou, He, Sun 2015, "Accelerating Very Deep Convolutional
    Networks", arXiv:1505.06798 (``outputs``); Jaderberg, Vedaldi, Zisserman 2014, "Speeding up Convolutional Neural
    Networks with Low Rank Expansions", arXiv:1405.3866 (``spatial``); Kim et al. 2015, "Compression of Deep
    Convolutional Neural Networks", arXiv:1511.06530 (``tucker2``).

    Example:
        >>> weight = torch.diag(torch.tensor([2.0, 1.0]))
        >>> basis("svd", weight).values.tolist()
        [2.0, 1.0]
        >>> loud = torch.diag(torch.tensor([0.0, 9.0]))  # the second input alone is ever active
        >>> basis("svd", weight, loud).values.tolist()
        [3.0, 0.0]
    """
    weight, gram = _wide(weight), None if gram is None else _damped(_wide(gram), damping)
    if kind == "cp":
        return Basis(kind, weight, gram, (), weight.new_zeros(0))
    if kind == "tucker2":
        inputs, (outputs, values) = _left(_unfold(weight, 1))[0], _left(_unfold(weight, 0))
        return Basis(kind, weight, gram, (inputs, outputs), values)
    matrix = split(kind, weight)
    if gram is None or kind not in ("svd", "outputs"):
        left, values = _left(matrix)
    elif len(matrix) <= len(gram):
        left, squares = _axes(matrix @ gram @ matrix.mT)
        values = squares.sqrt()
    else:
        left, values = _left(matrix @ _root(gram))
    return Basis(kind, weight, gram, (left,), values)


def split(kind: Kind, weight: Tensor) -> Tensor:
    """Return the matrix whose singular vectors a kind is made of.

    Shape (inputs, outputs · kernel) of ``inputs``, (inputs · rows, outputs · columns) of ``spatial``, and else
    (outputs, inputs · kernel).
    """
    if kind == "inputs":
        return _unfold(weight, 1)
    if kind == "spatial":
        return weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
    return weight.flatten(1)


def pieces(found: Basis, ranks: Ranks) -> list[Tensor]:
    """Return the weights of the thin layers, float64, first layer first.

    With samples, the last layer is set by least squares on what the others give it; for ``svd`` and ``outputs`` that
    is so by itself.

    Args:
        found: Of `basis`.
        ranks: One rank, of ``tucker2`` two: of inputs and of outputs.
    """
    weight, rank = found.weight, ranks[0]
    if found.kind in ("svd", "outputs"):
        left = found.left[0][:, :rank]
        made = [(left.mT @ split(found.kind, weight)).reshape(rank, *weight.shape[1:]), _pointwise(left, weight)]
        return _balanced(made)
    if found.kind == "inputs":
        left = found.left[0][:, :rank]
        made = [_pointwise(left.mT, weight), torch.einsum("ir,oi...->or...", left, weight)]
        return _balanced(_refitted(found, made))
    if found.kind == "spatial":
        _, inputs, rows, columns = weight.shape
        left = found.left[0][:, :rank]
        row = (left.mT @ split("spatial", weight)).reshape(rank, -1, columns).transpose(0, 1)
        made = [left.mT.reshape(rank, inputs, rows, 1), row[:, :, None]]
        return _balanced(_refitted(found, made))
    if found.kind == "tucker2":
        into, out = _iterated(weight, found.left, ranks)
        core = torch.einsum("oi...,ir,os->sr...", weight, into, out)
        return _refitted(found, [_pointwise(into.mT, weight), core, _pointwise(out, weight)])
    return _refitted(found, _canonical(weight, rank))


def losses(found: Basis, ladder: Sequence[Ranks]) -> NDArray[np.float64]:
    """Return what is lost at some ranks: a share, 0 to 1.

    It is exact where singular values say it. Else it is computed at a few of the ranks, and between them interpolated.

    Args:
        found: Of `basis`.
        ladder: Ranks, ascending.

    Example:
        >>> losses(basis("svd", torch.diag(torch.tensor([2.0, 1.0]))), [(1,), (2,)]).tolist()
        [0.2, 0.0]
    """
    plain = found.gram is None
    if found.kind in ("svd", "outputs") or (plain and found.kind in ("inputs", "spatial")):
        squares = found.values.square()
        left = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
        return _share(left[[ranks[0] for ranks in ladder]], left[0])
    if plain and found.kind == "tucker2":
        core = torch.einsum("oi...,ir,os->sr...", found.weight, *found.left)
        kept = core.square().flatten(2).sum(2).cumsum(0).cumsum(1)
        whole = found.weight.square().sum()
        return _share(whole - torch.stack([kept[out - 1, into - 1] for into, out in ladder]), whole)
    places = sorted({round(at) for at in np.linspace(0, len(ladder) - 1, _FEW if found.kind == "cp" else _GRID)})
    exact = [_loss(found, pieces(found, ladder[at])) for at in places]
    exact = np.minimum.accumulate(exact).tolist()  # more channels lose no more
    between: NDArray[np.float64] = np.exp(np.interp(range(len(ladder)), places, np.log(np.maximum(exact, 1e-12))))
    return between


def rebuilt(kind: Kind, thin: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Return the weight of the one layer of a given shape that does what thin layers do."""
    *before, last = thin
    every = torch.eye(prod(shape[1:]), dtype=last.dtype, device=last.device)
    return (last.flatten(1) @ _features(kind, before, last.shape[2:], every)).reshape(tuple(shape))


def _features(kind: Kind, before: Sequence[Tensor], kernel: Sequence[int], columns: Tensor) -> Tensor:
    """Return what the last layer reads where the whole layer reads some columns.

    Args:
        kind: How the layer is parted.
        before: The weights of the layers before the last.
        kernel: Of the last layer.
        columns: Shape (inputs · kernel, n).

    Returns:
        Shape (features, n), features as in the last layer's flattened weight.
    """
    if kind in ("svd", "outputs"):
        return before[0].flatten(1) @ columns
    inputs = before[0].shape[1]
    split = columns.reshape(inputs, -1, columns.shape[1])
    if kind == "inputs":
        return torch.einsum("ri,ipn->rpn", before[0].flatten(1), split).flatten(0, 1)
    if kind == "tucker2":
        return before[1].flatten(1) @ torch.einsum("ri,ipn->rpn", before[0].flatten(1), split).flatten(0, 1)
    if kind == "spatial":
        grid = split.reshape(inputs, -1, kernel[1], columns.shape[1])
        return torch.einsum("riy,iyxn->rxn", before[0].flatten(2), grid).flatten(0, 1)
    point, column, row = before
    return torch.einsum("ri,ry,rx->riyx", point.flatten(1), column.flatten(1), row.flatten(1)).flatten(1) @ columns


def _refitted(found: Basis, made: list[Tensor]) -> list[Tensor]:
    """Set the last layer so that the squared error on the samples is least, given those before it."""
    return made if found.gram is None else [*made[:-1], _last(found, made)[0]]


def _last(found: Basis, made: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the weight of the last layer by least squares, and what of the squared output it then gives."""
    assert found.gram is not None
    *before, last = made
    seen = _features(found.kind, before, last.shape[2:], found.gram)
    cross = seen @ found.weight.flatten(1).mT
    square = _features(found.kind, before, last.shape[2:], seen.mT)
    factor, failed = torch.linalg.cholesky_ex(square)
    if bool(failed):
        solved = torch.linalg.pinv((square + square.mT) / 2, hermitian=True) @ cross
    else:
        solved = torch.cholesky_solve(cross, factor)
    return solved.mT.reshape(last.shape), (solved * cross).sum()


def _loss(found: Basis, thin: Sequence[Tensor]) -> float:
    """Return the share of the squared output, or of the squared weights, that thin layers lose."""
    whole = found.weight.flatten(1)
    if found.gram is not None:
        given = ((whole @ found.gram) * whole).sum()
        return float(_share((given - _last(found, thin)[1])[None], given)[0])
    gone = found.weight - rebuilt(found.kind, thin, found.weight.shape)
    return float(_share(gone.square().sum()[None], whole.square().sum())[0])


def _share(lost: Tensor, whole: Tensor) -> NDArray[np.float64]:
    if not float(whole) > 0:
        return np.zeros(len(lost))
    found: NDArray[np.float64] = (lost / whole).clamp(0, 1).cpu().numpy()
    return found


def _balanced(made: list[Tensor]) -> list[Tensor]:
    """Have both of two layers have weights of equal size, channel by channel, as training and rounding like them."""
    first, last = made
    one = first.flatten(1).norm(dim=1)
    other = last.transpose(0, 1).flatten(1).norm(dim=1)
    scale = torch.where((one > 0) & (other > 0), (other / one).sqrt(), 1.0)
    return [
        first * scale.reshape(-1, *[1] * (first.dim() - 1)),
        last / scale.reshape(1, -1, *[1] * (last.dim() - 2)),
    ]


def _iterated(weight: Tensor, bases: Sequence[Tensor], ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Improve the truncated bases of inputs and outputs in turns: higher-order orthogonal iteration.

    Source: De Lathauwer, De Moor, Vandewalle 2000, "On the best rank-1 and rank-(R1, …, RN) approximation", SIAM J.
    Matrix Anal. Appl. 21(4).
    """
    (inputs, outputs), (into, out) = ranks, bases
    into, out, whole, before = into[:, :inputs], out[:, :outputs], weight.square().sum(), -1.0
    for sweep in count():
        out = _leading(_unfold(torch.einsum("oi...,ir->or...", weight, into), 0))[0][:, :outputs]
        into, squares = _leading(_unfold(torch.einsum("oi...,os->si...", weight, out), 1))
        into = into[:, :inputs]
        kept = float(squares[:inputs].sum() / whole) if whole > 0 else 1.0
        if kept - before < _SETTLED or sweep == _SWEEPS:
            break
        before = kept
    return into, out


def _canonical(weight: Tensor, rank: int) -> list[Tensor]:
    """Return the layers of a canonical polyadic decomposition, by alternating least squares.

    Source: Lebedev et al. 2014, "Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition",
    arXiv:1412.6553.
    """
    tensorly = require("tensorly", extra="factorize", why="canonical (cp) factorization")
    decomposition = require("tensorly.decomposition", extra="factorize", why="canonical (cp) factorization")
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        _, factors = decomposition.parafac(
            weight, rank, n_iter_max=_LEAST_SQUARES, init="random", tol=1e-9, random_state=0
        )
    out, into, column, row = (each.to(weight) for each in factors)
    sizes = torch.stack([each.norm(dim=0).clamp(min=1e-30) for each in (out, into, column, row)])
    even = sizes.log().mean(0).exp() / sizes  # channels of one size in all four layers
    out, into, column, row = (each * scale for each, scale in zip((out, into, column, row), even, strict=True))
    return [_pointwise(into.mT, weight), column.mT[:, None, :, None], row.mT[:, None, None], _pointwise(out, weight)]


def _pointwise(matrix: Tensor, weight: Tensor) -> Tensor:
    """Give a matrix the dimensions of a kernel of one place."""
    return matrix.reshape(*matrix.shape, *[1] * (weight.dim() - 2))


def _unfold(weight: Tensor, dim: int) -> Tensor:
    return weight.movedim(dim, 0).flatten(1)


def _left(matrix: Tensor) -> tuple[Tensor, Tensor]:
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return left, values


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return left singular vectors and squares of singular values, soon, of matrices that are wider than high."""
    if matrix.shape[0] <= matrix.shape[1]:
        return _axes(matrix @ matrix.mT)
    left, values = _left(matrix)
    return left, values.square()


def _axes(square: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors of a symmetric matrix and their values, greatest first."""
    values, vectors = torch.linalg.eigh((square + square.mT) / 2)
    return vectors.flip(1), values.flip(0).clamp(min=0)


def _root(gram: Tensor) -> Tensor:
    """Return S with S Sᵀ = H, for any symmetric H without negative directions but by rounding."""
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root


def _damped(gram: Tensor, damping: float) -> Tensor:
    gram = (gram + gram.mT) / 2
    gram.diagonal().add_(damping * gram.diagonal().mean())
    return gram


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, where there is that type."""
    tensor = tensor.detach()
    if not bool(tensor.isfinite().all()):
        raise SlivoError("it holds NaN or infinite numbers; repair the model, or give other batches")
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
