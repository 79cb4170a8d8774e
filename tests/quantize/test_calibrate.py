"""Calibration sees what flows through a model and leaves the model alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slivo.errors import SlivoError
from slivo.quantize.calibrate import BINS, Site, best_range, calls, observe


def squared_error(values, low, high, levels=255):
    scale = (high - low) / levels
    zero = round(-low / scale)
    codes = ((values / scale).round() + zero).clamp(0, levels) - zero
    return float((codes * scale - values).square().sum())


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(input=self.first(x))


def test_extremes_and_histogram_are_those_of_all_batches():
    net = Keyword().train()
    batches = [torch.randn(5, 3), (torch.randn(7, 3),), {"x": torch.randn(2, 3)}]
    sites = [
        Site("first", net.first, "input"),
        Site("second", net.second, "input"),
        Site("first", net.first, "output", positive=True),
    ]
    observe(net, sites, batches)
    with torch.no_grad():
        x = torch.cat([batches[0], batches[1][0], batches[2]["x"]])
        middle = net.first(x)
    for site, seen in zip(sites, (x, middle, middle[middle >= 0]), strict=True):
        assert site.high == pytest.approx(float(seen.max()), rel=1e-6)
        assert site.low == pytest.approx(min(0.0, float(seen.min())), rel=1e-6)
        assert int(site.counts.sum()) == seen.numel()
    assert net.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("shape", ["uniform", "long tail", "one outlier"])
def test_the_best_range_loses_no_more_than_the_extremes(shape):
    torch.manual_seed(0)
    x = {
        "uniform": torch.rand(4000, 1) * 3 - 1,
        "long tail": torch.randn(4000, 1) ** 5,
        "one outlier": torch.cat([torch.rand(4000, 1), torch.full((1, 1), 40.0)]),
    }[shape]
    layer = nn.Linear(1, 1)
    site = Site("", layer, "input")
    observe(layer, [site], [x])
    low, high = best_range(site, 4)
    assert site.low <= low <= 0 <= high <= site.high
    # The histogram knows values to half a bin.
    slack = x.numel() * (site.high - site.low) ** 2 / BINS / 15
    assert squared_error(x, low, high, 15) <= squared_error(x, site.low, site.high, 15) + slack
    if shape == "long tail":
        assert high < site.high
    if shape == "one outlier":
        assert high < site.high / 2


def test_a_constant_zero_has_an_empty_range():
    layer = nn.Linear(1, 1)
    site = Site("", layer, "input")
    observe(layer, [site], [torch.zeros(3, 1)])
    assert best_range(site, 8) == (0.0, 0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(bad):
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(SlivoError, match="the input of 0 is not finite"):
        observe(net, [Site("0", net[0], "input")], [torch.tensor([[1.0, bad]])])
    assert not net[0]._forward_pre_hooks


def test_calls_are_counted():
    a, b, c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    counted = calls(nn.Sequential(a, b, a), {"a": a, "b": b, "c": c}, torch.zeros(1, 2))
    assert (counted["a"], counted["b"], counted["c"]) == (2, 1, 0)
