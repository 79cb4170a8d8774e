"""Second-order corrections of one matrix: what must be known of the activations it reads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slivo.errors import SlivoError


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Return the upper triangular U with H⁻¹ = UᵀU: row j holds what H⁻¹ of the columns from j on says of column j.

    It is the inverse of R in H = RRᵀ, R upper triangular; read backwards, R is the Cholesky factor of H read so.

    Args:
        gram: XᵀX of what a layer reads, shape (inputs, inputs), float32 at least.
        damping: Added to the diagonal, as a share of its mean; raised where rounding is larger.

    Source: Frantar, Ashkboos, Hoefler, Alistarh 2022, "GPTQ", arXiv:2210.17323, section 3, step 3.

    Example:
        >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> factor = inverse_factor(gram, 1e-12)
        >>> torch.allclose(factor.T @ factor, gram.inverse())
        True
    """
    mean = gram.diagonal().mean()
    mean = torch.where(mean > 0, mean, 1)  # inputs that are all dead
    while True:
        damped = gram.flip(0, 1)
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            break
        damping *= 10  # rounding is larger than a small damping
    del damped  # matrices of this size are what memory is needed for
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return inverse.flip(0, 1)


def check_damping(damping: object) -> None:
    """Look whether a damping is in its range.

    Raises:
        SlivoError: If it is not.
    """
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 < damping < math.inf:
        raise SlivoError(f"damping is {damping!r}; a positive number, 0.01 adds a hundredth of the mean diagonal")
