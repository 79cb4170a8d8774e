"""The permutation oracle in float64: an axis is right exactly when permuting it changes nothing in the outputs.

Every prunable axis of a graph is permuted, everywhere at once, and the network's outputs are compared with those from
before. If a row of some tensor is missing from an axis, or is of another axis, they differ.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from slivo.graph import Axis, Graph, as_args
from slivo.graph.capture import evaluating
from slivo.graph.program import tensors_of

SECONDS = 10.0
"""If permuting axes one by one would take longer, they are permuted in groups."""

LARGEST = 1e-9
"""Largest error of an axis that is right; rounding stays below 1e-11 in float64, mistakes are far above."""


def worst(model: nn.Module, graph: Graph, inputs: Any) -> tuple[float, str, bool]:
    """Permute all prunable axes of a model and measure what changes.

    Each axis is permuted alone where that is quick. Otherwise axes are permuted in groups, every axis in its own order:
    in group 2k those whose number has bit k, in group 2k + 1 the others. So every axis is permuted, and of any two axes
    each is once permuted without the other; a mistake in one cannot be made up for by another in all groups. Where a
    group fails, its axes are permuted one by one, to tell which it was.

    Args:
        model: The traced model. It is turned into float64 and stays so.
        graph: Its graph.
        inputs: What it was traced with.

    Returns:
        The largest error relative to the largest output, an axis that has it (or the first of its group), and whether
        the axes were permuted one by one.
    """
    model.double()
    # Of images, the only inputs that are large, one is enough.
    inputs = doubled(inputs[:1] if isinstance(inputs, Tensor) and inputs.dim() > 3 else inputs)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    start = time.perf_counter()
    expected = outputs(model, inputs)
    alone = (time.perf_counter() - start) * len(graph.prunable) <= SECONDS
    error, name = 0.0, ""
    for group in ([axis] for axis in graph.prunable) if alone else halves(graph.prunable):
        found = difference(model, tensors, group, inputs, expected)
        if len(group) > 1 and not found <= LARGEST:
            singles = ((difference(model, tensors, [axis], inputs, expected), axis.name) for axis in group)
            found, culprit = next((each for each in singles if not each[0] <= LARGEST), (found, group[0].name))
            return found, culprit, alone
        if not found <= error:  # so that NaN counts
            error, name = found, group[0].name
    return error, name, alone


def halves(axes: Sequence[Axis]) -> Iterator[list[Axis]]:
    """Yield groups of axes such that every two axes are once apart, and every axis is in some group."""
    for bit in range(max(1, (len(axes) - 1).bit_length())):
        for side in (1, 0):
            group = [axis for number, axis in enumerate(axes) if number >> bit & 1 == side]
            if group:
                yield group


def difference(
    model: nn.Module, tensors: dict[str, Tensor], axes: Iterable[Axis], inputs: Any, expected: list[Tensor]
) -> float:
    """Return how much a model's outputs change when axes are permuted; put them back afterwards."""
    axes = list(axes)
    orders = [order(axis.size, seed) for seed, axis in enumerate(axes)]
    for axis, new in zip(axes, orders, strict=True):
        permute_(tensors, axis, new)
    found = outputs(model, inputs)
    for axis, new in reversed(list(zip(axes, orders, strict=True))):
        permute_(tensors, axis, torch.argsort(new))
    return relative(found, expected)


def order(size: int, seed: int) -> Tensor:
    """Return a random order of some positions; never the one they have, unless there is but one."""
    generator = torch.Generator().manual_seed(seed)
    new = torch.randperm(size, generator=generator)
    return new.roll(1) if torch.equal(new, torch.arange(size)) else new


def permute_(tensors: dict[str, Tensor], axis: Axis, new: Tensor) -> None:
    """Put the positions of an axis into another order, in every tensor that has it."""
    with torch.no_grad():
        for member in axis.members:
            tensor, rows = tensors[member.tensor], torch.from_numpy(member.index)
            tensor.index_copy_(member.dim, rows.flatten(), tensor.index_select(member.dim, rows[new].flatten()))


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Run a model in evaluation mode, all in float64; return the tensors it gives out."""
    args, kwargs = as_args(inputs)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with evaluating(model), torch.no_grad(), KeepDouble():
            return [each.clone() for each in tensors_of(model(*args, **kwargs))]
    finally:
        torch.set_default_dtype(before)


def relative(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference, relative to the largest value of its tensor; infinite where shapes differ."""
    if [each.shape for each in found] != [each.shape for each in expected]:
        return float("inf")
    error = 0.0
    for one, other in zip(found, expected, strict=True):
        if other.numel() == 0:
            continue
        one, other = one.double(), other.double()
        apart = torch.where(one == other, 0.0, (one - other).abs())  # equal infinities are equal
        scale = other.abs()[other.isfinite()].max() if other.isfinite().any() else torch.tensor(1.0)
        this = float(apart.max() / scale.clamp_min(1e-300))
        if not this <= error:
            error = this
    return error


def doubled(inputs: Any) -> Any:
    """Return inputs with their floating-point tensors in float64."""
    return pytree.tree_map(
        lambda each: each.double() if isinstance(each, Tensor) and each.is_floating_point() else each, inputs
    )


class KeepDouble(TorchFunctionMode):
    """Read every request for a smaller floating-point type as one for float64.

    Many models compute parts in float32 whatever they are given: norms (``x.to(torch.float32)``), softmax
    (``dtype=torch.float32``), rotary angles (``x.float()``). Their rounding, some 1e-7, would hide mistakes that are
    smaller than that, and make right axes look wrong.
    """

    SMALLER = (torch.float32, torch.float16, torch.bfloat16)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        if getattr(func, "__name__", "") in ("grouped_mm", "_grouped_mm"):
            return grouped_product(*args, **(kwargs or {}))
        args = tuple(self._wider(each) for each in args)
        return func(*args, **{key: self._wider(each) for key, each in (kwargs or {}).items()})

    def _wider(self, value: Any) -> Any:
        return torch.float64 if isinstance(value, torch.dtype) and value in self.SMALLER else value


def grouped_product(rows: Tensor, weights: Tensor, *, offs: Tensor, **_: None) -> Tensor:
    """Multiply each group of rows with a weight of its own; PyTorch's operator for that takes no float64."""
    starts = [0, *offs.tolist()]
    return torch.cat([rows[a:b] @ weight for a, b, weight in zip(starts, starts[1:], weights, strict=False)])
