"""Uniform quantizers: numbers as small integers, with a scale and a zero point for each tensor, row or group of a row.

``q = clamp(round(x / S) + Z)`` says ``x ≈ S · (q − Z)``; written the other way round, with ``B = 1 / S``,
``Q(x) = x · B + Z``. Rounding takes the nearest integer, of two the even one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from slivo.errors import SlivoError

LEAST = 1e-16
"""The least scale; products of two are still exact numbers in float32."""

_SHARES = tuple(1 - 0.02 * step for step in range(41))
"""Of the greatest entry: what codes may reach to. The best for a normal distribution in two bits is near 0.4."""

Sharing = int | Literal["channel", "tensor"]
"""Which entries have one scale: those of a tensor, of an output (``channel``), or so many consecutive ones of it."""


@dataclass(frozen=True)
class Grid:
    """Which numbers can be said.

    Args:
        bits: Width of the codes, 2-8.
        symmetric: Codes run from −(2ᵇ⁻¹ − 1) to its opposite, and Z = 0; otherwise from 0 to 2ᵇ − 1, and Z is one of
            them, so that zero is said exactly.
        sharing: Which entries share S and Z. Groups are of entries along an output's inputs (and places of a kernel);
            the last group of a row may be smaller. The scales of groups are rounded to bfloat16, half the bytes.

    Raises:
        SlivoError: If the width is not 2-8, or a group has less than one entry.

    Example:
        >>> Grid(4).limits, Grid(4, symmetric=False).limits, Grid(4, sharing=64).groups(160)
        ((-7, 7), (0, 15), 3)
    """

    bits: int = 8
    symmetric: bool = True
    sharing: Sharing = "channel"

    def __post_init__(self) -> None:
        width(self.bits)
        group = self.sharing
        if group not in ("channel", "tensor") and (isinstance(group, bool | str) or int(group) != group or group < 1):
            raise SlivoError(f"group_size is {group!r}; a count of weights as 64, or 'channel', or 'tensor'")

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the greatest code."""
        top = 2 ** (self.bits - 1) - 1
        return (-top, top) if self.symmetric else (0, 2**self.bits - 1)

    @property
    def lowest(self) -> int:
        """What unsigned codes are counted from."""
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    def groups(self, columns: int) -> int:
        """Return how many scales a row of so many entries has."""
        return -(-columns // self.sharing) if isinstance(self.sharing, int) else 1

    def spread(self, values: Tensor, columns: int) -> Tensor:
        """Lay out what groups have, shape (rows, groups), as what their entries have, of a shape that broadcasts."""
        if not isinstance(self.sharing, int):
            return values
        return values[:, :, None].expand(-1, -1, self.sharing).flatten(1)[:, :columns]


@dataclass(frozen=True)
class Coded:
    """A tensor as codes.

    Args:
        codes: q, the tensor's shape, int8 where symmetric and uint8 otherwise.
        scale: S, shape (outputs, groups), or (1, 1) for one in all; in the tensor's type.
        zero_point: Z, of the scale's shape, uint8; None where symmetric.
        divisor: What inputs are divided by before they meet the tensor, shape (input channels,); None for nothing.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    divisor: Tensor | None = None


def encode(weight: Tensor, grid: Grid, *, floor: Tensor | None = None) -> Coded:
    """Round a tensor to the codes of least squared error.

    Args:
        weight: Shape (outputs, ...), float32 or float64.
        grid: Which codes.
        floor: Least scales, of the scale's shape: those that a large bias next to tiny weights needs, whose codes are
            counted in the weight's scale.

    Source: Jacob et al. 2018, arXiv:1712.05877, eq. 1; Nagel et al. 2021, arXiv:2106.08295, sections 2.2 and 3.1.

    Example:
        >>> encode(torch.tensor([[-1.0, 0.5]]), Grid(8)).codes
        tensor([[-127,   64]], dtype=torch.int8)
        >>> affine = encode(torch.tensor([[-1.0, 0.0, 2.0]]), Grid(2, symmetric=False))
        >>> affine.codes.tolist(), affine.zero_point.tolist(), affine.scale.tolist()
        ([[0, 1, 3]], [[1]], [[1.0]])
    """
    scale, zero_point = fit(weight, grid)
    scale = scale if floor is None else torch.maximum(scale, floor)
    return Coded(to_codes(weight, grid, scale, zero_point), scale, zero_point)


def fit(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero point of least squared error, among those that reach to 0.2-1 times the extremes.

    A few clipped entries cost less than coarse steps for all. Zero always has a code.

    Args:
        weight: Shape (outputs, ...), float32 or float64.
        grid: Which codes.

    Returns:
        S, shape (outputs, groups) or (1, 1), in the tensor's type; Z, of the same shape, uint8, or None.
    """
    rows = weight.reshape(1, -1) if grid.sharing == "tensor" else weight.flatten(1)
    count, columns = len(rows), rows.shape[1]
    groups = grid.groups(columns)
    if isinstance(grid.sharing, int):  # zeros cost nothing in any scale
        rows = F.pad(rows, (0, groups * grid.sharing - columns)).reshape(count * groups, grid.sharing)
    low, high = grid.limits
    least, most = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    zero = torch.zeros_like(least)
    if grid.symmetric:
        cover = torch.maximum(-least, most) / high
    else:
        cover = (most - least) / high
        zero = (-least / cover.clamp(min=LEAST)).round().clamp(low, high)
    scale, error = cover, torch.full_like(cover, torch.inf)
    for share in _SHARES:
        trial = (cover * share).clamp(min=LEAST)
        if isinstance(grid.sharing, int):
            trial = trial.bfloat16().to(trial.dtype)
        rounded = (rows / trial).round_().add_(zero).clamp_(low, high).sub_(zero).mul_(trial)
        lost = rounded.sub_(rows).square_().sum(1, keepdim=True)
        scale, error = torch.where(lost < error, trial, scale), torch.minimum(lost, error)
    shape = (count, groups)
    return scale.reshape(shape), None if grid.symmetric else zero.reshape(shape).to(torch.uint8)


def to_codes(weight: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return ``clamp(round(w / S) + Z)``, the weight's shape."""
    rows, columns = weight.flatten(1), weight[0].numel()
    codes = (rows / grid.spread(scale, columns)).round()
    if zero_point is not None:
        codes = codes + grid.spread(zero_point, columns)
    return codes.clamp(*grid.limits).to(torch.int8 if grid.symmetric else torch.uint8).reshape(weight.shape)


def from_codes(codes: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return ``S · (q − Z)``, the codes' shape, in the scale's type; float32 at least.

    Example:
        >>> weight = torch.tensor([[0.0, 1.5, -0.5, 6.0]])
        >>> coded = encode(weight, Grid(4, symmetric=False, sharing=2))
        >>> from_codes(coded.codes, Grid(4, symmetric=False, sharing=2), coded.scale, coded.zero_point)[0, 0]
        tensor(0.)
    """
    columns = codes[0].numel()
    scale = scale if scale.dtype == torch.float64 else scale.float()
    numbers = codes.flatten(1).to(scale.dtype)
    if zero_point is not None:
        numbers = numbers - grid.spread(zero_point, columns)
    return (numbers * grid.spread(scale, columns)).reshape(codes.shape)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Write unsigned codes bit behind bit, the lowest first: eight codes take as many bytes as one has bits.

    Args:
        codes: Integers of 0 to 2ᵇ − 1, any shape.
        bits: Width of each, 2-8.

    Returns:
        uint8, shape (bytes,); the last eight codes are filled up with zeros.

    Example:
        >>> pack(torch.tensor([1, 2, 3]), 4)
        tensor([33,  3,  0,  0], dtype=torch.uint8)
    """
    if width(bits) == 8:
        return codes.flatten().to(torch.uint8)
    eights = F.pad(codes.flatten().long(), (0, -codes.numel() % 8)).reshape(-1, 8)
    words = (eights << bits * torch.arange(8, device=codes.device)).sum(1, keepdim=True)
    found: Tensor = (words >> 8 * torch.arange(bits, device=codes.device)) & 255
    return found.byte().flatten()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first codes of what `pack` gave, shape (count,), of an integer type.

    Example:
        >>> unpack(pack(torch.tensor([1, 2, 3]), 3), 3, 3).tolist()
        [1, 2, 3]
    """
    if width(bits) == 8:
        return packed[:count]
    # Each code lies in one byte, or in two. Products and remainders, because shifts have no translation to ONNX.
    starts = [bits * place for place in range(8)]
    first = torch.tensor([start // 8 for start in starts], device=packed.device)
    steps = torch.tensor([2 ** (start % 8) for start in starts], dtype=torch.int32, device=packed.device)
    parts = packed.reshape(-1, bits).int()
    words = parts[:, first] + 256 * parts[:, (first + 1).clamp(max=bits - 1)]
    codes: Tensor = torch.div(words, steps, rounding_mode="floor") % 2**bits
    return codes.flatten()[:count]


def width(bits: int) -> int:
    """Return a width of codes.

    Raises:
        SlivoError: If it is not 2-8.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise SlivoError(f"{bits} bits are not possible; codes have 2 to 8 bits")
    return bits
