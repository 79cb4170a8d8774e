"""Latency counts calls and orders percentiles; how long they take is the machine's affair."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from slivo.errors import SlivoError
from slivo.measure import clock, latency


def test_every_call_is_made_and_percentiles_are_ordered():
    seen = []
    p50, p95 = latency(lambda: seen.append(gc.isenabled()), repeats=7, warmup=3)
    assert len(seen) == 10
    assert not any(seen[3:])
    assert gc.isenabled()
    assert 0 < p50 <= p95


def test_the_garbage_collector_stays_as_it_was():
    gc.disable()
    try:
        latency(lambda: None, repeats=1, warmup=0)
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(ZeroDivisionError):
        latency(lambda: 1 / 0, repeats=1, warmup=0)
    assert gc.isenabled()


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_nothing_to_time(repeats, warmup):
    with pytest.raises(SlivoError, match="at least 1 and 0"):
        latency(lambda: None, repeats=repeats, warmup=warmup)


@pytest.mark.parametrize(("lasting", "calls"), [(1e-3, 2 + 3), (1e9, 2 + 100)])
def test_a_clock_calls_the_model_as_often_as_the_time_allows(lasting, calls):
    seen = []

    class Net(nn.Linear):
        def forward(self, x, scale):
            seen.append((self.training, torch.is_grad_enabled()))
            return super().forward(x) * scale

    model = Net(3, 4).train()
    assert clock({"x": torch.ones(2, 3), "scale": 2.0}, lasting_ms=lasting)(model) > 0
    assert seen == [(False, False)] * calls
    assert model.training
