"""Edits are data: what is written is what is read, and replaying them gives the model again."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from slivo import edits
from slivo.edits import Cut
from slivo.errors import ArtifactError, ShapeError
from slivo.graph.program import Program, Rewrite

INDICES = st.lists(st.integers(0, 60), unique=True, min_size=1).map(sorted)


@given(st.dictionaries(st.text(max_size=5), st.dictionaries(st.integers(0, 3), INDICES, max_size=2), max_size=3))
def test_cuts_survive_json(slices):
    cut = Cut(
        slices=slices,
        attributes={"a": {"out_channels": 3, "normalized_shape": [3, 4]}},
        axes={"a out": [0, 2, 3]},
        programs={"": Program([[{"tensor": "float32", "shape": [2]}], {}], (Rewrite("", "view", (1, 0), 4, 6),))},
    )
    assert edits.from_json(json.loads(json.dumps(edits.to_json([cut])))) == (cut,)


def test_consecutive_indices_are_stored_as_runs():
    assert Cut({"w": {0: [0, 1, 2, 5, 6]}}).to_json()["keep"] == [[[0, 3], [5, 7]]]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"kind": "melt"}, r"edits\[0\] has kind 'melt'; known are cut.*newer slivo"),
        ({"kind": "cut"}, r"edits\[0\] \(cut\) is malformed"),
        ({"kind": "cut", "keep": [[[0]]], "slices": {}, "attributes": {}, "axes": {}}, "malformed"),
    ],
)
def test_malformed_edits_are_told(data, told):
    with pytest.raises(ArtifactError, match=told):
        edits.from_json([data])


def net():
    return nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))


CUT = Cut({"0.weight": {0: [0, 2]}, "0.bias": {0: [0, 2]}, "1.weight": {1: [0, 2]}}, {"0": {"out_features": 2}})


def test_apply_leaves_the_model_and_keeps_the_record():
    model = net()
    small = edits.apply(model, CUT)
    assert model[0].out_features == 4
    assert edits.record(model) == ()
    assert edits.record(copy.deepcopy(small)) == (CUT,)
    assert small[0].out_features == 2


def test_replay_works_without_numbers():
    with torch.device("meta"):
        skeleton = net()
    assert edits.replay(skeleton, [CUT])[0].weight.shape == (2, 2)


@pytest.mark.parametrize(
    "cut",
    [
        Cut({"0.weight": {0: [0, 9]}}),
        Cut({"0.weight": {5: [0]}}),
        Cut({"9.weight": {0: [0]}}),
        Cut({}, {"9": {"out_features": 2}}),
    ],
)
def test_a_cut_that_does_not_fit_changes_nothing(cut):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ShapeError):
        cut.apply_(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_are_cut_with_their_parameters():
    model = net()
    model(torch.randn(3, 2)).sum().backward()
    wanted = model[0].weight.grad[[0, 2]].clone()
    CUT.apply_(model)
    assert torch.equal(model[0].weight.grad, wanted)
