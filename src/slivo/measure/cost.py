"""Cost: parameters, multiply-accumulates and bytes of a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from slivo.edits.quantize import QuantizedLayer
from slivo.graph import ExampleInputs
from slivo.graph.capture import canonical_names, trying
from slivo.graph.inputs import fresh


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Args:
        params: Weights and biases, floating point or codes; tied ones count once.
        macs: Multiply-accumulates of convolutions, matrix products and attention, per sample, whatever their
            precision.
        size_bytes: Bytes of the model's tensors as a safetensors file.
    """

    params: int
    macs: int
    size_bytes: int


def cost(model: nn.Module, example_inputs: ExampleInputs) -> Cost:
    """Count what a model costs.

    Args:
        model: Run once in evaluation mode; left as it was.
        example_inputs: A tensor, a tuple of positional arguments or a mapping of keyword arguments; the first
            dimension of the first tensor is the batch.

    Example:
        >>> cost(nn.Linear(10, 4), torch.randn(8, 10))
        Cost(params=44, macs=40, size_bytes=312)
    """
    return Cost(count_params(model), count_macs(model, example_inputs), size_bytes(model))


def count_params(model: nn.Module) -> int:
    """Return the number of weights and biases, those of quantized layers included; tied ones count once."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    codes = sum(each.weight_shape.numel() + (0 if each.bias is None else each.bias.numel()) for each in layers)
    return sum(tensor.numel() for tensor in model.parameters()) + codes


def count_macs(model: nn.Module, example_inputs: ExampleInputs) -> int:
    """Return the multiply-accumulates per sample; counted by operator, functional calls and attention included."""
    args, kwargs = fresh(example_inputs)
    with trying(model), _plain_kernels(), _frozen(model), _counter() as counter:
        model(*args, **kwargs)
    return int(counter.get_total_flops()) // 2 // _batch_size((args, kwargs))


def _counter() -> FlopCounterMode:
    """Count what PyTorch's counter leaves out, too: products with vectors, of groups, and bilinear ones."""
    aten, transformers = torch.ops.aten, torch.ops.transformers
    formulas: dict[Any, Callable[..., int]] = dict.fromkeys((aten.mv, aten.dot, aten.vdot), _vector_flops)
    formulas[aten._grouped_mm] = _grouped_flops
    formulas[aten._trilinear] = _bilinear_flops
    if hasattr(transformers, "grouped_mm_fallback"):
        formulas[transformers.grouped_mm_fallback] = _grouped_flops
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _vector_flops(left: torch.Size, right: torch.Size, *_: object, **__: object) -> int:
    del right
    return 2 * left.numel()


def _grouped_flops(rows: torch.Size, matrices: torch.Size, *_: object, **__: object) -> int:
    """Each row meets one of the matrices."""
    return 2 * rows.numel() * matrices[-1]


def _bilinear_flops(left: torch.Size, cube: torch.Size, *_: object, **__: object) -> int:
    """Each pair of vectors meets the whole cube; `torch.nn.functional.bilinear` gives the vectors first."""
    return 2 * left[:-1].numel() * cube.numel()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Have parameters want no gradient: the counter stumbles over those that are given to a module as arguments."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def size_bytes(model: nn.Module) -> int:
    """Return the bytes of the model's tensors as a safetensors file; tied ones count once."""
    names = canonical_names(model)
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()  # views of one storage are refused
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False),
        )
        if names[name] == name
    }  # fmt: skip
    return len(save(tensors))


def _batch_size(inputs: object) -> int:
    sizes = [len(x) for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()]
    return max(1, sizes[0]) if sizes else 1


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Have recurrent and transformer layers computed by operators that can be counted, not by fused ones."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about settings that `flags` reads and writes, and we do not use
            with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
