"""Groups: all that belongs to the positions of an axis, measured and moved together in a model that is training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from slivo.errors import ShapeError
from slivo.graph import Axis, Graph


@dataclass(frozen=True)
class Rows:
    """Where the positions of an axis lie in one parameter.

    Args:
        tensor: The parameter's name.
        dim: The dimension that lies on the axis.
        size: Its size.
        index: int64, shape (positions, entries): which of the dimension's entries are a position's.
        numbers: Of numbers that a position has in the parameter, a complex one counting as two.
    """

    tensor: str
    dim: int
    size: int
    index: Tensor
    numbers: int


def rows_of(graph: Graph, axis: Axis, positions: Sequence[int] | None = None) -> tuple[Rows, ...]:
    """Return where some positions of an axis, or all, lie in the model's parameters: those that write and that read."""
    found = []
    for member in axis.members:
        if member.tensor in graph.parameters:
            shape = [term.size for term in graph.inference.tensors[member.tensor]]
            index = torch.from_numpy(member.index if positions is None else member.index[list(positions)])
            numbers = index.shape[1] * prod(shape) // shape[member.dim]
            found.append(Rows(member.tensor, member.dim, shape[member.dim], index, numbers))
    return tuple(found)


def held(model: nn.Module, groups: Iterable[Sequence[Rows]]) -> dict[str, Tensor]:
    """Return the parameters that groups lie in, by name, as they are now.

    Raises:
        ShapeError: If the model lacks one, or has it in another size.
    """
    every, found = dict(model.named_parameters()), dict[str, Tensor]()
    for rows in groups:
        for each in rows:
            tensor = every.get(each.tensor)
            if tensor is None or tensor.shape[each.dim] != each.size:
                has = "lacks" if tensor is None else f"has {tensor.shape[each.dim]} positions, not {each.size}, in"
                raise ShapeError(f"the model {has} {each.tensor!r}; trace the very model that is trained, not yet cut")
            found[each.tensor] = tensor.detach()
    return found


def products(rows: Sequence[Rows], one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
    """Return for each position the inner product of its group in one set of values with that in another.

    Args:
        rows: Where the positions lie.
        one: Values by name of the parameter.
        other: Likewise; the same as ``one`` for squared norms.

    Returns:
        Shape (positions,), float32 at least.
    """
    total = torch.zeros(())
    for each in rows:
        left, right = (_real(values[each.tensor]) for values in (one, other))
        product = (left * right).movedim(each.dim, 0).reshape(each.size, -1).sum(1)
        total = total.to(product.device) + product[each.index.to(product.device)].sum(1)
    return total


def add_(rows: Sequence[Rows], to: Mapping[str, Tensor], values: Mapping[str, Tensor], factors: Tensor) -> None:
    """Add to each position's group the group of other values, times the position's factor."""
    for each in rows:
        tensor = to[each.tensor]
        tensor.add_(values[each.tensor] * _spread(each, tensor, factors, 0.0))


def scale_(rows: Sequence[Rows], tensors: Mapping[str, Tensor], factors: Tensor) -> None:
    """Multiply each position's group by the position's factor."""
    for each in rows:
        tensor = tensors[each.tensor]
        tensor.mul_(_spread(each, tensor, factors, 1.0))


def _spread(rows: Rows, tensor: Tensor, factors: Tensor, rest: float) -> Tensor:
    """Lay factors out along the dimension, with the same number for entries of other positions."""
    spread = torch.full((rows.size,), rest, dtype=factors.dtype, device=tensor.device)
    spread[rows.index.to(tensor.device)] = factors.to(tensor.device)[:, None]
    real = tensor.real.dtype if tensor.is_complex() else tensor.dtype
    return spread.to(real).reshape(-1, *[1] * (tensor.dim() - rows.dim - 1))


def _real(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
