"""Exchange of modules within a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


def swap_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in another's place under every name that the other has.

    Example:
        >>> layer = nn.ReLU()
        >>> net = nn.Sequential(layer, nn.Linear(2, 2), layer)
        >>> swap_(net, layer, nn.GELU())
        >>> [type(each).__name__ for each in net]
        ['GELU', 'Linear', 'GELU']
    """
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # under each name; `named_children` gives the first only
            if child is old:
                setattr(parent, name, new)


@contextmanager
def exchanged(model: nn.Module, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> Iterator[nn.Module]:
    """Have modules of a model be others for a while; gives the model, or what takes its place if it is one of them."""
    encoders = [each for each in model.modules() if isinstance(each, nn.TransformerEncoderLayer)]
    fused = [each.activation_relu_or_gelu for each in encoders]
    for old, new in pairs:
        swap_(model, old, new)
    unfuse_(model)
    try:
        yield next((new for old, new in pairs if old is model), model)
    finally:
        for old, new in pairs:
            swap_(model, new, old)
        for encoder, value in zip(encoders, fused, strict=True):
            encoder.activation_relu_or_gelu = value


def unfuse_(model: nn.Module) -> None:
    """Keep PyTorch's fused encoder layers from reading the weights of linear layers that are something else now."""
    for each in model.modules():
        if isinstance(each, nn.TransformerEncoderLayer):
            layers: tuple[nn.Module, ...] = (each.linear1, each.linear2)
            if not all(isinstance(layer, nn.Linear) for layer in layers):
                each.activation_relu_or_gelu = 0
