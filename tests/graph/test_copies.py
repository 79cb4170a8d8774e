"""A copy has the original's names, whatever the model does when it is copied."""

from __future__ import annotations

import torch
from torch import nn

import slivo
from slivo.graph.copies import duplicate


class Renaming(nn.Module):
    """Copies itself by making itself anew, under other names, and reaches tensors past the modules, as Keras does."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        Renaming.made += 1
        self.first, self.last = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(3, 8))
        self.past = (self.first, self.last)  # not what the module's dictionary holds after it was changed
        held = nn.ParameterDict({f"{Renaming.made}/first": self.first, f"{Renaming.made}/last": self.last})
        self.held, self._parameters = held, {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.past[0].T).relu() @ self.past[1].T

    def __deepcopy__(self, memo: dict[int, object]) -> Renaming:
        del memo
        new = Renaming()
        for ours, theirs in zip(new.past, self.past, strict=True):
            ours.data.copy_(theirs.data)
        return new


def test_names_and_values_are_the_originals() -> None:
    model, x = Renaming(), torch.randn(2, 4)
    new = duplicate(model)
    assert [name for name, _ in new.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert torch.equal(new(x), model(x))
    assert not {id(each) for each in new.parameters()} & {id(each) for each in model.parameters()}


def test_a_model_that_reaches_past_its_modules_is_pruned_as_its_graph() -> None:
    model, x = Renaming(), torch.randn(2, 4)
    graph = slivo.trace(model, x)
    assert [axis.size for axis in graph.prunable] == [8]
    small = slivo.prune(model, x, keep=slivo.Budget(macs=0.5))
    assert small(x).shape == (2, 3)
    assert slivo.trace(small, x).macs == graph.macs // 2


def test_parameters_are_shared_on_request() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    shared = duplicate(model, share=True)
    assert shared[0].weight is model[0].weight
    assert shared[1].running_mean is not model[1].running_mean
