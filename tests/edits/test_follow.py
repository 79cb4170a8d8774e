"""An optimizer that follows a cut goes on as if it had trained the smaller model all along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from zoo import build

import slivo
from slivo import edits
from slivo.edits.follow import follow
from slivo.errors import ShapeError
from slivo.prune import Plan, cut

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "plain": lambda p: SGD(p, lr=0.1),
    "adam": lambda p: Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=0.01),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, centered=True, momentum=0.5),
}


def step(model: nn.Module, optimizer: Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_cut_of_dead_units_and_training_commute(kind: str) -> None:
    """Units without any weight in or out get no gradient: the network trains alike with and without them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    dead = {0: [2, 3, 7, 11], 2: [0, 8]}
    with torch.no_grad():
        for layer, units in dead.items():
            model[layer].weight[units] = 0
            model[layer].bias[units] = 0
            model[layer + 2].weight[:, units] = 0
    optimizer = OPTIMIZERS[kind]([{"params": model[:2].parameters(), "lr": 0.02}, {"params": model[2:].parameters()}])
    x = torch.randn(16, 5, dtype=torch.float64)
    for _ in range(3):
        step(model, optimizer, x)
    keep = {f"{layer} out": [i for i in range(model[layer].out_features) if i not in dead[layer]] for layer in dead}
    plan = Plan({"0 out": 12, "2 out": 9}, {name: tuple(kept) for name, kept in keep.items()})
    small = cut(model, x, plan)
    followed = follow(optimizer, model, small)
    assert [group["lr"] for group in followed.param_groups] == [group["lr"] for group in optimizer.param_groups]
    for _ in range(5):
        step(model, optimizer, x)
        step(small, followed, x)
    expected = cut(model, x, plan)
    for name, value in small.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["ResNet", "Transformer"])
def test_two_cuts_are_followed_at_once_and_the_old_optimizer_stays(name: str) -> None:
    model, x = build(name)
    optimizer = Adam(model.parameters())
    step(model, optimizer, x)
    before = {key: value["exp_avg"].clone() for key, value in optimizer.state.items()}
    once = slivo.prune(model, x, keep=slivo.Budget(macs=0.7))
    twice = slivo.prune(once, x, keep=slivo.Budget(macs=0.7))
    followed = follow(optimizer, model, twice)
    stepwise = follow(follow(optimizer, model, once), once, twice)
    for parameter in twice.parameters():
        assert followed.state[parameter]["exp_avg"].shape == parameter.shape
        assert torch.equal(followed.state[parameter]["exp_avg"], stepwise.state[parameter]["exp_avg"])
    assert all(torch.equal(before[key], value["exp_avg"]) for key, value in optimizer.state.items())
    step(twice, followed, x)


def test_a_model_that_did_not_come_by_a_cut_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3)
    optimizer = SGD(model.parameters(), lr=0.1)
    small = slivo.prune(model, x, keep=slivo.Budget(macs=0.5))
    with pytest.raises(ShapeError, match="did not come from the old one by cuts alone"):
        follow(SGD(small.parameters(), lr=0.1), small, model)
    with pytest.raises(ShapeError, match="did not come from the old one by cuts alone"):
        follow(optimizer, model, slivo.quantize(small, batches=[x]))
    with pytest.raises(ShapeError, match=r"parameter of shape \(4, 3\) that is not in both models"):
        follow(optimizer, nn.Linear(2, 2), edits.apply(nn.Linear(2, 2), edits.Cut({})))
