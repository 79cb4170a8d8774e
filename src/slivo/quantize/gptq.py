"""GPTQ: round one column of a matrix after the other, and let those that are left make up for what was lost."""

from __future__ import annotations

import torch
from torch import Tensor

from slivo.edits.uniform import Coded, Grid, encode, fit, from_codes, to_codes
from slivo.measure.hessian import inverse_factor


def gptq(
    weight: Tensor, gram: Tensor, grid: Grid, *, damping: float = 0.01, columns: int = 128, act_order: bool = True
) -> Coded:
    """Return codes of a matrix that change what it computes least: those left of each column correct for it.

    Exact zeros stay zeros, those of pruned weights. Rows for which the nearest codes do better on these samples have
    those, so that no row's error is above that of rounding.

    Args:
        weight: W, shape (outputs, inputs).
        gram: H = XᵀX of what it reads, shape (inputs, inputs), float32 at least: it is computed in its dtype.
        grid: Which codes.
        damping: Added to the diagonal of H, as a share of its mean.
        columns: How many columns are corrected at once; of speed alone.
        act_order: Whether the inputs of most energy come first, while most is left to correct with; otherwise from
            first to last. Groups are of consecutive inputs either way, so that no order must be stored, and each is
            fitted, as corrected so far, when the first of its inputs has its turn.

    Source: Frantar, Ashkboos, Hoefler, Alistarh 2022, "GPTQ: Accurate Post-Training Quantization for Generative
    Pre-trained Transformers", arXiv:2210.17323, algorithm 1; the order is that of their code.

    Example:
        >>> weight, gram = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.4, 0.4]]), torch.eye(6)
        >>> gram[4, 5] = gram[5, 4] = 0.95  # two inputs that are nearly the same, of which 0.8 is read
        >>> encode(weight, Grid(2)).codes.tolist(), gptq(weight, gram, Grid(2)).codes.tolist()
        ([[1, 1, 1, 1, 0, 0]], [[1, 1, 1, 1, 0, 1]])
    """
    whole = weight.to(gram.dtype)
    size = whole.shape[1]
    nearest = encode(whole, grid)
    order = gram.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(size).to(gram.device)
    factor = inverse_factor(gram[order][:, order], damping)
    group = grid.sharing if isinstance(grid.sharing, int) else size
    places = order.argsort()
    scale = nearest.scale.clone()
    zero_point = None if nearest.zero_point is None else nearest.zero_point.clone()
    left, codes, single = whole[:, order], torch.empty_like(nearest.codes), Grid(grid.bits, grid.symmetric)
    fitted = set()
    for start in range(0, size, columns):
        stop = min(start + columns, size)
        part, inner = left[:, start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(part)
        for place, column in enumerate(order[start:stop].tolist()):
            here = column // group
            if here not in fitted:
                fitted.add(here)
                members = places[here * group : (here + 1) * group]
                found = fit(_current(left, errors[:, :place], factor[start : start + place], members, stop), grid)
                scale[:, here : here + 1] = found[0]
                if zero_point is not None and found[1] is not None:
                    zero_point[:, here : here + 1] = found[1]
            these = scale[:, here : here + 1], None if zero_point is None else zero_point[:, here : here + 1]
            wanted = part[:, place : place + 1]
            settled = to_codes(wanted.masked_fill(whole[:, column, None] == 0, 0), single, *these)
            codes[:, column] = settled[:, 0]
            errors[:, place] = (wanted - from_codes(settled, single, *these))[:, 0] / inner[place, place]
            part[:, place:] -= errors[:, place, None] * inner[place, place:]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return _better(whole, gram, grid, nearest, Coded(codes, scale, zero_point))


def _current(left: Tensor, errors: Tensor, factor: Tensor, members: Tensor, stop: int) -> Tensor:
    """Return columns as corrected by all that are done; those beyond a block wait for its end to be corrected."""
    now = left[:, members]
    later = (members >= stop).nonzero().flatten()
    now[:, later] -= errors @ factor[:, members[later]]
    return now


def loss(weight: Tensor, other: Tensor, gram: Tensor) -> Tensor:
    """Return the squared error of each output over all samples, ‖(w − ŵ) Xᵀ‖².

    Args:
        weight: Shape (..., outputs, inputs).
        other: What stands for it, same shape.
        gram: XᵀX of what it reads, shape (..., inputs, inputs).

    Returns:
        Shape (..., outputs).
    """
    apart = weight - other
    return (apart @ gram * apart).sum(-1).clamp(min=0)


def _better(weight: Tensor, gram: Tensor, grid: Grid, one: Coded, other: Coded) -> Coded:
    """Take of each row the codes of less error."""

    def lost(coded: Coded) -> Tensor:
        return loss(weight, from_codes(coded.codes, grid, coded.scale, coded.zero_point), gram)

    rows = (lost(other) < lost(one))[:, None]
    if grid.sharing == "tensor":  # and the scale is the same
        return Coded(torch.where(rows, other.codes, one.codes), one.scale, one.zero_point)
    zero_point = one.zero_point
    if zero_point is not None and other.zero_point is not None:
        zero_point = torch.where(rows, other.zero_point, zero_point)
    return Coded(torch.where(rows, other.codes, one.codes), torch.where(rows, other.scale, one.scale), zero_point)
