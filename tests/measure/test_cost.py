"""Costs agree with the graph's count, with formulas, and with the file that is written."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import ZOO, build

import slivo
from slivo.graph import trace
from slivo.measure import Cost, cost
from slivo.quantize import quantize


@pytest.mark.parametrize("name", sorted(ZOO))
def test_costs_are_those_of_the_graph(name):
    model, inputs = build(name)
    graph = trace(model, inputs)
    found = cost(model, inputs)
    assert (found.macs, found.params) == (graph.macs, graph.params)
    assert found.size_bytes == graph.count_bytes({})


def test_products_that_pytorch_does_not_count():
    pair = torch.ones(5, 3), torch.ones(5, 4)
    assert cost(nn.Bilinear(3, 4, 6), pair).macs == 3 * 4 * 6
    experts = nn.Module()
    experts.weight = nn.Parameter(torch.ones(2, 8, 16, dtype=torch.bfloat16))
    experts.forward = lambda x: torch._grouped_mm(x, experts.weight, torch.tensor([3, 8], dtype=torch.int32))
    assert cost(experts, torch.ones(8, 8, dtype=torch.bfloat16)).macs == 8 * 16


def test_a_parameter_may_be_an_argument_of_a_module():
    class Scale(nn.Module):
        def forward(self, x, scale):
            return x @ scale

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = Scale(), nn.Parameter(torch.ones(3, 3))

        def forward(self, x):
            return self.inner(x, self.scale)

    model = Outer()
    assert cost(model, torch.ones(2, 3)).macs == 9
    assert model.scale.requires_grad


def test_formulas():
    assert cost(nn.Conv2d(4, 6, 3, groups=2), torch.ones(5, 4, 8, 8)).macs == 6 * 6 * 6 * 2 * 9
    assert cost(nn.LSTM(3, 4, batch_first=True), torch.ones(2, 7, 3)).macs == 7 * 4 * 4 * (3 + 4)
    assert (
        cost(nn.MultiheadAttention(8, 2), {k: torch.ones(5, 1, 8) for k in ("query", "key", "value")}).macs
        == ((3 + 1) * 5 * 8 * 8 + 2 * 5 * 5 * 8) // 5
    )  # the first dimension is taken for the batch
    assert cost(nn.Flatten(0), torch.tensor(1.0)) == Cost(0, 0, 8 + 8)


def test_the_size_is_that_of_the_saved_tensors(tmp_path):
    model, inputs = build("Transformer")
    slivo.save(model, tmp_path / "model")
    assert cost(model, inputs).size_bytes == (tmp_path / "model" / "model.safetensors").stat().st_size


def test_quantized_layers_count():
    x = torch.ones(4, 8)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))
    before, after = cost(model, x), cost(quantize(model, batches=[x]), x)
    assert (after.params, after.macs) == (before.params, before.macs)
    assert after.params == 8 * 16 + 16 + 16 * 4


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()).train()
    cost(model, torch.ones(2, 3))
    assert model.training
    assert int(model[0].num_batches_tracked) == 0
    assert torch.backends.mkldnn.enabled
    assert torch.backends.mha.get_fastpath_enabled()
