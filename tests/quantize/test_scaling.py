"""Scaling, equalizing and smoothing change no function; what they make alike is alike."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from zoo import build

import slivo
from slivo.errors import SlivoError
from slivo.graph import as_args
from slivo.quantize import equalize, smooth
from slivo.quantize.equalization import fold
from slivo.quantize.scaling import groups, scale_

FOUND = {
    "Mlp": 1, "PlainCnn": 1, "ResNet": 5, "PaddedShortcut": 3, "Mobile": 2, "Dense": 4, "UNet": 1, "Transformer": 2,
    "TorchEncoder": 2, "Recommender": 1, "Token": 1, "HalvesRotary": 1, "Coupled": 1, "SharedTwice": 0, "gru": 0,
}  # fmt: skip


@torch.no_grad()
def outputs(model, inputs):
    args, kwargs = as_args(inputs)
    return [each for each in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(each, Tensor)]


@pytest.mark.parametrize("name", list(FOUND))
def test_any_factors_leave_the_function_as_it_is(name):
    model, inputs = build(name)
    before = copy.deepcopy(model.state_dict())
    made = fold(model, inputs)
    found = groups(made, inputs)
    assert len(found) == FOUND[name]
    for group in found:
        scale_(made, group, torch.rand(group.size, dtype=torch.float64) * 2 + 0.3)
    # float64 sums in another order
    for ours, wanted in zip(outputs(made, inputs), outputs(model, inputs), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Between(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.a, self.b, self.what = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3), what
        self.deep = nn.Conv2d(4, 4, 3, groups=4)
        self.pair = nn.Conv2d(4, 4, 3, groups=2)
        self.shift = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x):
        return self.b(self.what(self, self.a(x)))


def branches(_, y):
    return F.max_pool2d(torch.cat([F.relu(y[:, :2]), y[:, 2:] * 2], 1) + F.leaky_relu(y), 2)


CASES = {
    "relu": (lambda n, y: F.relu(y), 1),
    "branches": (branches, 2),
    "a shift": (lambda n, y: F.relu(y + n.shift), 1),
    "a shift of some": (lambda n, y: y + n.shift[0], 0),
    "a number": (lambda n, y: y + 1, 0),
    "a sigmoid": (lambda n, y: torch.sigmoid(y), 0),
    "relu6": (lambda n, y: F.relu6(y), 0),
    "zeros around": (lambda n, y: F.pad(y, (1, 1)), 1),
    "ones around": (lambda n, y: F.pad(y, (1, 1), value=1.0), 0),
    "reflections": (lambda n, y: F.pad(y, (1, 1, 1, 1), mode="reflect"), 1),
    "depthwise": (lambda n, y: F.relu(n.deep(F.relu(y))), 2),
    "grouped": (lambda n, y: n.pair(y), 2),  # which group, and which channel of each
    "a mean over channels": (lambda n, y: y - y.mean(1, keepdim=True), 0),
    "used as a weight": (lambda n, y: y + F.conv2d(y[:1], y[:, :, :1, :1].mean(0)[:, :, :, None][:1].mT), 0),
    "a softmax": (lambda n, y: y.softmax(-1), 0),
    "sizes": (lambda n, y: y.view(y.shape[0], y.shape[1], -1).view(y.shape), 1),
}


@pytest.mark.parametrize("name", [each for each in CASES if each != "used as a weight"])
def test_what_stands_between_decides(name):
    what, count = CASES[name]
    torch.manual_seed(0)
    net, x = Between(what).double().eval(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    found = groups(net, x)
    assert len(found) == count
    wanted = net(x)
    for group in found:
        scale_(net, group, torch.rand(group.size, dtype=torch.float64) + 0.5)
    torch.testing.assert_close(net(x), wanted)


def chain():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    with torch.no_grad():
        net[0].weight *= torch.logspace(-3, 3, 6)[:, None]
        net[2].weight[2] = 0  # a channel without a range stays as it is
    return net


def test_ranges_are_balanced_and_the_bar_is_the_papers():
    net, x = chain(), torch.randn(8, 5, dtype=torch.float64)
    same = equalize(net, [x])
    torch.testing.assert_close(same(x), net(x))
    for before, after in ((same[0], same[2]), (same[2], same[4])):
        written, read = before.weight.abs().amax(1), after.weight.abs().amax(0)
        there = written > 0
        torch.testing.assert_close(written[there], read[there], rtol=2e-3, atol=0)
    assert same.training is False


def test_norms_are_folded_and_saved(tmp_path):
    def make():
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()

    torch.manual_seed(0)
    net, x = make(), torch.randn(4, 2, 8, 8)
    net[1].running_var.uniform_(0.1, 9)
    small = slivo.quantize(net, batches=[x], equalize=True, correct_bias=True)
    assert [edit.kind for edit in slivo.edits.record(small)] == ["quantize", "quantize"]
    again = slivo.load(slivo.save(small, tmp_path / "net"), factory=make)
    assert torch.equal(again(x), small(x))
    assert ((small(x) - net(x)).norm() / net(x).norm()).item() < 0.05


def test_smoothing_follows_its_formula():
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, 30.0, 0.1, 0.0]))
    x = torch.randn(16, 4)
    peak, weight = net[0](x).detach().abs().amax(0), net[1].weight.detach().abs().amax(0)
    same = smooth(net, [x[:8], x[8:]], 0.7)
    factors = torch.where(peak > 0, peak**0.7 / weight**0.3, 1)
    torch.testing.assert_close(same[1].weight.detach(), net[1].weight.detach() * factors)
    torch.testing.assert_close(same(x), net(x))


def test_smoothing_helps_where_channels_differ():
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16)).eval()
    with torch.no_grad():
        net[0].weight[3] = 100.0
        net[1].weight[:, 3] /= 100
    x = torch.randn(64, 32)

    def lost(**options):
        return (slivo.quantize(net, batches=[x], **options)(x) - net(x)).norm().item()

    assert lost(smooth=0.5) < 0.5 * lost()


def test_wrong_strengths_are_refused():
    with pytest.raises(SlivoError, match="smooth is 2; a number from 0 to 1"):
        slivo.quantize(chain(), batches=[torch.randn(2, 5)], smooth=2)


@pytest.mark.parametrize("scheme", ["int8-static", "int8-weights", "int8-dynamic"])
def test_biases_take_back_the_shift_of_each_channel(scheme):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    x = torch.rand(256, 12)
    for bits in (3, 7):
        plain, right = (
            slivo.quantize(net, scheme, batches=x.split(100), weight_bits=bits, correct_bias=each)
            for each in (False, True)
        )
        gaps = [(small[0](x) - net[0](x)).mean(0).abs().max() for small in (plain, right)]
        # Up to the grid of an integer bias.
        assert gaps[1] < 0.02 * gaps[0] + 1e-4
