"""The quantize stage: what prepares for the rounding, and a training with it that can be killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from toys import Killed, Killer, read, same, timeless

import slivo
from slivo import edits
from slivo.errors import RecipeError
from slivo.recipe import Result, load, run

TARGET = {"max_drop": 1.0}
AWARE = {"quantize": {"aware": {**toys.KD, "epochs": 4}}}


def outcome(folder: Path, stage: dict[str, Any], **options: Any) -> Result:
    return run(load(toys.recipe(stage, target=TARGET)), folder, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return outcome(tmp_path_factory.mktemp("aware") / "run", AWARE)


def test_a_teacher_guides_a_training_with_the_rounding(trained: Result) -> None:
    book, rows, summary = read(trained.folder)
    assert [(row["stage"], row["epoch"]) for row in rows if row["stage"]] == [(1, 1), (1, 2), (1, 3), (1, 4)]
    assert "kd" in rows[-1]["terms"]
    assert "losses" in book["stages"][1]["details"]["aware"]
    assert [edit.kind for edit in edits.record(trained.model)] == ["quantize"]
    assert summary["student"]["accuracy"] > 0.9
    plain = slivo.quantize(slivo.load(trained.folder / "teacher"), batches=[torch.randn(8, 12)])
    assert not torch.equal(plain.head.weight_codes, trained.model.head.weight_codes)


@pytest.mark.parametrize("moment", [("progress", 1), ("progress", 20), ("progress", 24), ("finished", 0)])
def test_it_goes_on_after_a_kill_as_if_there_had_been_none(
    moment: tuple[str, int], trained: Result, tmp_path: Path
) -> None:
    what, done = moment
    with pytest.raises(Killed):
        outcome(tmp_path / "run", AWARE, watch=Killer(what, "quantize", done))
    again = outcome(tmp_path / "run", AWARE, resume=True)
    assert same(again.model, trained.model)
    assert timeless(read(again.folder)) == timeless(read(trained.folder))


@pytest.mark.parametrize(
    "part",
    [
        {"equalize": True, "correct_bias": True},
        {"smooth": 0.5},
        {"scheme": "int8-dynamic", "correct_bias": True},
        {"scheme": "int4-weights", "equalize": True},
    ],
)
def test_what_prepares_weights_for_it_can_be_asked_for(part: dict[str, Any], tmp_path: Path) -> None:
    model = outcome(tmp_path / "run", {"quantize": part}).model
    again = slivo.load(tmp_path / "run" / "student")
    x = torch.randn(8, 12)
    assert torch.equal(again(x), model(x))
    plain = outcome(tmp_path / "plain", {"quantize": {"scheme": part.get("scheme", "int8-static")}}).model
    assert not torch.equal(plain(x), model(x))


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"smooth": 2}, r"quantize\.smooth is 2; a share from 0 to 1"),
        ({"aware": {**toys.KD, "losses": ["kdd"]}}, r"aware\.losses\[0\] is not valid: no loss is called 'kdd'"),
        ({"scheme": "int8-weights", "aware": toys.KD}, "aware is for int8-static"),
        ({"equalize": True, "aware": toys.KD}, "leave these out"),
        ({"scheme": "int8-dynamic", "group_size": 4}, "int8-dynamic has it not"),
    ],
)
def test_what_makes_no_sense_is_refused(part: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load(toys.recipe({"quantize": part}, target=TARGET))
