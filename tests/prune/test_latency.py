"""Latency budgets are hit as a timer has it, whatever it is; no test looks at the clock."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import build

import slivo
from slivo.errors import SlivoError, TargetError
from slivo.measure import cost
from slivo.measure.latency import compare
from slivo.prune import Budget, allocate, drop
from slivo.prune.latency import _search, curves
from slivo.prune.ranks import rank

X = torch.randn(2, 3, 8, 8)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 48, 3), nn.ReLU(), nn.Conv2d(48, 80, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(80, 10)).eval()


def hardware(block: int = 1, overhead: float = 0.2) -> Callable[[nn.Module], float]:
    """A machine that computes so many channels at once: a width of 9 takes as long as one of 16 if block is 8."""

    def ceiled(width: int) -> int:
        return -(-width // block) * block

    def timer(model: nn.Module) -> float:
        found = overhead
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                weight = module.weight
                found += 1e-4 * ceiled(weight.shape[0]) * ceiled(weight.shape[1]) * weight[0, 0].numel()
        return found

    return timer


@pytest.mark.parametrize("scope", ["global", "uniform", "isomorphic"])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.25])
def test_a_share_is_hit_within_five_percent(share, scope):
    model, timer = net(), hardware()
    small = slivo.prune(model, X, keep=Budget(latency=share), scope=scope, timer=timer)
    assert 0.95 * share <= timer(small) / timer(model) <= share


@pytest.mark.parametrize("name", ["ResNet", "Transformer", "PlainCnn"])
def test_milliseconds_are_held_on_any_network(name):
    model, x = build(name)
    timer = hardware(overhead=0.01)
    wanted = 0.7 * timer(model)
    small = slivo.prune(model, x, keep=Budget(latency_ms=wanted), min_width=1, timer=timer)
    assert 0.9 * wanted <= timer(small) <= wanted  # widths of 8 have large steps


@pytest.mark.parametrize("share", [0.75, 0.4])
def test_hardware_with_steps(share):
    """Asked for or not, widths fill the blocks that the machine computes at once: what is free is not cut."""
    model, timer = net(), hardware(block=8)
    for round_to in (1, 8):
        small = slivo.prune(model, X, keep=Budget(latency=share), round_to=round_to, timer=timer)
        assert 0.9 * share <= timer(small) / timer(model) <= share
        assert all(each.out_channels % 8 == 0 for each in small if isinstance(each, nn.Conv2d))


def test_hardware_that_is_slow_where_blocks_are_not_full():
    """Widths that fill blocks are so fast that more of them can stay than were found width by width."""
    plain, model = hardware(), nn.Sequential(*net(), nn.Unflatten(1, (10, 1, 1)), nn.Conv2d(10, 10, 1))

    def timer(each: nn.Module) -> float:
        ragged = sum(layer.out_channels % 16 > 0 for layer in each if isinstance(layer, nn.Conv2d))
        return plain(each) * 1.25**ragged

    small = slivo.prune(model, X, keep=Budget(latency=0.8), timer=timer)
    assert 0.9 * 0.8 <= timer(small) / timer(model) <= 0.8


def test_the_clock_may_be_noisy_and_drift():
    model, true = net(), hardware()
    generator, calls = np.random.default_rng(0), [0]

    def timer(each: nn.Module) -> float:
        calls[0] += 1
        return true(each) * (1 + 0.002 * calls[0]) * float(generator.normal(1, 0.02))

    small = slivo.prune(model, X, keep=Budget(latency=0.5), timer=timer)
    assert 0.46 <= true(small) / true(model) <= 0.51  # 0.475 to 0.5, and the noise of a median


def test_what_saves_time_is_cut():
    """Positions are as important everywhere, but those of one layer cost nothing on this machine."""

    def timer(model: nn.Module) -> float:
        return 1.0 + model[2].weight.shape[0]

    model = net()
    small = slivo.prune(model, X, keep=Budget(latency=0.5), timer=timer)
    assert (small[0].out_channels, small[4].out_channels) == (64, 80)
    assert 0.95 * 0.5 <= timer(small) / timer(model) <= 0.5


def test_all_entries_are_held():
    model, timer = net(), hardware()
    before = cost(model, X)
    for keep in (Budget(latency=0.6, macs=0.3), Budget(latency=0.3, macs=0.9), Budget(latency=0.5, bytes=0.5)):
        small = slivo.prune(model, X, keep=keep, timer=timer)
        after = cost(small, X)
        assert timer(small) <= keep.latency * timer(model)
        assert after.macs <= (keep.macs or 1) * before.macs
        assert after.size_bytes <= (keep.bytes or 1) * before.size_bytes


def test_what_is_fast_enough_is_left_alone():
    model, timer = net(), hardware()
    for keep in (Budget(latency=1.0), Budget(latency_ms=timer(model) + 1)):
        small = slivo.prune(model, X, keep=keep, timer=timer)
        assert [each.shape for each in small.parameters()] == [each.shape for each in model.parameters()]


def test_what_cannot_be_met_says_what_can():
    told = r"latency 5.0% asked for, .* ms \(\d\.\d% of 3\.6 ms\) is the least measured.*min_width"
    with pytest.raises(TargetError, match=told):
        slivo.prune(net(), X, keep=Budget(latency=0.05), timer=hardware())
    with pytest.raises(TargetError, match=r"latency 0\.001 ms asked for"):
        slivo.prune(net(), X, keep=Budget(latency_ms=0.001), timer=hardware())


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), None, "fast"])
def test_a_timer_that_is_none(value):
    with pytest.raises(SlivoError, match=r"the timer returned .*milliseconds"):
        slivo.prune(net(), X, keep=Budget(latency=0.5), timer=lambda model: value)


def test_the_clock_at_hand():
    """Without a timer PyTorch is timed; a whole budget needs no cut, whatever the clock says."""
    model = net().train()
    small = slivo.prune(model, X, keep=Budget(latency=1.0))
    assert small[0].out_channels == 64
    assert model.training


def test_latency_takes_a_model():
    graph = slivo.trace(net(), X)
    scores = {axis.name: np.ones(axis.size) for axis in graph.prunable}
    with pytest.raises(TargetError, match=r"measured on a model: use slivo\.prune"):
        allocate(graph, scores, Budget(latency=0.5))


def test_blocks_are_not_dropped_by_the_clock():
    model, x = build("ResNet")
    with pytest.raises(TargetError, match="for latency prune widths"):
        drop(model, x, keep=Budget(latency=0.5))


def test_curves_never_fall_and_axes_of_a_kind_share_one():
    """On a clock that is all noise, too; of like axes the share of all of them together is measured."""
    model, x = build("ResNet")
    graph = slivo.trace(model, x)
    groups = rank(graph, {axis.name: np.ones(axis.size) for axis in graph.prunable}, 0.1, 1)
    generator, timed = np.random.default_rng(0), []

    def time(gone):
        timed.append(tuple(gone))
        return compare(lambda _: float(generator.uniform(1, 2)), model, model)

    found = curves(graph, groups, time)
    assert len(found) == len(groups)
    assert len(set(timed)) == len(timed) <= 3 * len(groups)
    for group, curve in zip(groups, found, strict=True):
        values = curve(np.arange(group.least, group.size + 1.0))
        assert (np.diff(values) >= 0).all()
        assert values[-1] == 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data(), st.lists(st.floats(0.01, 0.2), min_size=2, max_size=60))
def test_the_search_is_right_however_wrong_the_table(data, falls):
    """What comes out is fast enough if anything is, and either close to the target or the first that is."""
    true = 1.5 * np.exp(-np.cumsum([0.0, *falls]))
    wrong = np.exp(-np.cumsum([0.0, *data.draw(st.lists(st.floats(0, 0.3), min_size=len(falls), max_size=len(falls)))]))
    asked = []

    def measure(number: int) -> float:
        asked.append(number)
        return float(true[number])

    number = _search(0, len(falls), lambda each: float(wrong[each]), measure)
    assert true[number] <= 1 or number == len(falls)
    assert true[number] >= 0.95 or true[number - 1] > 1
    assert len(asked) == len(set(asked)) <= 2 * np.log2(len(falls)) + 4
