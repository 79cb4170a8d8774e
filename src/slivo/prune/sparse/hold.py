"""Zeros that stay: weights of a sparse model held at zero while any code trains it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slivo.edits.parametrized import parametrized
from slivo.errors import SlivoError
from slivo.prune.sparse.masks import masked


class _Held(nn.Module):
    """Gives out a weight with zeros where it had them."""

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight; no gradient comes to what is zero."""
        return torch.where(self.kept, weight, 0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Take a weight as it is."""
        return weight


@contextmanager
def hold(model: nn.Module) -> Iterator[nn.Module]:
    """Keep the zeros of a sparse model while code of one's own trains it; for `slivo.train.fit` there is `HoldMasks`.

    Within the block each masked weight is a parametrization (`torch.nn.utils.parametrize`): the weight that the
    network uses has the zeros, whatever gradients, momenta and weight decay do to the parameter behind it. After it
    the weights are plain parameters again, with the zeros in them. They are the same parameters all along, in the same
    order, so that an optimizer may be made before the block, within it or, to go on, after it. Only the names in a
    state dict are others meanwhile: save the model after the block.

    Args:
        model: A model that `sparsify` made, or one trained from it; what is zero of the weights that its record names
            stays so. It is changed, and given to the block.

    Raises:
        SlivoError: If the model carries no mask, or is held already.

    Example:
        >>> from slivo.prune import sparsify
        >>> sparse = sparsify(nn.Linear(8, 8), sparsity=0.75)
        >>> adam = torch.optim.AdamW(sparse.parameters(), lr=0.1)
        >>> with hold(sparse):
        ...     sparse(torch.randn(4, 8)).square().sum().backward()
        ...     adam.step()
        >>> int((sparse.weight == 0).sum())
        48
    """
    held = {name: _Held(stays) for name, stays in zeros_of(model).items()}
    with parametrized(model, held):
        yield model


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    """Return for each masked weight of a model what of it is not zero.

    Raises:
        SlivoError: If there is none.
    """
    weights = masked(model)
    if not weights:
        raise SlivoError(
            "the model carries no mask whose weights it still has under their names; make it sparse by slivo.sparsify, "
            "and hold it once"
        )
    return {name: weight.detach() != 0 for name, weight in weights.items()}
