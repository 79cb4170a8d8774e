"""Which precision and memory layout a training runs in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from slivo.graph.capture import evaluating

Precision = Literal["auto", "fp32", "bf16"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

WORTH_BF16 = 5_000_000_000
"""Multiply-accumulates of convolutions in a batch's forward pass from which bf16 pays for its casts.

Between what small networks for 8x8 images take (1e9 at a batch of 256) and a ResNet-18 for CIFAR (7e10 at 128).
"""


def choose(model: nn.Module, device: torch.device, run: Callable[[], object]) -> Literal["fp32", "bf16"]:
    """Choose the precision for a model by rule, never by timing, so that a training can be repeated.

    bf16 where the device has it in hardware, and the convolutions of one batch come to `WORTH_BF16`
    multiply-accumulates in the forward pass. All else is fp32: casts cost small networks more than they bring.

    Args:
        model: The model.
        device: Where it trains.
        run: Runs one batch through the model; called only if the answer hangs on it, in evaluation mode and
            without gradients.

    Returns:
        ``"fp32"`` or ``"bf16"``.
    """
    if not (has_bf16(device) and any(isinstance(module, CONVOLUTIONS) for module in model.modules())):
        return "fp32"
    return "bf16" if convolution_macs(model, run) >= WORTH_BF16 else "fp32"


@contextmanager
def layout(
    model: nn.Module, device: torch.device, precision: Literal["fp32", "bf16"], run: Callable[[], object]
) -> Iterator[None]:
    """Hold the weights of 2-D convolutions channels-last meanwhile, where that is faster; all that follows them is.

    On CPUs it always is (an eighth of a training step of `slivo.zoo.small_cnn`, on 8x8 and on 32x32), on GPUs with
    the tensor cores that bf16 runs on. Code that relies on how activations lie in memory (``x.view(len(x), -1)`` behind
    a convolution) fails then; weights stay as they are if it does.

    Args:
        model: The model; weights that were laid out as usual are so again afterwards.
        device: Where it trains.
        precision: What it trains in.
        run: Runs one batch through the model; called once if weights have been moved, in evaluation mode and without
            gradients.
    """
    moved: list[nn.Parameter] = []
    if device.type == "cpu" or precision == "bf16":
        for module in model.modules():
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            if isinstance(module, nn.Conv2d) and weight is not None and weight.is_contiguous():
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
                moved.append(weight)
    try:
        if moved and not _runs(model, run):
            _lay_back(moved)
            moved = []
        yield
    finally:
        _lay_back(moved)


def _runs(model: nn.Module, run: Callable[[], object]) -> bool:
    with evaluating(model), torch.no_grad():
        try:
            run()
        except RuntimeError:  # the training will say what is wrong, if it is something else
            return False
    return True


def _lay_back(moved: Iterable[nn.Parameter]) -> None:
    for parameter in moved:
        parameter.data = parameter.data.contiguous()


def has_bf16(device: torch.device) -> bool:
    """Say whether a device multiplies bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Below AVX512-BF16 and AMX it is emulated, and slower than fp32.
    # An older PyTorch cannot tell.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def convolution_macs(model: nn.Module, run: Callable[[], object]) -> int:
    """Count the multiply-accumulates of a model's convolutions while something runs it.

    Args:
        model: The model; its modes are left as they were.
        run: Runs the model, as often as wanted.

    Returns:
        The count, over the whole batch.
    """
    counts: list[int] = []

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        counts.append(output.numel() * weight[0].numel())

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, CONVOLUTIONS)]
    try:
        with evaluating(model), torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return sum(counts)
