"""An inspection is the cost, the graph's share and a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import build

import slivo
from slivo.errors import CaptureError
from slivo.graph import trace
from slivo.measure import cost
from slivo.quantize import quantize


def test_an_inspection_agrees_with_its_parts():
    model, inputs = build("ResNet")
    model.train()
    seen = slivo.inspect(model, inputs)
    counted = cost(model, inputs)
    assert (seen.params, seen.macs, seen.bytes) == (counted.params, counted.macs, counted.size_bytes)
    assert seen.prunable_macs == trace(model, inputs).prunable_macs
    assert seen.latency_ms > 0
    assert model.training


def test_nothing_of_a_quantized_model_can_be_pruned():
    x = torch.ones(4, 8)
    net = quantize(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), batches=[x])
    seen = slivo.inspect(net, x)
    assert seen.prunable_macs == 0
    assert seen.macs == 8 * 16 + 16 * 4


def test_wrong_inputs_are_explained():
    with pytest.raises(CaptureError, match="fails on the example inputs"):
        slivo.inspect(nn.Linear(3, 2), torch.ones(2, 4))
