"""A plain multi-layer perceptron."""

from __future__ import annotations

from itertools import pairwise

from torch import nn


def mlp(*sizes: int, dropout: float = 0.0) -> nn.Sequential:
    """Return a multi-layer perceptron: flatten, then linear layers with ReLU between them.

    Args:
        *sizes: Inputs, hidden widths, outputs; at least two numbers. Inputs of any shape are flattened first, so
            that an image with 64 pixels fits ``mlp(64, 128, 10)``.
        dropout: Share of hidden units dropped in training.

    Returns:
        The network, with PyTorch's initial weights, in training mode.

    Raises:
        ValueError: If there are fewer than two sizes.

    Example:
        >>> import torch
        >>> mlp(64, 32, 10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    if len(sizes) < 2:
        raise ValueError(f"mlp needs at least the number of inputs and of outputs, got {sizes}")
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes[:-1]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))
