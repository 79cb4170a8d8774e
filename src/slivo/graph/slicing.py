"""Slicing: indices of tensors that stay, cut out of a live module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from slivo.errors import ShapeError

Slices = Mapping[str, Mapping[int, Sequence[int]]]
"""For each tensor and dimension, the indices that stay."""


def check(model: nn.Module, slices: Slices) -> None:
    """Look whether a model has what is to be cut.

    Raises:
        ShapeError: If a tensor is not there or has no such index.
    """
    owners = _owners(model)
    for name, dims in slices.items():
        tensor = _tensor(owners, name)
        for dim, stays in dims.items():
            if dim >= tensor.dim() or (stays and max(stays) >= tensor.shape[dim]):
                raise ShapeError(f"{name} has shape {list(tensor.shape)}; it cannot be cut as asked in dim {dim}")


def within(model: nn.Module, slices: Slices) -> Slices:
    """Return the slices of those tensors that a model has."""
    owners = _owners(model)
    return {name: dims for name, dims in slices.items() if name in owners}


def cut_(model: nn.Module, slices: Slices) -> None:
    """Cut slices out of a model's tensors, gradients included; tied tensors stay tied.

    Raises:
        ShapeError: If a tensor is not there.
    """
    owners = _owners(model)
    tensors = {name: _tensor(owners, name) for name in slices}
    for name, dims in slices.items():
        new = _sliced(tensors[name], dims)
        for module, attribute, kind in owners[id(tensors[name])]:
            getattr(module, kind)[attribute] = new
            _replace_in_lists_(module, tensors[name], new)
    for module in {id(owner): owner for name in tensors for owner, _, _ in owners[id(tensors[name])]}.values():
        _compute_anew_(module)


def _compute_anew_(module: nn.Module) -> None:
    """Have the weights that old-style norms and masks compute at each call be of the new shape before the first."""
    with torch.no_grad():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                setattr(module, hook.name, hook.compute_weight(module))
            elif isinstance(hook, SpectralNorm):
                setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))
            elif isinstance(hook, BasePruningMethod):
                setattr(module, hook._tensor_name, hook.apply_mask(module))  # type: ignore[no-untyped-call]


def _replace_in_lists_(module: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put the new tensor into lists of weights that a module keeps, as recurrent layers do."""
    for value in vars(module).values():
        if isinstance(value, list):
            value[:] = [new if each is old else each for each in value]


def _owners(model: nn.Module) -> dict[Any, list[Any]]:
    """Map each tensor's identity to all (module, attribute, dictionary) that hold it, and each name to the tensor."""
    owners: dict[Any, list[Any]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for kind in ("_parameters", "_buffers"):
            for attribute, tensor in getattr(module, kind).items():
                if tensor is None:
                    continue
                owners.setdefault(f"{path}.{attribute}" if path else attribute, []).append(tensor)
                holders = owners.setdefault(id(tensor), [])
                if not any(holder[0] is module and holder[1] == attribute for holder in holders):
                    holders.append((module, attribute, kind))
    return owners


def _tensor(owners: Mapping[Any, list[Any]], name: str) -> Tensor:
    if name not in owners:
        raise ShapeError(f"the model has no tensor {name!r}")
    tensor: Tensor = owners[name][0]
    return tensor


def _sliced(tensor: Tensor, dims: Mapping[int, Sequence[int]]) -> Tensor:
    def cut(value: Tensor) -> Tensor:
        for dim, stays in dims.items():
            value = value.index_select(dim, torch.from_numpy(np.asarray(stays, dtype=np.int64)).to(value.device))
        return value.contiguous()

    with torch.no_grad():
        new = cut(tensor.detach())
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            if tensor.grad is not None:
                new.grad = cut(tensor.grad)
    return new
