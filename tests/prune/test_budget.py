"""Budgets are hit, floors are kept, and what cannot be met is told."""

from __future__ import annotations

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
from slivo.prune import Budget, allocate
from slivo.prune.ranks import alike


@pytest.fixture(scope="module")
def graph():
    layers = [nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 48, 3), nn.ReLU(), nn.Conv2d(48, 80, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(80, 10))
    return slivo.trace(model, torch.randn(2, 3, 8, 8))


@pytest.fixture(scope="module")
def staged():
    return slivo.trace(Stages(), torch.randn(2, 3, 6, 6))


def scores(graph, seed):
    generator = np.random.default_rng(seed)
    return {axis.name: generator.random(axis.size) for axis in graph.prunable}


def left(graph, kept):
    sizes = {axis: len(stays) for axis, stays in kept.items()}
    macs, params = graph.count(sizes)
    return {"macs": macs, "params": params, "bytes": graph.count_bytes(sizes)}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.floats(0.15, 0.95),
    st.integers(0, 99),
    st.sampled_from(["macs", "params", "bytes"]),
    st.sampled_from(["global", "uniform", "isomorphic"]),
)
def test_budgets_are_hit_within_one_percent(graph, share, seed, what, scope):
    kept = allocate(graph, scores(graph, seed), Budget(**{what: share}), scope=scope)
    found = left(graph, kept)[what] / left(graph, {})[what]
    assert share * 0.99 - 0.002 <= found <= share
    assert all(len(stays) >= 0.1 * graph[axis].size for axis, stays in kept.items())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.floats(0.3, 0.9), st.integers(0, 99))
def test_the_most_important_stay(graph, share, seed):
    given_scores = scores(graph, seed)
    for axis, stays in allocate(graph, given_scores, Budget(macs=share)).items():
        gone = sorted(set(range(graph[axis].size)) - set(stays))
        assert stays == sorted(stays)
        assert given_scores[axis][stays].min() >= given_scores[axis][gone].max()


@pytest.mark.parametrize("round_to", [4, 8, 16])
def test_sizes_are_rounded(graph, round_to):
    kept = allocate(graph, scores(graph, 0), Budget(macs=0.5), round_to=round_to)
    assert kept
    assert all(len(stays) % round_to == 0 for stays in kept.values())


def test_uniform_keeps_the_same_share_everywhere(graph):
    kept = allocate(graph, scores(graph, 0), Budget(macs=0.5), scope="uniform")
    shares = [len(stays) / graph[axis].size for axis, stays in kept.items()]
    assert max(shares) - min(shares) < 0.04


class Stages(nn.Module):
    """Two stages of residual blocks, the second one wider: like axes in both."""

    def __init__(self):
        super().__init__()
        self.stem = nn.ModuleList([nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 1)])
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.ReLU(), nn.Conv2d(2 * width, width, 3, padding=1))
            for width in (16, 16, 32, 32)
        )
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            x = self.stem[index // 2](x) if index % 2 == 0 else x
            x = x + block(x)
        return self.head(x.mean((2, 3)))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.floats(0.3, 0.9), st.integers(0, 99), st.sampled_from(["macs", "params"]))
def test_classes_of_like_axes_lose_the_same_share(staged, share, seed, what):
    """However the scores of one class compare with those of another."""
    classes = [[axis.name for axis in staged.prunable if ("blocks" in axis.name) is inner] for inner in (True, False)]
    given_scores = scores(staged, seed)
    for name in classes[0]:
        given_scores[name] = given_scores[name] * 1e6
    kept = allocate(staged, given_scores, Budget(**{what: share}), scope="isomorphic", min_width=1)
    macs, params = staged.count({axis: len(stays) for axis, stays in kept.items()})
    found = macs / staged.macs if what == "macs" else params / staged.params
    assert share * 0.97 - 0.002 <= found <= share
    sizes = {axis.name: len(kept.get(axis.name, range(axis.size))) for axis in staged.prunable}
    shares = [sum(sizes[name] for name in names) / sum(staged[name].size for name in names) for names in classes]
    assert abs(shares[0] - shares[1]) < 0.05
    for name, stays in kept.items():
        gone = sorted({*range(staged[name].size)} - {*stays})
        assert given_scores[name][gone].max() <= given_scores[name][stays].min()


def test_like_axes_compete(staged):
    """In a class the least important go first, whichever axis they are on."""
    first, *others = [axis.name for axis in staged.prunable if "blocks" in axis.name]
    assert len(others) == 3
    assert {alike(staged, staged[name]) for name in others} == {alike(staged, staged[first])}
    given_scores = scores(staged, 0)
    given_scores[first] = given_scores[first] / 1e6
    kept = allocate(staged, given_scores, Budget(macs=0.6), scope="isomorphic", min_width=1)
    assert len(kept[first]) == 1


