"""The permutation oracle: an axis is right exactly when permuting it changes nothing that the network computes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from slivo.graph import Axis, as_args
from slivo.graph.program import tensors_of


def permuted(model: nn.Module, axis: Axis, seed: int = 0) -> nn.Module:
    """Return a copy of a model with the positions of an axis in another order, everywhere at once."""
    new = copy.deepcopy(model)
    order = torch.randperm(axis.size, generator=torch.Generator().manual_seed(seed))
    tensors = {**dict(new.named_parameters()), **dict(new.named_buffers())}
    with torch.no_grad():
        for member in axis.members:
            tensor = tensors[member.tensor]
            rows = torch.from_numpy(member.index)
            moved = tensor.index_select(member.dim, rows[order].flatten())
            tensor.index_copy_(member.dim, rows.flatten(), moved)
    return new


def outputs(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """Run a model without gradients; return all tensors it gives out."""
    args, kwargs = as_args(inputs)
    with torch.no_grad():
        return tensors_of(model(*args, **kwargs))


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest difference, relative to the largest value."""
    assert len(found) == len(expected)
    return max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-300)) for a, b in zip(found, expected, strict=True)
    )
