"""Runs: what they leave, that a seed fixes them, and that a kill at any moment changes nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from toys import Killed, Killer, read, same, timeless

import slivo
from slivo import edits
from slivo.errors import ArtifactError, OutputError, RecipeError, ShapeError, SlivoError, TargetError
from slivo.recipe import Result, load, run

FULL = toys.recipe(*toys.ALL_KINDS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(load(FULL), tmp_path_factory.mktemp("runs") / "whole")


def test_a_run_leaves_a_student_that_meets_the_target_and_says_so(whole: Result) -> None:
    book, rows, summary = read(whole.folder)
    assert whole.met
    assert summary["met"] is True
    assert summary == whole.summary
    assert summary["student"]["macs"] <= 0.5 * summary["teacher"]["macs"]
    assert set(summary["teacher"]) == {"accuracy", "precision", "recall", "f1", "params", "macs", "bytes", "latency_ms"}
    assert set(summary["teacher"]["latency_ms"]) == {"1", "64"}
    assert summary["teacher"]["bytes"] == sum(file.stat().st_size for file in (whole.folder / "teacher").iterdir())
    assert book["status"] == "done"
    kinds = ["teacher", "prune", "recover", "prune", "recover", "finetune", "distill", "quantize"]
    assert [stage["kind"] for stage in book["stages"]] == kinds
    assert [stage["before"] for stage in book["stages"][2:]] == [stage["after"] for stage in book["stages"][1:-1]]
    assert sum(map(sum, book["confusion"]["student"])) == 45
    assert book["agreement"] > 0.9
    assert all(axis["after"] <= axis["before"] for axis in book["axes"])
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        (0, 1), (0, 2), (0, 3), (2, 1), (2, 2), (4, 1), (4, 2), (5, 1), (6, 1), (6, 2),
    ]  # fmt: skip
    assert not (whole.folder / "checkpoints").exists()


def test_the_student_on_the_disk_is_the_student_that_is_returned(whole: Result) -> None:
    again = slivo.load(whole.folder / "student")
    assert same(again, whole.model)
    assert [edit.kind for edit in edits.record(again)] == ["cut", "cut", "quantize"]
    assert not again.training


def test_a_seed_fixes_the_student_and_another_gives_another(whole: Result, tmp_path: Path) -> None:
    torch.manual_seed(99)  # the caller's randomness is none of a run's business
    before = torch.get_rng_state()
    again = run(load(FULL), tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    assert same(again.model, whole.model)
    assert timeless(read(again.folder)) == timeless(read(whole.folder))
    other = run(load(FULL), tmp_path / "other", seed=1)
    assert not same(slivo.load(other.folder / "teacher"), slivo.load(whole.folder / "teacher"))


@pytest.mark.parametrize(
    "moment",
    [
        ("started", "teacher"), ("progress", "teacher", 2), ("progress", "teacher", 12), ("finished", "teacher"),
        ("started", "prune 1/2"), ("finished", "prune 1/2"), ("progress", "recover 1/2", 6), ("finished", "recover 2/2"),  # noqa: E501
        ("progress", "finetune", 1), ("progress", "distill", 7), ("finished", "distill"), ("finished", "quantize"),
        ("started", "measure"),
    ],
)  # fmt: skip
def test_a_run_killed_at_any_moment_and_resumed_is_one_that_was_not_interrupted(
    moment: tuple[Any, ...], whole: Result, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        run(load(FULL), folder, watch=Killer(*moment))
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    result = run(load(FULL), folder, resume=True)
    assert same(result.model, whole.model)
    assert timeless(read(folder)) == timeless(read(whole.folder))
    assert not (folder / "checkpoints").exists()


def test_a_run_killed_twice_resumes_twice(whole: Result, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for moment in (("progress", "recover 1/2", 3), ("progress", "distill", 9)):
        with pytest.raises(Killed):
            run(load(FULL), folder, watch=Killer(*moment), resume=folder.exists())
    assert same(run(load(FULL), folder, resume=True).model, whole.model)


def test_resuming_a_run_that_is_done_gives_its_result(whole: Result) -> None:
    assert same(run(load(FULL), whole.folder, resume=True).model, whole.model)


def test_only_the_run_that_was_begun_can_be_resumed(whole: Result, tmp_path: Path) -> None:
    with pytest.raises(SlivoError, match="holds a run of another seed"):
        run(load(FULL), whole.folder, resume=True, seed=5)
    with pytest.raises(SlivoError, match="holds a run of another recipe"):
        run(load(FULL, ["target.macs=0.4"]), whole.folder, resume=True)
    with pytest.raises(ArtifactError, match=r"is not the folder of a run: it has no run.json"):
        run(load(FULL), tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "run.json").write_text('{"format": 2}')
    with pytest.raises(ArtifactError, match="has format 2"):
        run(load(FULL), newer, resume=True)
    (newer / "run.json").write_text('{"format": ')
    with pytest.raises(ArtifactError, match=r"run.json is damaged"):
        run(load(FULL), newer, resume=True)


def test_a_folder_that_is_taken_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match=r"exists and is not empty; it is not the folder of a run, or give another"):
        run(load(FULL), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(OutputError, match="add --resume to go on with its run"):
        run(load(FULL), tmp_path)
    with pytest.raises(OutputError, match="cannot be written to: Not a directory"):
        run(load(FULL), tmp_path / "letter.txt" / "run")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"task": {"kind": "image-classification", "data": "digitz"}}, RecipeError, "task.data is 'digitz'; .* digits"),
        ({"task": None}, RecipeError, "recipe: task is missing"),
        ({"teacher": None}, RecipeError, "recipe: teacher is missing"),
        ({"teacher": {"model": "no_such_module:net"}}, RecipeError, "module 'no_such_module' cannot be imported"),
        ({"teacher": {"model": "toys:nets"}}, RecipeError, "toys has no 'nets'"),
        ({"teacher": {"model": "toys:net", "args": {"wide": 3}}}, RecipeError, "toys:net cannot be called with"),
        ({"teacher": {"model": "toys:task"}}, RecipeError, "toys:task returned Task, not a torch.nn.Module"),
        ({"teacher": {"model": "net.pt"}}, RecipeError, "'net.pt' is no artifact, and not of the form"),
        ({"student": {"model": "toys:nothing"}}, RecipeError, "toys has no 'nothing'"),
        ({"task": {"kind": "image-classification", "data": "toys:other_task"}}, ShapeError, r"\(2, 5\) .* expects 12"),
        ({"target": {"macs": 0.001}}, TargetError, "the budget cannot be met: MACs .* is the least"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_anything_is_written(
    change: dict[str, Any], error: type[SlivoError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(load({**FULL, **change}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stage_that_fails_leaves_what_was_done_and_can_go_on_once_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slivo.recipe import stages

    def broken(*_: object) -> None:
        raise SlivoError("out of luck")

    recipe = load(toys.recipe({"prune": {}}, {"quantize": {}}))
    with monkeypatch.context() as patch:
        patch.setitem(stages.STAGES, "quantize", broken)  # type: ignore[arg-type]
        with pytest.raises(SlivoError, match="out of luck"):
            run(recipe, tmp_path / "run")
    book = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (book["status"], book["error"], len(book["stages"])) == ("failed", "out of luck", 2)
    assert run(recipe, tmp_path / "run", resume=True).met


def test_what_the_library_warns_of_is_kept(tmp_path: Path) -> None:
    recipe = toys.recipe({"distill": {**toys.KD, "epochs": 1}}, teacher={"model": "toys:Guesser"}, target={})
    run(load(recipe), tmp_path / "run")
    decisions = json.loads((tmp_path / "run" / "run.json").read_text())["decisions"]
    assert all((warned["stage"], warned["what"]) == ("distill", "warned") for warned in decisions)
    (nothing, chance) = (warned["why"] for warned in decisions)
    assert "the loss kd has" in nothing
    assert "no better than chance" in chance


def test_a_missed_target_gives_a_complete_folder(tmp_path: Path) -> None:
    result = run(load(toys.recipe({"finetune": {"epochs": 1}}, target={"macs": 0.5})), tmp_path / "run")
    assert result.misses == ("macs is 100.0% of the teacher's, at most 50.0% was asked for",)
    assert not result.met
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["met"] is False


def test_a_student_of_its_own_learns_from_a_teacher_that_is_an_artifact(whole: Result, tmp_path: Path) -> None:
    recipe = toys.recipe(
        {"distill": {**toys.KD, "optimizer": {"lr": 0.05}}},
        teacher={"model": str(whole.folder / "teacher")},
        student={"model": "toys:net", "args": {"width": 4}},
    )
    result = run(load(recipe), tmp_path / "run")
    assert same(slivo.load(tmp_path / "run" / "teacher"), slivo.load(whole.folder / "teacher"))
    assert isinstance(result.model, toys.Net)
    assert result.model.head.in_features == 4
    with pytest.raises(RecipeError, match="is an artifact and takes no args"):
        run(load({**recipe, "teacher": {"model": str(whole.folder / "teacher"), "args": {"a": 1}}}), tmp_path / "x")


@pytest.mark.parametrize("parts", [{"groups": 2}, {"modules": [["first"], ["second*"]]}])
def test_parts_are_cut_one_after_the_other_to_the_whole_target(parts: dict[str, Any], tmp_path: Path) -> None:
    layers = {**parts, "stages": [{"prune": {"criterion": "l2"}}, {"distill": toys.KD}]}
    result = run(load(toys.recipe({"layers": layers}, target={"macs": 0.4})), tmp_path / "run")
    first, second = (edit for edit in edits.record(result.model) if isinstance(edit, edits.Cut))
    assert list(first.axes) != list(second.axes)
    assert result.met
    share = result.summary["student"]["macs"] / result.summary["teacher"]["macs"]
    assert 0.3 < share <= 0.4


def test_more_parts_than_axes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SlivoError, match="has 2 axes to cut and layers asks for 5 groups"):
        run(load(toys.recipe({"layers": {"groups": 5, "stages": [{"prune": {}}]}})), tmp_path / "run")


def test_an_exporting_run_measures_what_it_exports(tmp_path: Path) -> None:
    result = run(load(toys.recipe({"prune": {}}, {"quantize": {}}, {"export": {}})), tmp_path / "run")
    assert {"teacher.onnx", "student.onnx"} <= {file.name for file in result.folder.iterdir()}
    assert result.summary["runtime"].startswith("ONNX Runtime")
    export = json.loads((result.folder / "run.json").read_text())["stages"][-1]
    assert export["details"]["accuracy in ONNX Runtime"] == pytest.approx(export["after"]["accuracy"], abs=0.05)
    latency = result.summary["student"]["latency_ms"]
    assert all(0 < p50 <= p95 and math.isfinite(p95) for p50, p95 in latency.values())


def test_a_row_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    from slivo.recipe.folder import append_row, read_rows, write_rows

    file = tmp_path / "metrics.jsonl"
    assert read_rows(file) == []
    write_rows(file, [{"a": 1.0, "b": [math.nan, (math.inf, 2)]}])
    append_row(file, {"c": 1})
    with file.open("a") as stream:
        stream.write('{"d": ')
    assert read_rows(file) == [{"a": 1.0, "b": [None, [None, 2]]}, {"c": 1}]
