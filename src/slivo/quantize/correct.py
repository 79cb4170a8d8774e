"""Bias correction: rounding shifts the mean of what a layer gives out, and its bias takes the shift back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slivo.edits.quantize import QuantizedLayer
from slivo.quantize.calibrate import run


@torch.no_grad()
def correct_biases_(quantized: nn.Module, folded: nn.Module, batches: Sequence[Any]) -> None:
    """Have each quantized layer give out, in the mean of each channel, what the layer that it stands for does.

    Both are given what that layer is given in the floating-point model, in one pass over the batches. Layers without
    a bias stay as they are.

    Args:
        quantized: Its biases are changed.
        folded: The floating-point model with the batch norms folded, whose layers have the same names.
        batches: Real inputs.

    Source: Nagel, van Baalen, Blankevoort, Welling 2019, arXiv:1906.04721, section 4.2, eq. 17; the mean is measured,
    that of the input's rounding with it.
    """
    pairs = {
        name: (folded.get_submodule(name), module)
        for name, module in quantized.named_modules()
        if isinstance(module, QuantizedLayer) and module.bias is not None
    }
    with _shifts(pairs) as shifts:
        run(folded, batches)
    for name, (total, count) in shifts.items():
        pairs[name][1].shift_((total / count).float())


@contextmanager
def _shifts(pairs: Mapping[str, tuple[nn.Module, QuantizedLayer]]) -> Iterator[dict[str, tuple[Tensor, int]]]:
    """Sum up for each channel by how much less quantized layers give out, and count how often."""
    found: dict[str, tuple[Tensor, int]] = {}

    def watch(name: str, layer: QuantizedLayer) -> Callable[..., None]:
        def after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x: Tensor = next(iter((*args, *kwargs.values())))
            shift = output.float() - layer.sums(x.float())
            channel = -1 if type(module) is nn.Linear else shift.dim() + 1 - module.weight.dim()
            rows = shift.movedim(channel, 0).flatten(1)
            total, count = found.get(name, (0.0, 0))
            found[name] = total + rows.double().sum(1), count + rows.shape[1]

        return after

    with ExitStack() as stack:
        for name, (module, layer) in pairs.items():
            stack.callback(module.register_forward_hook(watch(name, layer), with_kwargs=True).remove)
        yield found
