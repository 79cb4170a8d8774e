"""The share stage: few values that every training after it keeps, and a run that goes on after a kill."""

from __future__ import annotations

import pytest
import torch
import toys

import slivo
from slivo import edits
from slivo.errors import RecipeError
from slivo.recipe import load, run
from slivo.share import shared

TARGET = {"max_drop": 1.0}


@pytest.mark.parametrize("part", [{"clusters": 4}, {"clusters": {"head*": 2, "*": 5}, "weighed": True, "samples": 32}])
def test_values_come_and_are_trained(part, tmp_path):
    before = [{"sparsify": {"sparsity": 0.5}}, {"share": part}]
    start = run(load(toys.recipe(*before, target=TARGET)), tmp_path / "start").model
    stages = [*before, {"distill": toys.KD}, {"finetune": {"epochs": 1}}]
    model = run(load(toys.recipe(*stages, target=TARGET)), tmp_path / "run").model
    assert isinstance(edits.record(model)[-1], edits.Share)
    again = slivo.load(tmp_path / "run" / "student")
    first = dict(start.named_parameters())
    for name, one in shared(model).items():
        weight, old = again.get_parameter(name), first[name]
        assert len(weight[weight != 0].unique()) <= one.values
        assert torch.equal(weight == 0, old == 0)
        assert not torch.equal(weight, old)


def test_powers_of_two_are_not_trained(tmp_path):
    stages = [{"share": {"clusters": 6, "codebook": "powers-of-two"}}, {"finetune": {"epochs": 1}}]
    model = run(load(toys.recipe(*stages, target=TARGET)), tmp_path / "run").model
    values = model.head.weight[model.head.weight != 0].abs().log2()
    assert torch.equal(values, values.round())


def test_what_shares_values_can_become_integers(tmp_path):
    stages = [{"share": {"clusters": 8}}, {"quantize": {}}]
    model = run(load(toys.recipe(*stages, target=TARGET)), tmp_path / "run").model
    assert any(name.endswith("weight_codes") for name in model.state_dict())
    assert [edit.kind for edit in edits.record(model)] == ["share", "quantize"]


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ([{"share": {"clusters": 0}}], r"stages\[0\]\.share\.clusters"),
        ([{"share": {"clusters": 3, "codebook": "powers-of-two"}}], "clusters is odd; half of the powers of two"),
        ([{"share": {"init": "best"}}], r"share\.init is 'best'; linear, density or quantile"),
        ([{"share": {}}, {"sparsify": {"sparsity": 0.5}}], "comes after share; .* put sparsify before it"),
        ([{"share": {}}, {"prune": {"keep": {"macs": 0.5}}}], "comes after share; .* put prune before it"),
    ],
)
def test_what_is_not_valid_is_told(stages, told):
    with pytest.raises(RecipeError, match=told):
        load(toys.recipe(*stages, target=TARGET))
