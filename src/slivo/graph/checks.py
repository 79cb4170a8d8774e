"""Checks of what is handed in as a model, so that what cannot work is said in its words, not in PyTorch's."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from slivo.errors import CaptureError


def check_model(model: object) -> None:
    """Look whether something is a model that can be captured and cut.

    Args:
        model: What was handed in.

    Raises:
        CaptureError: If it is no module, is compiled by `torch.jit`, or holds a tensor without a shape, of a sparse
            layout, or made in inference mode.

    Example:
        >>> check_model(nn.Linear(2, 3))
        >>> check_model(nn.Linear)
        Traceback (most recent call last):
            ...
        slivo.errors.CaptureError: the model is the class Linear, not a torch.nn.Module; call it to make one
    """
    if isinstance(model, type):
        raise CaptureError(f"the model is the class {model.__name__}, not a torch.nn.Module; call it to make one")
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"the model is of type {type(model).__name__}, not a torch.nn.Module; give the model first, then its inputs"
        )
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"module {path!r}" if path else "the model"
            raise CaptureError(
                f"{where} is compiled by torch.jit, whose code is fixed; give the torch.nn.Module that it was made from"
            )
        if type(module).__module__.startswith("torch.ao.nn.quantized"):
            raise CaptureError(f"module {path!r} is quantized by torch.ao; prune the model first, and quantize it then")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            raise CaptureError(f"{name} of {owner} has no shape yet; call the model once on its inputs before")
        if tensor.layout is not torch.strided:
            raise CaptureError(
                f"{name} has the layout {tensor.layout}; only dense tensors can be cut: make it dense by to_dense()"
            )
        if tensor.is_inference():
            raise CaptureError(
                f"{name} was made in torch.inference_mode, where PyTorch captures nothing; make the model outside of "
                "it, or under torch.no_grad"
            )


def check_values(model: nn.Module) -> None:
    """Look whether a model's tensors have values.

    Raises:
        CaptureError: If one is on the meta device, where there are shapes alone.

    Example:
        >>> check_values(nn.Linear(2, 3, device="meta"))
        Traceback (most recent call last):
            ...
        slivo.errors.CaptureError: weight has no values, it is on the meta device; load the model's weights first
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise CaptureError(f"{name} has no values, it is on the meta device; load the model's weights first")
