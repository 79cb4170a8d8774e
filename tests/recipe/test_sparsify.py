"""The sparsify stage: zeros as asked for, kept by every training after it, and a run that says how many."""

from __future__ import annotations

import json

import pytest
import torch
import toys

import slivo
from slivo import edits
from slivo.errors import RecipeError
from slivo.prune import sparsity
from slivo.recipe import load, run

TARGET = {"max_drop": 1.0}


@pytest.mark.parametrize(
    ("part", "share"),
    [
        ({"sparsity": 0.75, "criterion": "taylor", "samples": 32}, 0.75),
        ({"pattern": "2:4", "permute": True}, 0.5),
    ],
)
def test_zeros_come_and_stay(part, share, tmp_path):
    stages = [{"sparsify": part}, {"distill": toys.KD}, {"finetune": {"epochs": 1}}]
    model = run(load(toys.recipe(*stages, target=TARGET)), tmp_path / "run").model
    assert isinstance(edits.record(model)[-1], edits.Mask)
    assert sparsity(model) == share
    assert sparsity(slivo.load(tmp_path / "run" / "student")) == share
    stage = json.loads((tmp_path / "run" / "run.json").read_text())["stages"][1]
    assert stage["details"]["sparsity"] == share


def test_random_choices_are_those_of_the_runs_seed(tmp_path):
    recipe = load(toys.recipe({"sparsify": {"sparsity": 0.5, "criterion": "random"}}, target=TARGET))
    one, other = (run(recipe, tmp_path / name).model for name in "ab")
    assert torch.equal(one.head.weight, other.head.weight)


def test_zeros_are_zeros_as_integers(tmp_path):
    stages = [{"prune": {"keep": {"macs": 0.6}}}, {"sparsify": {"sparsity": 0.8}}, {"quantize": {}}]
    model = run(load(toys.recipe(*stages, target=TARGET)), tmp_path / "run").model
    codes = [value for name, value in model.state_dict().items() if name.endswith("weight_codes")]
    assert codes
    assert sum(int((each == 0).sum()) for each in codes) >= 0.8 * sum(each.numel() for each in codes) - 1


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({}, r"stages\[0\]\.sparsify is not valid: pattern 'unstructured' needs a sparsity"),
        ({"sparsity": 1.5}, r"stages\[0\]\.sparsify\.sparsity is 1\.5; a share of zeros"),
        ({"pattern": "two of four"}, "is not valid: pattern is 'two of four'"),
        ({"sparsity": 0.5, "criterion": "lump"}, r"criterion is 'lump'; one of: .*Did you mean lamp"),
        ({"sparsity": 0.5, "criterion": "obs"}, "is not valid: criterion 'obs' scores whole channels"),
        ({"sparsity": 0.5, "permute": True}, r"sparsify\.permute is for N:M patterns"),
    ],
)
def test_what_is_not_valid_is_told(part, told):
    with pytest.raises(RecipeError, match=told):
        load(toys.recipe({"sparsify": part}, target=TARGET))