def test_absolute_counts_and_all_at_once(graph):
    whole = left(graph, {})
    for limits in ({"macs": 400_000, "params": 20_000}, {"bytes": 50_000}, {"bytes": 90_000, "macs": 300_000}):
        found = left(graph, allocate(graph, scores(graph, 0), Budget(**limits)))
        assert all(found[name] <= limit < whole[name] for name, limit in limits.items())
        assert any(found[name] > 0.97 * limit for name, limit in limits.items())


def test_bytes_follow_the_dtype():
    """Half of the bytes is half of the parameters, whatever they are stored in, but for what the header takes."""
    layers = [nn.Linear(64, 256, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    for layer in layers:
        model = nn.Sequential(layer, nn.ReLU(), nn.Linear(256, 8, dtype=layer.weight.dtype))
        x = torch.randn(2, 64, dtype=layer.weight.dtype)
        small = slivo.prune(model, x, keep=Budget(bytes=0.5))
        assert cost(small, x).size_bytes <= 0.5 * cost(model, x).size_bytes
        assert 125 <= small[0].out_features <= 128


def test_widths_have_limits_of_their_own(graph):
    """The first glob that matches decides; where none does it is a tenth, and never is a layer gone."""
    tiny = {"0": 1e-9, "2": 1e-6, "4": 1.0}
    given_scores = {axis.name: np.full(axis.size, tiny[axis.name[0]]) for axis in graph.prunable}

    def sizes(min_width, macs=0.2, **options):
        kept = allocate(graph, given_scores, Budget(macs=macs), min_width=min_width, **options)
        return [len(kept.get(name, range(graph[name].size))) for name in ("0 out", "2 out", "4 out")]

    assert sizes(0.1)[0] == 7
    assert 32 <= sizes({"0": 0.5})[0] <= 33  # what is left of the budget is given back
    assert sizes({"0 out": 20, "*": 0.25})[0] == 20
    assert sizes({"2": 1.0})[1] == 48
    assert sizes({"*": 0.25, "0": 0.5})[0] == 16
    assert sizes({"0": 0}, macs=0.03)[0] == 1
    assert sizes({"0": 0.3, "*": 0.1}, round_to=8)[0] == 24


def test_of_tied_axes_the_most_demanding_decides():
    model, x = build("Shuffle")
    graph = slivo.trace(model, x)
    first, *others = sorted(graph.ties[0])
    assert set(graph.ties[0]) <= set(allocate(graph, scores(graph, 1), Budget(params=0.6), min_width=1))
    kept = allocate(graph, scores(graph, 1), Budget(params=0.9), min_width={first: 1.0, "*": 1})
    assert others
    assert not set(graph.ties[0]) & set(kept)


@pytest.mark.parametrize("keep", [0.001, 0.02])
def test_what_cannot_be_met_says_what_can(graph, keep):
    with pytest.raises(TargetError, match=r"cannot be met: MACs .* asked for, .*% of .* is the least.*min_width"):
        allocate(graph, scores(graph, 0), Budget(macs=keep))


@pytest.mark.parametrize("value", [0, 0.0, -1, 1.5, True, "half"])
@pytest.mark.parametrize("what", ["macs", "params", "bytes", "latency"])
def test_impossible_budgets(what, value):
    with pytest.raises(TargetError, match=rf"{what} is .* share above 0 and up to 1\.0"):
        Budget(**{what: value})


@pytest.mark.parametrize("value", [0, -1.0, True, float("inf"), float("nan"), "2 ms"])
def test_impossible_milliseconds(value):
    with pytest.raises(TargetError, match=r"latency_ms is .*; milliseconds, a number above 0"):
        Budget(latency_ms=value)


def test_milliseconds_are_not_taken_for_a_share():
    with pytest.raises(TargetError, match=r"latency is 3; .* milliseconds as latency_ms"):
        Budget(latency=3)
    with pytest.raises(TargetError, match="latency, a share, and latency_ms, milliseconds; give one"):
        Budget(latency=0.5, latency_ms=3)
    assert Budget(latency_ms=3).timed
    assert not Budget(bytes=3).timed


def test_a_budget_needs_something():
    with pytest.raises(TargetError, match="needs macs"):
        Budget()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"round_to": 0}, "round_to is 0"),
        ({"min_width": -1}, "min_width is -1"),
        ({"min_width": {"*": 1.5}}, r"min_width of '\*' is 1.5; a share"),
        ({"min_width": {0: 0.5}}, "min_width has the key 0; a glob"),
        ({"min_width": {"1": 0.5}}, "min_width: '1' matches no axis and no module that writes one; there are 0, 2, 4"),
        ({"scope": "best"}, "'best'"),
    ],
)
def test_options_out_of_range(graph, options, told):
    with pytest.raises(SlivoError, match=told):
        allocate(graph, scores(graph, 0), Budget(macs=0.5), **options)
