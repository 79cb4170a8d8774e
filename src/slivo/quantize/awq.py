"""AWQ: weights of loud inputs are enlarged before they are rounded, and the inputs divided by as much."""

from __future__ import annotations

import torch
from torch import Tensor

from slivo.edits.uniform import Coded, Grid, encode, from_codes
from slivo.quantize.gptq import loss

STEPS = 20
"""How many exponents are tried besides 0, as in the paper's code."""


def awq(weight: Tensor, gram: Tensor, level: Tensor, grid: Grid) -> Coded:
    """Return codes of a matrix with scaled columns, and what its inputs are divided by: nothing else changes.

    The exponent is the one of 0, 0.05, …, 1 whose rounded matrix errs least on these samples. With 0 nothing is scaled,
    so the error is never above that of rounding.

    Args:
        weight: W, shape (groups, outputs, columns); of a convolution the columns are (input channels, places).
        gram: H = XᵀX of what it reads, shape (groups, columns, columns), float32 at least.
        level: Mean magnitude of each input channel, up to a factor, shape (groups, channels).
        grid: Which codes.

    Returns:
        Codes of all rows, shape (groups · outputs, columns), and their divisor, shape (groups · channels,).

    Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
    arXiv:2306.00978, eq. 4-5. Each layer has its own scales, which it divides its inputs by; the paper has
    layers that read the same share them, and folds them into the operator before.

    Example:
        >>> weight = torch.tensor([[[0.1, 1.0]]])
        >>> gram = torch.tensor([[[100.0, 0.0], [0.0, 0.01]]])  # the first input is loud
        >>> found = awq(weight, gram, torch.tensor([[10.0, 0.1]]), Grid(2))
        >>> float(found.divisor[0]) > 1 > float(found.divisor[1])
        True
    """
    columns = weight.shape[2]
    whole = weight.to(gram.dtype)
    best, least = None, torch.inf
    for step in range(STEPS + 1):
        divisor = smoothing(level, step / STEPS).to(gram.dtype)
        spread = divisor.repeat_interleave(columns // level.shape[1], dim=1)[:, None]
        coded = encode((whole * spread).reshape(-1, columns), grid)
        rounded = from_codes(coded.codes, grid, coded.scale, coded.zero_point).reshape(whole.shape) / spread
        lost = float(loss(whole, rounded, gram).sum())
        if best is None or lost < least:
            best, least = Coded(coded.codes, coded.scale, coded.zero_point, divisor.flatten()), lost
    assert best is not None
    return best


def smoothing(level: Tensor, exponent: float) -> Tensor:
    """Return the factors sᵢ ∝ levelᵢ^exponent of input channels, the greatest times the least of which is 1.

    Args:
        level: Magnitude of each channel, any shape; channels that are never active have the least factor.
        exponent: 0 for no scaling, 1 for inputs that are equally loud.

    Returns:
        The level's shape, bfloat16: layers divide by exactly these.

    Example:
        >>> smoothing(torch.tensor([4.0, 0.25]), 0.5).tolist()
        [2.0, 0.5]
    """
    most = float(level.max())
    shares = (level / (most if most > 0 else 1)).clamp(min=1e-4).pow(exponent)
    return (shares / (shares.max() * shares.min()).sqrt()).bfloat16()
