"""Modules that are alike are captured once, and nothing of one gets into the other."""

from __future__ import annotations

import functools

import pytest
import torch
from oracles.permutation import error, outputs
from torch import Tensor, nn
from zoo import build

import slivo
from slivo import edits
from slivo.graph import twins
from slivo.graph.twins import alike, capture_once, sharing


class Scaled(nn.Module):
    """Keeps a number, a plain tensor and a function beside its weights."""

    def __init__(self, scale: float = 1.0, shift: float = 0.0, activation=torch.relu) -> None:
        super().__init__()
        self.linear, self.scale, self.shift = nn.Linear(3, 3), scale, torch.tensor(shift)
        self.activation, self.sizes = activation, {"of": [3, (3,)]}

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x)) * self.scale + self.shift


def test_values_of_parameters_and_buffers_do_not_matter():
    assert alike(Scaled(), Scaled())
    assert alike(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    assert alike(
        Scaled(activation=functools.partial(torch.clamp, min=0)),
        Scaled(activation=functools.partial(torch.clamp, min=0)),
    )


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    return net


def hooked() -> nn.Module:
    net = Scaled()
    net.register_forward_hook(lambda module, inputs, output: output + 1)
    return net


@pytest.mark.parametrize(
    "other",
    [
        Scaled(scale=2.0),
        Scaled(shift=1.0),
        Scaled(activation=lambda x: x),
        Scaled(activation=functools.partial(torch.clamp, min=0)),
        Scaled().double(),
        Scaled().eval(),
        hooked(),
        nn.Linear(3, 3),
    ],
)
def test_all_else_does(other):
    assert not alike(Scaled(), other)


def test_ties_and_more_modules_do():
    assert not alike(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), tied())
    assert not alike(nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    assert not alike(nn.Linear(3, 3), nn.Linear(3, 3, bias=False))


def test_captures_are_shared_within_a_block_only():
    one, other, x = Scaled(), Scaled(), torch.randn(2, 3)
    with sharing():
        first = capture_once(one, x, "x")
        assert capture_once(other, x, "x") is first
        assert capture_once(other, x, "y") is not first
        with sharing():
            assert capture_once(other, x, "x") is first
            inner = capture_once(other, x, "z")
        assert capture_once(other, x, "z") is not inner
    assert capture_once(one, x, "x") is not first


def test_graphs_of_twins_have_their_own_tensors(monkeypatch):
    """The blocks of this network are replaced by graphs: one is captured, and each computes with its own weights."""
    captured = []
    plain = twins.capture
    monkeypatch.setattr(
        twins, "capture", lambda module, *args, **how: captured.append(module) or plain(module, *args, **how)
    )
    model, inputs = build("Coupled")
    small = slivo.prune(model, inputs, keep=slivo.Budget(params=0.6), scope="uniform")
    assert len(captured) == 1 < len(small.blocks)
    for name, weight in small.blocks[1].named_parameters():
        assert not torch.equal(weight, small.blocks[0].get_parameter(name))
    again = edits.replay(build("Coupled")[0], edits.record(small))
    assert len(captured) == 2
    again.load_state_dict(small.state_dict())
    assert error(outputs(again.eval(), inputs), outputs(small.eval(), inputs)) == 0
