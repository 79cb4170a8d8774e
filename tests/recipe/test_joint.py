"""The joint stage, and other stages in which several techniques meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import nn
from toys import KD, Killed, Killer, read, same, timeless

import slivo
from slivo import edits
from slivo.edits.quantize import QuantizedLayer
from slivo.errors import RecipeError, TargetError
from slivo.prune import sparsity
from slivo.recipe import Result, load, run

TRAIN = {**KD, "epochs": 6, "optimizer": {"lr": 0.05}}
HALF = {"keep": {"macs": 0.5}}
ALL = {"joint": {**TRAIN, "prune": {"criterion": "l2", **HALF}, "quantize": {}}}


def outcome(folder: Path, *stages: dict[str, Any], **options: Any) -> Result:
    return run(load(toys.recipe(*stages, target={})), folder, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return outcome(tmp_path_factory.mktemp("joint") / "run", ALL)


def test_one_training_ends_small_and_in_integers(whole: Result) -> None:
    book, rows, summary = read(whole.folder)
    stage = book["stages"][1]
    assert [edit.kind for edit in edits.record(whole.model)] == ["cut", "quantize"]
    assert all(isinstance(each, QuantizedLayer) for each in (whole.model.first[0], whole.model.head))
    assert stage["after"]["macs"] <= 0.5 * stage["before"]["macs"]
    assert stage["details"]["left"] == 0
    assert stage["details"]["scheme"] == "int8-static"
    # What validation said after the last epoch, of the whole network with its rounding, is what it says of the student.
    assert rows[-1]["val"]["accuracy"] == pytest.approx(stage["after"]["accuracy"], abs=0.04)
    assert summary["student"]["accuracy"] > 0.9


@pytest.mark.parametrize("moment", [("started", "joint"), ("progress", "joint", 20), ("finished", "joint")])
def test_it_goes_on_after_a_kill(moment: tuple[Any, ...], whole: Result, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        outcome(tmp_path / "run", ALL, watch=Killer(*moment))
    again = outcome(tmp_path / "run", ALL, resume=True)
    assert same(again.model, whole.model)
    assert timeless(read(again.folder)) == timeless(read(whole.folder))


def test_weights_can_vanish_one_by_one(tmp_path: Path) -> None:
    model = outcome(tmp_path / "run", {"joint": {**TRAIN, "sparsify": {"sparsity": 0.7}}}).model
    assert [edit.kind for edit in edits.record(model)] == ["mask"]
    assert sparsity(model) == pytest.approx(0.7, abs=0.01)
    both = {"joint": {**TRAIN, "sparsify": {"sparsity": 0.7}, "quantize": {"weight_bits": 8}}}
    again = outcome(tmp_path / "both", both).model
    zeros = sum(int((each.weight_codes == 0).sum()) for each in again.modules() if isinstance(each, QuantizedLayer))
    assert zeros >= sum(int((each.weight == 0).sum()) for each in model.modules() if isinstance(each, nn.Linear))


def test_the_goal_is_the_targets_where_there_is_no_keep(tmp_path: Path) -> None:
    joint = {"joint": {**KD, "prune": {"criterion": "l2"}}}
    result = run(load(toys.recipe(joint, target={"macs": 0.4})), tmp_path / "run")
    assert result.summary["student"]["macs"] <= 0.4 * result.summary["teacher"]["macs"]
    with pytest.raises(TargetError):
        run(load(toys.recipe(joint, target={"macs": 0.0001})), tmp_path / "not")
    assert not (tmp_path / "not").exists()


def test_blocks_are_dropped(tmp_path: Path) -> None:
    parts = {"task": {"kind": "image-classification", "data": "digits"}, "target": {}}
    teacher = {"model": "slivo.zoo:small_cnn", "args": {"width": 8}, "fit": {"epochs": 1}}
    recipe = toys.recipe({"drop": {"keep": {"macs": 0.8}, "samples": 64}}, SHORT, teacher=teacher, **parts)
    result = run(load(recipe), tmp_path / "run")
    stage = read(result.folder)[0]["stages"][1]
    assert len(stage["details"]["blocks"]) == 1
    assert stage["after"]["macs"] <= 0.8 * stage["before"]["macs"]
    assert same(slivo.load(tmp_path / "run" / "student"), result.model)


SHORT = {"distill": {**KD, "epochs": 1}}


def test_adapters_are_trained_and_added(tmp_path: Path) -> None:
    tuned = {"distill": {**TRAIN, "lora": {"rank": 2, "targets": ["second.0"]}}}
    result = outcome(tmp_path / "run", {"prune": {"keep": {"macs": 0.5}}}, tuned)
    book = read(result.folder)[0]
    assert book["stages"][2]["details"]["rank"] == 2
    cut, model = outcome(tmp_path / "cut", {"prune": {"keep": {"macs": 0.5}}}).model, result.model
    change = (model.second[0].weight - cut.second[0].weight).detach()
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2
    assert torch.equal(model.first[0].weight, cut.first[0].weight)
    assert set(model.state_dict()) == set(cut.state_dict())


def test_a_packed_student_is_what_counts(tmp_path: Path) -> None:
    sparse = {"sparsify": {"sparsity": 0.9}}
    result = outcome(tmp_path / "run", sparse, {"share": {"clusters": 4}}, SHORT, {"export": {"to": "packed"}})
    file = tmp_path / "run" / "student.slivo"
    assert same(slivo.load(file), result.model)
    assert result.summary["student"]["bytes"] == file.stat().st_size
    assert result.summary["runtime"].startswith("PyTorch")
    stage = read(result.folder)[0]["stages"][-1]
    assert stage["details"] == {"to": "packed", "files": ["student.slivo"], "bytes": file.stat().st_size}


def test_both_exports(tmp_path: Path) -> None:
    result = outcome(tmp_path / "run", {"quantize": {}}, {"export": {"to": "packed"}}, {"export": {}})
    assert (tmp_path / "run" / "student.onnx").exists()
    assert result.summary["runtime"].startswith("ONNX")
    assert result.summary["student"]["bytes"] == (tmp_path / "run" / "student.slivo").stat().st_size


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ([{"joint": KD}], "needs prune, what is to vanish, or sparsify"),
        ([{"joint": {**KD, "prune": {}, "sparsify": {"sparsity": 0.5}}}], "one of them"),
        ([{"joint": {**KD, "prune": {**HALF, "recover": KD}}}], r"prune\.recover is a training of its own"),
        ([{"joint": {**KD, "prune": {**HALF, "refit": True}}}], "leave these out"),
        ([{"joint": {**KD, "prune": {"criterion": "tailor"}}}], r"joint\.prune\.criterion is 'tailor'"),
        ([{"joint": {**KD, "quantize": {"scheme": "int8-dynamic"}}}], "is not int8-static"),
        ([{"joint": {**KD, "quantize": {"aware": KD}}}], "is what a joint stage does"),
        ([{"joint": {**KD, "sparsify": {"pattern": "2:4"}}}], "needs sparsity, a share of zeros to grow to"),
        ([{"joint": {**KD, "sparsify": {"sparsity": 0.5, "criterion": "taylor"}}}], "not valid|needs batches"),
        ([{"joint": {**KD, "prune": {}, "lora": True}}], "leave it out"),
        ([{"joint": {**KD, "quantize": {}}}, {"distill": KD}], r"stages\[1\] comes after quantize"),
        ([{"repeat": {"times": 2, "stages": [{"joint": {**KD, "quantize": {}}}]}}], "is a joint stage inside repeat"),
        ([{"share": {}}, {"distill": {**KD, "lora": True}}], "comes after share, and adapters would undo it"),
        ([{"quantize": {"aware": {**KD, "lora": True}}}], "trains beside the weights that aware rounds"),
        ([{"drop": {"keep": {"latency": 0.5}}}], "has a latency, to which blocks are not dropped"),
        ([{"distill": {**KD, "lora": {"targets": ["nothing"]}}}], "lora|nothing"),
    ],
)
def test_what_makes_no_sense_is_refused(stages: list[dict[str, Any]], told: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=told):
        outcome(tmp_path / "run", *stages)
    assert not (tmp_path / "run").exists()
