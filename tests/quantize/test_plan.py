"""Which batch norms are folded and which outputs are rounded follows from where data flows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slivo.graph.capture import capture
from slivo.quantize.calibrate import calls
from slivo.quantize.plan import candidates, norms, plan


def planned(model, x):
    layers = candidates(model)
    counted = calls(model, {**layers, **norms(model)}, x)
    return plan(capture(model, x), layers, frozenset(name for name in counted if counted[name] == 1))


class Net(nn.Module):
    """Three convolutions and a head; what happens between them is the test's."""

    def __init__(self, between):
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        self.between = between

    def forward(self, x):
        return self.between(self, x)


def pooled(net, x):
    return net.head(x.mean((2, 3)))


CASES = {
    # name: (forward, folded, rounded)
    "norm behind": (lambda n, x: n.two(F.relu(n.norm(n.one(x)))), {"norm": "one"}, {}),
    "norm in front": (lambda n, x: n.two(n.norm(F.relu(n.one(x)))), {}, {"one": True}),
    "two read the layer": (lambda n, x: n.two(n.norm(y := n.one(x)) + y), {}, {"one": False}),
    "norm used twice": (lambda n, x: n.two(n.norm(n.one(n.norm(x)))), {}, {"one": False}),
    "layer used twice": (lambda n, x: n.one(n.norm(n.one(x))), {}, {"one": False}),
    "chain of norms": (lambda n, x: n.two(n.other(n.norm(n.one(x)))), {"norm": "one"}, {"one": False}),
    "mean behind a relu": (lambda n, x: pooled(n, F.relu(n.one(x))), {}, {"one": True}),
    "mean behind a sigmoid": (lambda n, x: pooled(n, torch.sigmoid(n.one(x))), {}, {"one": False}),
    "mean behind a norm": (lambda n, x: pooled(n, F.relu(n.norm(n.one(x)))), {"norm": "one"}, {"one": True}),
    "flattened": (lambda n, x: n.head(F.max_pool2d(n.one(x), 4).flatten(1)), {}, {}),
    "residual": (lambda n, x: n.three(F.relu(x + n.two(F.relu(n.one(x))))), {}, {"two": False}),
    "given out": (lambda n, x: n.two(F.relu_(n.one(x))), {}, {}),
    "given out and added": (lambda n, x: (y := n.one(x), y + 1), {}, {"one": False}),
    "a weight read elsewhere": (lambda n, x: F.conv2d(x, n.one.weight * 2), {}, {}),
}


@pytest.mark.parametrize("name", list(CASES))
def test_folding_and_rounding(name):
    forward, folded, rounded = CASES[name]
    found = planned(Net(forward), torch.randn(2, 4, 4, 4))
    assert dict(found.folded) == folded
    assert dict(found.rounded) == rounded


def test_a_norm_over_another_dimension_than_the_layers_is_not_folded():
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    assert planned(net, torch.randn(3, 6)).folded == {"1": "0"}
    assert planned(net, torch.randn(3, 5, 6)).folded == {}


def test_a_norm_without_running_statistics_is_not_folded():
    net = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3, track_running_stats=False))
    assert planned(net, torch.randn(3, 2, 4)).folded == {}


def test_layers_with_tied_weights_are_no_candidates():
    net = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5), "mine": nn.Linear(3, 3)})
    net["head"].weight = net["embed"].weight
    net["again"] = net["mine"]
    assert set(candidates(net)) == {"mine"}
