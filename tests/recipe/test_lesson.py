"""Distillations of a recipe: teachers with a memory, several of them, first weights, and places that are proposed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from toys import KD, Killed, Killer, read, same, timeless

import slivo
from slivo import losses
from slivo.distill import committee
from slivo.errors import RecipeError
from slivo.recipe import Result, Watch, load, run
from slivo.recipe.lesson import of_first, on_sizes
from slivo.tasks import Task

HINT = {"hint": {"at": "second", "weight": 0.1}}
LESSON: dict[str, Any] = {**KD, "losses": [*KD["losses"], HINT]}
OWN = {"model": "toys:net", "args": {"width": 8}}
FIT = {"epochs": 2, "batch_size": 16, "optimizer": {"lr": 0.05}}
OTHERS = [{"model": "toys:net", "args": {"width": 8}, "fit": FIT}, {"model": "toys:net", "fit": FIT}]

ALL = toys.recipe(
    {"prune": {"criterion": "l2", "recover": {**KD, "cache": True}}},
    {"distill": {**KD, "losses": ["kd", {"hint": {"at": "proposed"}}], "cache": {"features": "float16"}}},
    committee={"others": OTHERS, "voices": "learned", "temperature": 2.0},
    student={"model": "toys:net", "args": {"width": 12}, "inherit": True},
    target={"macs": 0.4},
)  # fmt: skip


class Asked(Watch):
    """Remembers in which step how many answers were there."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def progress(self, label: str, done: int, total: int, fields: Mapping[str, float]) -> None:
        assert done <= total
        assert label.endswith(", asking the teacher") != bool(fields)
        if not fields:
            self.seen.append((label.partition(",")[0], done))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(load(ALL), tmp_path_factory.mktemp("runs") / "whole")


def test_a_run_with_all_of_it_says_what_it_did(whole: Result) -> None:
    book, rows, _ = read(whole.folder)
    assert whole.met
    kinds = ["teacher", "member", "member", "prune", "recover", "distill"]
    assert [stage["kind"] for stage in book["stages"]] == kinds
    assert [stage["label"] for stage in book["stages"][:3]] == ["teacher", "teacher 2", "teacher 3"]
    assert all(stage["details"]["accuracy"] > 0.8 for stage in book["stages"][1:3])
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        (0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (5, 1), (5, 2),
    ]  # fmt: skip
    recover, distill = (stage["details"] for stage in book["stages"][4:])
    assert recover["cached_answers"] == distill["cached_answers"] == 96
    assert len(recover["voices"]) == 3
    assert sum(recover["voices"]) == pytest.approx(1, abs=1e-3)
    assert distill["at"]
    assert {"stage": "student", "what": "inherited"}.items() <= book["decisions"][0].items()
    assert not (whole.folder / "checkpoints").exists()


def test_those_who_teach_beside_the_teacher_are_kept_and_differ(whole: Result) -> None:
    second, third = (slivo.load(whole.folder / "teachers" / name) for name in "23")
    assert second.head.in_features == 8  # type: ignore[union-attr]
    assert not same(third, slivo.load(whole.folder / "teacher"))  # of the same kind, from other first weights


