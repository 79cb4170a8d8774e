"""What the weights of a network read: statistics of the activations that they multiply, taken while it runs.

The operators are watched, not the modules: a weight that code of one's own hands to `torch.nn.functional.linear` is
seen as well as that of a layer, and attention's packed projections too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from slivo.graph import Member

aten = torch.ops.aten

_GROUPED = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")
"""Products of consecutive rows, told by where they end, with one matrix of a stack each."""


@dataclass(frozen=True)
class Reader:
    """One weight that reads an axis, as a matrix product: outputs = Σ over columns of activation · weight.

    Args:
        weights: What the weight makes of each position, shape (positions, columns, outputs). A position has several
            columns where a kernel, or several entries of the dimension, belong to it.
        gram: Summed products of the activations of *all* columns of the weight, those of other axes too, shape
            (all columns, all columns).
        places: Which of all columns are a position's, int64, shape (positions, columns).
    """

    weights: Tensor
    gram: Tensor
    places: Tensor


Statistic = Callable[[Tensor], Tensor]
"""Of activations, shape (groups, rows, columns): shape (groups, …)."""


def squares(activations: Tensor) -> Tensor:
    """Sum of squares over the rows."""
    return activations.square().sum(1)


def levels(activations: Tensor) -> Tensor:
    """Square of the mean magnitude over the rows."""
    return activations.abs().mean(1).square()


def means(activations: Tensor) -> Tensor:
    """Mean over the rows."""
    return activations.mean(1)


def grams(activations: Tensor) -> Tensor:
    """Products of all columns with one another, summed over the rows."""
    return activations.mT @ activations


def lay_out_(model: nn.Module) -> nn.Module:
    """Have the parameters of a copy lie in memory as usual, those of channels-last models too: `Watch` finds no others.

    Returns:
        The model.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    return model


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Take a statistic of the activations that each of some weights multiplies, summed over all uses.

    Args:
        weights: The weights, by name.
        statistic: What is taken.
        spread: Whether the statistic, one number a column, is laid out as the weights are.
        stacks: Whether the weights of three dimensions are watched, too, that hold one matrix for each expert.

    Attributes:
        found: The statistics, by weight and the dimension of it that is contracted (`key`).
    """

    def __init__(
        self, weights: Mapping[str, Tensor], statistic: Statistic, *, spread: bool, stacks: bool = False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.statistic, self.spread, self.stacks = statistic, spread, stacks
        self.found: dict[str, Tensor] = {}
        self._held: dict[int, list[tuple[str, Tensor]]] = {}
        for name, weight in weights.items():
            if weight.is_contiguous() and not weight.is_complex():
                self._held.setdefault(weight.untyped_storage().data_ptr(), []).append((name, weight.detach()))

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Look at the operands of an operator that multiplies with a weight, and run it."""
        if func in (aten.mm.default, aten.addmm.default):
            left, right = args[-2:]
            self._product(left, right)
            self._product(right.t(), left.t())
        elif func is aten.convolution.default:
            self._convolution(args[0], args[1], args[3:])
        elif func is aten.bmm.default and self.stacks:
            left, right = args
            self._stack(left, right)
            self._stack(right.mT, left.mT)
        elif str(func) in _GROUPED and self.stacks:
            given = [*args, *(kwargs or {}).values()]
            self._parted(given[0], given[1], given[2])
        return func(*args, **(kwargs or {}))

    def _name(self, view: Tensor) -> tuple[str, Tensor] | None:
        """Return the weight that a tensor is a view of."""
        for name, weight in self._held.get(view.untyped_storage().data_ptr(), ()):
            if 0 <= view.storage_offset() - weight.storage_offset() < weight.numel() and view.dtype == weight.dtype:
                return name, weight
        return None

    def _product(self, activation: Tensor, view: Tensor) -> None:
        """See a matrix product, (rows, columns) with (columns, outputs), whose right side may be of a weight."""
        named = self._name(view)
        if named is None:
            return
        name, weight = named
        if self.stacks and weight.dim() == 3:
            expert = (view.storage_offset() - weight.storage_offset()) // weight.stride(0)
            self._expert(named, expert, activation, view)
        if weight.dim() != 2:
            return
        value = self.statistic(_wide(activation)[None])
        if self.spread:
            start = view.storage_offset() - weight.storage_offset()
            value, column = value.new_zeros(weight.shape), value[0][:, None]
            value.as_strided(view.shape, view.stride(), start).copy_(column.expand(view.shape))
        self._add(name, 1 if view.stride(0) == weight.stride(1) else 0, value)

    def _parted(self, activation: Tensor, view: Tensor, ends: Tensor) -> None:
        """See a product of consecutive rows with one matrix of a stack each."""
        named = self._name(view)
        if named is None or view.shape[0] != len(named[1]):
            return
        start = 0
        for expert, end in enumerate(ends.tolist()):
            self._expert(named, expert, activation[start:end], view[expert])
            start = end

    def _stack(self, activation: Tensor, view: Tensor) -> None:
        """See a product, (experts, rows, columns) with (experts, columns, outputs)."""
        named = self._name(view)
        if named is not None and view.shape[0] == len(named[1]):
            for expert, (rows, each) in enumerate(zip(activation, view, strict=True)):
                self._expert(named, expert, rows, each)

    def _expert(self, named: tuple[str, Tensor], expert: int, activation: Tensor, view: Tensor) -> None:
        """See the product of some rows with one matrix of a stack."""
        name, weight = named
        dim = 2 if view.stride(0) == weight.stride(2) else 1
        if len(view) != weight.shape[dim] or view.stride(0) != weight.stride(dim):
            return
        value = self.statistic(_wide(activation)[None])
        there = self.found.setdefault(key(name, dim, stack=True), value.new_zeros(len(weight), *value.shape[1:]))
        there[expert] += value[0]

    def _convolution(self, x: Tensor, view: Tensor, options: Sequence[Any]) -> None:
        """See a convolution; a transposed one multiplies each activation once for every place of its kernel."""
        named = self._name(view)
        if named is None or x.dim() != view.dim():
            return
        *_, transposed, _, groups = options
        if not transposed:
            value = self.statistic(_patches(_wide(x), view.shape[2:], options[:3], groups))
            if self.spread:
                value = value[:, None].expand(-1, len(view) // groups, -1).reshape(view.shape)
            self._add(named[0], 1, value)
        elif self.spread or groups == 1:
            rows = _wide(x).movedim(1, -1).flatten(0, -2)
            value = self.statistic(rows.reshape(len(rows), groups, -1).movedim(1, 0))
            if self.spread:
                value = value.reshape(-1, *[1] * (view.dim() - 1)).expand(view.shape)
            self._add(named[0], 0, value)

    def _add(self, name: str, dim: int, value: Tensor) -> None:
        before = self.found.get(key(name, dim))
        self.found[key(name, dim)] = value.clone() if before is None else before.add_(value)


def key(tensor: str, dim: int, *, stack: bool = False) -> str:
    """Name a use of a weight: a weight that is tied with its own transpose is read along either dimension.

    Of a stack of matrices it is another one than that of a convolution's weight, which may have as many dimensions.
    """
    return f"{tensor}[{'stack ' * stack}{dim}]"


def _wide(x: Tensor) -> Tensor:
    """Return an activation in float32 at least, because squares of half precision overflow."""
    return x.detach().float() if x.dtype.itemsize < 4 else x.detach()


def _patches(x: Tensor, kernel: Sequence[int], options: Sequence[Sequence[int]], groups: int) -> Tensor:
    """Return what a convolution's kernel sees, shape (groups, rows, columns); columns as in the flattened weight."""
    stride, padding, dilation = options
    x = F.pad(x, [each for amount in reversed(padding) for each in (amount, amount)])
    for dim, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(dim, apart * (size - 1) + 1, step)[..., ::apart]
    x = x.reshape(len(x), groups, -1, *x.shape[2:]).movedim(1, 0)  # groups, batch, channels, places …, kernel …
    places = len(kernel)
    return x.movedim(2, 2 + places).flatten(2 + places).flatten(1, -2)


def lay(chosen: Sequence[Member], weights: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[Reader, ...]:
    """Return the readers of an axis: its members, and the Gram matrices of what their weights read.

    Args:
        chosen: The members that read the axis and were seen.
        weights: The weights, by name.
        found: The Gram matrices, by `key`, shape (groups, columns, columns).
    """
    made = []
    for member in chosen:
        gram, index = found[key(member.tensor, member.dim)], torch.from_numpy(member.index)
        weight = weights[member.tensor].detach()
        weight = weight.float() if weight.dtype.itemsize < 4 else weight
        groups, columns = gram.shape[:2]
        size = weight.shape[member.dim]
        kernel = columns // size
        # Transposed convolutions, and products without a transpose, have the columns first.
        matrices = weight.reshape(1, size, -1) if member.dim == 0 else weight.reshape(groups, -1, columns).mT
        places = (index[:, :, None] * kernel + torch.arange(kernel)).flatten(1).to(gram.device)
        made += [Reader(matrix[places], each, places) for matrix, each in zip(matrices, gram, strict=True)]
    return tuple(made)
