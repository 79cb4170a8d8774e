"""Exchange of modules within a model."""

from __future__ import annotations

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