@pytest.mark.parametrize(
    "moment",
    [
        ("progress", "teacher 2", 6), ("finished", "teacher 3"), ("started", "prune"),
        ("progress", "recover, asking the teacher", 64), ("progress", "recover", 7),
        ("progress", "distill, asking the teacher", 96), ("progress", "distill", 8),
    ],
)  # fmt: skip
def test_it_is_killed_at_any_moment_and_resumed_to_the_bit(
    moment: tuple[Any, ...], whole: Result, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run(load(ALL), tmp_path / "run", watch=Killer(*moment))
    result = run(load(ALL), tmp_path / "run", resume=True)
    assert same(result.model, whole.model)
    assert timeless(read(result.folder)) == timeless(read(whole.folder))


def test_a_block_of_answers_that_is_not_whole_is_asked_anew(tmp_path: Path) -> None:
    recipe = load(toys.recipe({"distill": {**KD, "cache": True}}, target={}))
    plain = run(recipe, tmp_path / "plain")
    with pytest.raises(Killed):
        run(recipe, tmp_path / "run", watch=Killer("progress", "distill, asking the teacher", 64))
    (records,) = (tmp_path / "run" / "checkpoints" / "teacher-cache").rglob("*.npy")
    content = bytearray(records.read_bytes())
    content[-(96 - 40) * ((len(content) - 128) // 96) :] = bytes((96 - 40) * ((len(content) - 128) // 96))
    records.write_bytes(content)

    watch = Asked()
    assert same(run(recipe, tmp_path / "run", resume=True, watch=watch).model, plain.model)
    assert watch.seen == [("distill", 64), ("distill", 96)]


@pytest.mark.parametrize(
    ("task", "part", "cache"),
    [(toys.task, LESSON, True), (toys.strict_task, LESSON, True), (toys.strict_task, KD, {"top_k": 2})],
)
def test_a_student_learns_from_memory_what_it_learns_without(
    task: Callable[[], Task], part: dict[str, Any], cache: Any, tmp_path: Path
) -> None:
    made = [
        run(
            load(toys.recipe({"distill": {**part, **given}}, student=OWN, target={})), tmp_path / name, task=task()
        ).model
        for name, given in (("live", {}), ("kept", {"cache": cache}))
    ]
    # Of three classes the two most probable leave one, whose probability is what they leave: nothing is lost.
    for ours, theirs in zip(*(model.state_dict().values() for model in made), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_stages_that_ask_the_same_share_their_answers(tmp_path: Path) -> None:
    watch = Asked()
    part = {**KD, "epochs": 1, "cache": True}
    stages = {"distill": part}, {"repeat": {"times": 2, "stages": [{"distill": part}]}}
    run(load(toys.recipe(*stages, target={})), tmp_path / "run", watch=watch)
    assert watch.seen == [("distill", 64), ("distill", 96)]


def test_augmented_data_are_kept_in_several_views_or_not_at_all(tmp_path: Path) -> None:
    task = {"kind": "image-classification", "data": "toys:moving_task"}
    part = {**KD, "cache": True}
    with pytest.raises(
        RecipeError, match=r"stages\[0\].distill cannot be done: the training data are augmented.*\{views: 2\}"
    ):
        run(load(toys.recipe({"distill": part}, task=task, target={})), tmp_path / "run")
    several = run(
        load(toys.recipe({"distill": {**part, "cache": {"views": 2}}}, task=task, target={})), tmp_path / "run"
    )
    book, _, summary = read(several.folder)
    assert book["stages"][1]["details"]["cached_answers"] == 192
    assert summary["student"]["accuracy"] > 0.9


def test_a_student_inherits_what_fits_before_it_is_measured(tmp_path: Path) -> None:
    stage = {"distill": {**KD, "epochs": 1, "optimizer": {"lr": 1e-9}}}
    found = {}
    for given in ({}, {"inherit": True}, {"inherit": {"widths": "svd"}}, {"inherit": {"layers": {"head": "head"}}}):
        recipe = toys.recipe(stage, student={"model": "toys:net", **given}, target={})
        book, _, _ = read(run(load(recipe), tmp_path / f"{len(found)}").folder)
        found[str(given)] = book["stages"][1]["before"]["accuracy"], book["stages"][0]["after"]["accuracy"]
    random, whole, svd, head = found.values()
    assert whole[0] == whole[1] == svd[0]  # of the same size, it is the teacher
    assert random[0] < 0.8 * random[1]
    assert math.isfinite(head[0])


@pytest.mark.parametrize(
    ("parts", "stage", "message"),
    [
        ({"student": {"from": "teacher", "inherit": True}}, {}, "student.inherit is for another model"),
        ({"student": {**OWN, "inherit": {"widths": "cutt"}}}, {}, "widths is 'cutt'; cut or svd. Did you mean cut"),
        ({"student": {**OWN, "inherit": 3}}, {}, "inherit is 3; true, or a mapping with layers and widths"),
        ({"student": {"model": "toys:Guesser", "inherit": {"layers": {"head": "body"}}}}, {}, "student.inherit finds no tensor of the student"),  # noqa: E501
        ({"committee": {"others": []}}, {}, "others is .*; a list of mappings as that of teacher"),
        ({"committee": {"others": OTHERS, "voices": [1.0, 1.0]}}, {}, r"voices is \[1.0, 1.0\]; 3 numbers"),
        ({"committee": {"others": OTHERS, "voices": [0.0, 0.0, 0.0]}}, {}, "not all of them 0"),
        ({"committee": {"others": OTHERS, "voices": "loud"}}, {}, "voices is 'loud'; equal, confidence, learned"),
        ({"committee": {"others": [{"model": "toys:nets"}]}}, {}, r"model 'toys:nets': toys has no 'nets'"),
        ({}, {"cache": 3}, "cache is 3; true, or a mapping with views, top_k and features"),
        ({}, {"cache": {"views": 0}}, "cache.views is 0; a whole number, 1 or more"),
        ({}, {"cache": {"top_k": 3}}, "top_k is 3 and there are 3 classes; keep fewer"),
        ({}, {"cache": {"top_k": 2}, "losses": ["kd", "mse"]}, r"losses\[1\] is mse, which compares the size"),
        ({}, {"losses": [{"hint": {"at": "third"}}]}, r"stages\[0\].distill cannot be done: the student .Net."),
        ({"committee": {"others": OTHERS}}, {"losses": [{"hint": {"at": "third"}}]}, "has no module 'third'"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_anything_runs(
    parts: dict[str, Any], stage: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        run(load(toys.recipe({"distill": {**KD, **stage}}, **{"target": {}, **parts})), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_voices_are_learned_from_classes_alone(tmp_path: Path) -> None:
    recipe = load(toys.recipe({"distill": KD}, committee={"others": OTHERS, "voices": "learned"}, target={}))
    with pytest.raises(
        RecipeError, match=r"committee.voices are learned from classes, and the task is of kind 'something'"
    ):
        run(recipe, tmp_path / "run", task=toys.strict_task())


def test_a_student_is_cut_out_of_the_teacher_whoever_teaches_beside_it(tmp_path: Path) -> None:
    part = {**KD, "epochs": 1}
    committee = {"others": [{"model": "toys:net", "args": {"width": 3}}], "voices": [3.0, 1.0]}
    result = run(
        load(toys.recipe({"prune": {"criterion": "l2", "recover": part}}, committee=committee)), tmp_path / "run"
    )
    book, _, summary = read(result.folder)
    assert summary["teacher"]["macs"] == book["stages"][0]["after"]["macs"] == book["stages"][2]["before"]["macs"]
    assert book["stages"][3]["details"]["voices"] == [0.75, 0.25]
    assert result.met


def test_false_and_nothing_are_the_same() -> None:
    given = [load(toys.recipe({"distill": {**KD, **part}})).recipe for part in ({}, {"cache": False})]
    assert given[0] == given[1]
    full = load(ALL).recipe
    assert load(json.loads(json.dumps(full.plain()))).recipe == full


def test_proposals_that_name_nothing_are_refused(tmp_path: Path) -> None:
    recipe = toys.recipe({"distill": {**KD, "losses": [{"hint": {"at": "proposed"}}]}}, target={})
    recipe["teacher"] = recipe["student"] = {"model": "toys:Bare"}
    with pytest.raises(slivo.errors.SlivoError, match="has no module that puts out features"):
        run(load(recipe), tmp_path / "run")


def test_activations_of_several_teachers_are_those_of_the_first_unless_another_is_named() -> None:
    one, two = toys.net(8), toys.net(4)
    both = committee([one, two])
    named = losses.hint(at=["second", "teachers.1.first"])
    terms = [losses.kd(), losses.hint(at="*.0"), losses.review(at={"first": "first", "second": "second"}), named]
    found = of_first(terms, two, one)
    assert [term.at for term in found] == [
        "",
        {"first.0": "teachers.0.first.0", "second.0": "teachers.0.second.0"},
        {"first": "teachers.0.first", "second": "teachers.0.second"},
        ("second", "teachers.1.first"),
    ]
    paths = dict(both.named_modules())
    assert all(path in paths for term in found[1:3] for path in term.at.values())  # type: ignore[union-attr]
    assert of_first([losses.hint(at={"first": ""})], two, one)[0].at == {"first": ""}


def test_losses_on_the_size_of_logits_are_told_from_those_on_probabilities() -> None:
    sized = {"mse", "l1", "cosine", "binary"}
    on_logits = [
        name for name in losses.names() if name not in sized and losses.build({name: _options(name)}).on_outputs
    ]
    assert {name for name in sized if on_sizes(losses.build({name: {}}))} == sized
    assert {"kd", "dkd", "reverse_kl", "dist"} <= set(on_logits)
    assert not any(on_sizes(losses.build({name: _options(name)})) for name in on_logits)
    assert not on_sizes(losses.hint(at="layer1"))


def _options(name: str) -> dict[str, Any]:
    parameters = next(loss for loss in losses.describe() if loss.name == name).parameters
    return {"at": "x"} if "at: path" in parameters else {}
