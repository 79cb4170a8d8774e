"""The factorize stage: thin layers to a budget or an energy, trained and saved like any other network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toys

import slivo
from slivo import edits
from slivo.errors import RecipeError
from slivo.recipe import load, run

TARGET = {"max_drop": 1.0}


@pytest.mark.parametrize(
    "part",
    [
        {"keep": {"params": 0.7}, "samples": 48},
        {"energy": 0.7, "samples": 0, "method": "channel", "exclude": ["head"]},
        {"keep": {"macs": 0.7, "latency_ms": 1e4}, "by": "sensitivity", "samples": 32},
    ],
)
def test_a_network_is_factorized_trained_and_saved(part: dict[str, Any], tmp_path: Path) -> None:
    stages = [{"factorize": part}, {"distill": toys.KD}]
    model = run(load(toys.recipe(*stages, target=TARGET)), tmp_path / "run").model
    (edit,) = edits.record(model)
    assert isinstance(edit, edits.Factorize)
    assert edit.modules
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for what, share in part.get("keep", {}).items():
        assert what == "latency_ms" or summary["student"][what] <= share * summary["teacher"][what]
    x = torch.randn(4, 12)
    assert torch.equal(slivo.load(tmp_path / "run" / "student")(x), model(x))
    stage = json.loads((tmp_path / "run" / "run.json").read_text())["stages"][1]
    assert stage["details"]["layers"] == len(edit.modules)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({}, r"stages\[0\]\.factorize needs keep, .* or energy, .*; one of them"),
        ({"keep": {"macs": 0.5}, "energy": 0.9}, "needs keep, .* or energy"),
        ({"keep": {}}, r"factorize\.keep is empty"),
        ({"keep": {"latency": 0.5, "latency_ms": 1.0}}, r"factorize\.keep has latency, a share, and latency_ms"),
        ({"energy": 1.0}, r"factorize\.energy is 1\.0; a share between 0 and 1"),
        ({"energy": 0.9, "method": "svd"}, r"method is 'svd'; auto, channel"),
        ({"energy": 0.9, "samples": -1}, r"samples is -1; a whole number; 0 for"),
        ({"energy": 0.9, "by": "sensitivity"}, r"factorize\.by is sensitivity, which measures on samples"),
        ({"keep": {"macs": 0.5}, "samples": 0, "by": "sensitivity"}, r"factorize\.by is sensitivity"),
    ],
)
def test_what_cannot_be_is_told_before_anything_runs(part: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load(toys.recipe({"factorize": part}, target=TARGET))


def test_integers_are_not_factorized() -> None:
    with pytest.raises(RecipeError, match="comes after quantize"):
        load(toys.recipe({"quantize": {}}, {"factorize": {"energy": 0.9}}, target=TARGET))
