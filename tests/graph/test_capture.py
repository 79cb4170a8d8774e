from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from torch import fx, nn

import slivo
from slivo.errors import CaptureError
from slivo.graph.capture import canonical_names, capture, evaluating
from slivo.graph.inputs import Call, as_args, describe
from slivo.graph.sparing import collecting_rarely, sparing


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x, *, scale=None, flag=True):
        x = self.linear(x)
        return {"out": x * scale if scale is not None and flag else x}


def test_the_graph_is_called_as_the_model_is():
    model = Keywords()
    call = Call((torch.randn(2, 3),), {"scale": torch.ones(2, 1), "flag": True})
    graph = capture(model, call).graph
    assert torch.equal(graph(*call.args, **call.kwargs)["out"], model(*call.args, **call.kwargs)["out"])


def test_modes_and_gradients_are_as_before():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout()).train()
    model[1].eval()
    capture(model, torch.randn(2, 3))
    assert model.training
    assert model[0].training
    assert not model[1].training
    assert all(parameter.grad is None for parameter in model.parameters())


class Cache:
    """An output that PyTorch cannot take apart, as the keys and values of a language model."""


class Generator(nn.Module):
    """Gives out what it would go on from, unless it is told not to, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)
        self.inner = nn.Linear(3, 4)
        self.inner.config = self.config

    def forward(self, x):
        x = self.inner(x)
        return (x, Cache()) if self.config.use_cache else (x,)


def test_caches_of_generation_are_no_outputs():
    model, x = Generator(), torch.randn(2, 3)
    assert torch.equal(capture(model, x).graph(x)[0], model(x)[0])
    assert model.config.use_cache is True
    model.config.use_cache = None
    with evaluating(model):
        assert model.config.use_cache is None


def test_modes_come_back_after_an_error():
    model = nn.Linear(3, 3).train()
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert model.training


def test_inputs_that_the_model_rejects_are_named():
    with pytest.raises(CaptureError, match=r"Linear fails on the example inputs \(float32\[2, 4\]\).*shapes"):
        slivo.trace(nn.Linear(3, 3), torch.randn(2, 4))


def test_what_only_the_capture_rejects_is_told_apart():
    class Outside(nn.Module):
        def forward(self, x):
            return torch.from_numpy(x.numpy() + 1)

    with pytest.raises(CaptureError, match="cannot be captured as a graph"):
        slivo.trace(Outside(), torch.randn(2, 4))


def test_code_that_asks_for_values_takes_the_way_of_the_example(caplog):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.first(x)
            return self.last(x if x.square().sum() > 0 else -x)

    graph = slivo.trace(Branch(), torch.randn(2, 4))
    assert [axis.name for axis in graph.prunable] == ["first out"]
    assert "asks for values" in caplog.text


class Fork(nn.Module):
    """One of two layers, by the sign of what the first one gives."""

    def __init__(self):
        super().__init__()
        self.first, self.yes, self.no = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x):
        x = self.first(x)
        return self.yes(x) if x.sum() > 0 else self.no(x)


@pytest.mark.parametrize("seed", range(6))
def test_the_way_of_the_example_is_taken_and_no_other(seed):
    torch.manual_seed(seed)
    model, x = Fork().eval(), torch.randn(2, 4)
    assert torch.equal(capture(model, x).graph(x), model(x))


def test_code_that_the_example_does_not_reach_is_not_cut_away_from():
    graph = slivo.trace(Fork(), torch.randn(2, 4))
    assert graph.prunable == ()
    assert "do not reach all of the parameters" in graph["first out"].fixed


def test_tied_weights_have_one_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert canonical_names(model)["1.weight"] == "0.weight"


def test_as_args_takes_calls_and_lists():
    assert as_args(Call((1,), {"x": 2})) == ((1,), {"x": 2})
    assert as_args([1, 2]) == ((1, 2), {})


def test_describe():
    assert describe((torch.zeros(1, 2), 3), {"flag": True}) == "float32[1, 2], int, flag=bool"


def test_graph_modules_made_during_an_export_are_compiled_when_they_are_called():
    """PyTorch's passes and models that trace themselves may run what they made."""
    with sparing():
        traced = fx.symbolic_trace(nn.Linear(2, 3))
        assert traced(torch.zeros(4, 2)).shape == (4, 3)
    assert traced(torch.zeros(5, 2)).shape == (5, 3)


@pytest.mark.parametrize("threshold", [(700, 10, 10), (0, 10, 10), (900_000, 5, 5)])
def test_garbage_is_looked_for_as_before_once_a_graph_is_made(threshold):
    before = gc.get_threshold()
    try:
        gc.set_threshold(*threshold)
        with collecting_rarely():
            assert gc.get_threshold()[0] in (0, 200_000, 900_000)
        assert gc.get_threshold() == threshold
        with pytest.raises(CaptureError):
            capture(nn.Linear(2, 3), torch.zeros(1, 5))
        assert gc.get_threshold() == threshold
    finally:
        gc.set_threshold(*before)
