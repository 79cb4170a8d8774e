"""Pruning as a user calls it."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from zoo import build

import slivo
from slivo import edits
from slivo.errors import CaptureError, SlivoError
from slivo.prune import criteria, select


def small_net():
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))


def test_the_model_is_left_untouched():
    model = small_net().train()
    before = copy.deepcopy(model.state_dict())
    small = slivo.prune(model, torch.randn(2, 6), keep=slivo.Budget(macs=0.5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert edits.record(model) == ()
    assert [edit.kind for edit in edits.record(small)] == ["cut"]
    assert small.training


def test_modules_say_their_new_sizes():
    small = slivo.prune(small_net(), torch.randn(2, 6), keep=slivo.Budget(params=0.5))
    assert (small[0].out_features, small[2].in_features) == (small[0].weight.shape[0], small[2].weight.shape[1])
    assert small[0].in_features == 6
    assert small[4].out_features == 4


def test_only_and_exclude():
    model, x = small_net(), torch.randn(2, 6)
    graph = slivo.trace(model, x)
    assert [axis.name for axis in select(graph, only=["0"])] == ["0 out"]
    assert [axis.name for axis in select(graph, only=["2 out"])] == ["2 out"]
    assert [axis.name for axis in select(graph, exclude=["4"])] == ["0 out"]
    assert [axis.name for axis in select(graph)] == ["0 out", "2 out"]
    small = slivo.prune(model, x, keep=slivo.Budget(macs=0.8), only=["0"])
    assert small[2].out_features == 30


def test_a_parent_module_means_all_below_it():
    model, x = build("ResNet")
    graph = slivo.trace(model, x)
    assert {axis.name for axis in select(graph, only=["layers.0"])} >= {"layers.0.conv1 out"}
    assert not any("layers.0" in axis.name for axis in select(graph, exclude=["layers.0"]))


def test_globs_that_match_nothing_are_told():
    with pytest.raises(SlivoError, match="'layer9' matches no axis and no module; there are 0, 2, 4"):
        slivo.prune(small_net(), torch.randn(2, 6), keep=slivo.Budget(macs=0.5), only=["layer9"])


def test_nothing_left_to_cut_says_why():
    with pytest.raises(SlivoError, match=r"no axis of the model may be cut.*output of the network"):
        slivo.prune(nn.Linear(3, 3), torch.randn(2, 3), keep=slivo.Budget(macs=0.5))


def test_inputs_that_do_not_fit():
    with pytest.raises(CaptureError, match="fails on the example inputs"):
        slivo.prune(small_net(), torch.randn(2, 5), keep=slivo.Budget(macs=0.5))


def test_a_criterion_of_ones_own():
    """The last half goes: scores fall with the position."""
    falling = criteria.Criterion(lambda weights: -torch.arange(len(weights)).double(), on="all", relative=False)
    small = slivo.prune(small_net(), torch.randn(2, 6), keep=slivo.Budget(macs=0.5), criterion=falling)
    (cut,) = edits.record(small)
    assert all(kept == list(range(len(kept))) for kept in cut.axes.values())


def test_frozen_parameters_stay_frozen():
    model = small_net()
    model[0].requires_grad_(False)
    small = slivo.prune(model, torch.randn(2, 6), keep=slivo.Budget(macs=0.5))
    assert not small[0].weight.requires_grad
    assert small[2].weight.requires_grad


def test_tied_weights_stay_tied():
    model, tokens = build("Transformer")
    small = slivo.prune(model, tokens, keep=slivo.Budget(params=0.6))
    assert small.head.weight is small.embed.weight
    assert small.embed.embedding_dim == small.embed.weight.shape[1]


def test_attention_in_ones_own_code_is_mended(caplog):
    model, tokens = build("Transformer")
    small = slivo.prune(model, tokens, keep=slivo.Budget(params=0.6))
    assert not [record for record in caplog.records if record.name == "slivo"]
    assert type(small) is type(model)
    assert small.attention.heads * small.attention.head_dim == small.attention.out.in_features


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # PyTorch's own, when a graph module is copied
def test_sizes_in_the_code_bring_the_captured_graph_and_a_warning(caplog):
    model, x = build("HardCoded")
    with caplog.at_level(logging.WARNING, "slivo"):
        small = slivo.prune(model, x, keep=slivo.Budget(params=0.6))
    assert "the code of HardCoded holds sizes that cannot be mended" in caplog.text
    assert isinstance(small, torch.fx.GraphModule)
    assert small(torch.randn(7, 3, 4, 4).double()).shape == (7, 3)  # any batch, though it was traced with 2
    twice = slivo.prune(small, x, keep=slivo.Budget(params=0.7))
    assert len(edits.record(copy.deepcopy(twice))) == 2


def test_pruning_twice_adds_up():
    model, x = small_net(), torch.randn(2, 6)
    half = slivo.prune(slivo.prune(model, x, keep=slivo.Budget(macs=0.7)), x, keep=slivo.Budget(macs=0.7))
    assert len(edits.record(half)) == 2
    again = edits.replay(small_net(), edits.record(half))
    again.load_state_dict(half.state_dict())
    assert torch.equal(again(x), half(x))
