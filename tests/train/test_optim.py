"""Optimizers decay what they should, and schedules keep their shape."""

import pytest
import torch
from torch import nn

from slivo.errors import SlivoError
from slivo.train.optim import OptimizerSpec, build, lr_share


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_weights_decay_and_biases_and_norms_do_not(kind):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    spec = OptimizerSpec(kind=kind, lr=0.1, weight_decay=0.5, schedule="constant")
    optimizer, _ = build(spec, model.parameters(), 10)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            assert parameter.norm() < before[name].norm()
        else:
            assert torch.equal(parameter, before[name])


def test_all_may_decay():
    optimizer, _ = build(OptimizerSpec(decay_vectors=True), nn.Linear(2, 2).parameters(), 10)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4]


def test_parameters_count_once_and_frozen_ones_not():
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    optimizer, _ = build(OptimizerSpec(), [*layer.parameters(), layer.weight], 10)
    assert [parameter for group in optimizer.param_groups for parameter in group["params"]] == [layer.weight]
    with pytest.raises(SlivoError, match="nothing to train"):
        build(OptimizerSpec(), layer.requires_grad_(False).parameters(), 10)


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("total", [1, 7, 100])
def test_schedules_rise_to_the_peak_and_fall_to_nearly_nothing(schedule, warmup, total):
    spec = OptimizerSpec(schedule=schedule, warmup=warmup)
    shares = [lr_share(spec, step, total_steps=total) for step in range(total + 1)]
    peak = shares.index(max(shares))
    assert all(1e-4 <= share <= 1 for share in shares)
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert abs(peak - warmup * total) <= 1
    assert shares[-1] == 1e-4
    assert (warmup * total).is_integer() is False or shares[peak] == 1


def test_constant_is_constant():
    assert {lr_share(OptimizerSpec(schedule="constant"), step, total_steps=5) for step in range(9)} == {1.0}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "adam"),
        ("schedule", "linear"),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("momentum", 1.0),
        ("weight_decay", -1.0),
        ("warmup", 1.0),
    ],
)
def test_impossible_settings_are_refused_by_name(field, value):
    with pytest.raises(SlivoError, match=f"optimizer {field} is"):
        OptimizerSpec(**{field: value})
