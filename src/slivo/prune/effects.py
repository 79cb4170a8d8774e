"""Criteria of effects seen: what the output loses when a position is masked, and where training moves the weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slivo.errors import ShapeError
from slivo.prune.criterion import Criterion, criterion
from slivo.train import Hook, TrainState


@criterion(on="read", relative=False)
def masking(whole: Tensor, without: Iterable[Tensor]) -> Tensor:
    """Divergence of the output's distribution when the position is masked, exactly; needs no labels.

    `kl` is its estimate from gradients, for all positions at once. Here the network runs once for each position and
    batch: give a small batch.

    Args:
        whole: Logarithms of the classes' chances, shape (…, classes).
        without: The same with each position masked in all weights that read it, one position after the other.

    Returns:
        Scores, shape (positions,): mean of KL(p ‖ p without the position), in nats.

    Source: Kullback, Leibler 1951, "On Information and Sufficiency"; as a score for pruning, Luo, Wu 2020, "Neural
    Network Pruning with Residual-Connections and Limited-Data", arXiv:1911.08114.

    Example:
        >>> even, odd = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> [round(each, 4) for each in masking.score(even, [even, odd]).tolist()]
        [0.0, 0.1438]
    """
    chances = whole.exp()
    return torch.stack([(chances * (whole - other)).sum(-1).mean() for other in without])


@criterion(on="read", relative=False)
def movement(moved: Tensor) -> Tensor:
    """Movement away from zero while the network trains: what training shrinks can go, however large it is.

    From batches and a loss it is a short training by plain gradient steps. `Movement` watches one of your own.

    Args:
        moved: Sum over the steps of −w·g of the weights that read the axis, shape (positions, entries).

    Returns:
        Scores, shape (positions,): −Σ over steps and entries of w·g; negative where weights move towards zero.

    Source: Sanh, Wolf, Rush 2020, "Movement Pruning", arXiv:2005.07683, section 4 (there of single weights); of
    structures, Lagunas, Charlaix, Sanh, Rush 2021, "Block Pruning for Faster Transformers", arXiv:2109.04838.

    Example:
        >>> movement.score(torch.tensor([[0.5, -1.0], [2.0, 0.0]])).tolist()
        [-0.5, 2.0]
    """
    return moved.sum(1)


class Movement(Hook):
    """Adds up how weights move away from zero while a network trains, to prune by afterwards.

    In a loop of your own call `add` between the backward pass and the optimizer's step.

    Example:
        >>> import slivo
        >>> net, hook = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)), Movement()
        >>> net(torch.randn(3, 2)).square().sum().backward()
        >>> hook.add(net)
        >>> small = slivo.prune(net, torch.randn(2, 2), keep=slivo.Budget(macs=0.5), criterion=hook.criterion(net))
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, model: nn.Module) -> None:
        """Add −w·g of all parameters that have a gradient."""
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                step = -parameter.detach() * parameter.grad
                self.sums[name] = self.sums[name] + step if name in self.sums else step

    def criterion(self, model: nn.Module) -> Criterion:
        """Return `movement` with what has been added up.

        Raises:
            ShapeError: If the model's parameters are not those that trained.
        """
        held = dict(model.named_parameters())
        for name, total in self.sums.items():
            if name not in held or held[name].shape != total.shape:
                raise ShapeError(
                    f"{name} of shape {list(total.shape)} was watched, but the model has it not; prune that one"
                )
        sums = {name: self.sums.get(name, torch.zeros_like(value.detach())) for name, value in held.items()}
        return replace(movement, taken={"moved": sums})

    def on_gradients(self, state: TrainState) -> None:
        """Add the step to come."""
        self.add(state.model)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums."""
        return {"sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the sums."""
        self.sums = state["sums"]
