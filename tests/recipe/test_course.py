"""Rounds that end where validation or costs say so, and students that become teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from toys import KD, Killed, Killer, read, same, timeless

import slivo
from slivo.errors import RecipeError
from slivo.measure import cost
from slivo.recipe import Result, load, run
from slivo.recipe.course import line, start
from slivo.recipe.plan import plan

CUT = {"prune": {"criterion": "l2", "keep": {"macs": 0.6}}}
LONG = {**KD, "epochs": 6, "optimizer": {"lr": 0.05}}
SHORT = {"distill": {**KD, "epochs": 1}}


def rounds(times: int, until: dict[str, Any], *stages: dict[str, Any]) -> dict[str, Any]:
    repeat = {"times": times, "until": until, "stages": [*(stages or (CUT, SHORT))]}
    return toys.recipe({"repeat": repeat}, {"finetune": {"epochs": 1}}, target={})


def decided(result: Result) -> list[str]:
    return [each["what"] for each in read(result.folder)[0]["decisions"]]


def test_rounds_end_once_the_costs_are_reached(tmp_path: Path) -> None:
    result = run(load(rounds(5, {"macs": 0.4})), tmp_path / "run")
    book = read(result.folder)[0]
    assert decided(result) == ["went on", "ended the rounds"]
    done = [stage["label"] for stage in book["stages"] if "left out" not in stage["details"]]
    assert done == [
        "teacher",
        "prune, round 1/5",
        "distill, round 1/5",
        "prune, round 2/5",
        "distill, round 2/5",
        "finetune",
    ]
    assert all(stage["seconds"] == 0 for stage in book["stages"] if "left out" in stage["details"])
    share = result.summary["student"]["macs"] / result.summary["teacher"]["macs"]
    assert 0.3 < share <= 0.4
    assert "macs 3" in book["decisions"][-1]["why"]


def test_a_round_that_loses_too_much_is_taken_back_and_the_next_goes_slower(tmp_path: Path) -> None:
    # Nothing may be lost, and a cut to a fifth without training loses.
    cut = {"prune": {"criterion": "random", "keep": {"macs": 0.04}, "min_width": 1}}
    recipe = rounds(4, {"max_drop": 0.05, "halvings": 1}, cut)
    result = run(load(recipe), tmp_path / "run")
    book = read(result.folder)[0]
    taken = [each for each in book["decisions"] if each["what"] == "took the round back"]
    assert len(taken) == 2
    assert "5.00 allowed" in taken[0]["why"]
    assert taken[0]["why"].endswith("the next goes at pace 0.5")
    prunes = [stage for stage in book["stages"] if stage["kind"] == "prune"]
    shares = [stage["after"]["macs"] / stage["before"]["macs"] for stage in prunes[:2]]
    assert shares[0] <= 0.04
    assert 0.04 < shares[1] <= 0.2
    assert prunes[0]["before"] == prunes[1]["before"]  # the state of before the round
    assert [stage["details"].get("left out") for stage in prunes[2:]] == [
        "the pace has been halved as often as it may"
    ] * 2
    assert result.summary["student"]["macs"] == result.summary["teacher"]["macs"]


def test_the_pace_is_that_of_learning_rates_too(tmp_path: Path) -> None:
    train = {
        "finetune": {"epochs": 1, "optimizer": {"kind": "adamw", "schedule": "constant", "warmup": 0.0, "lr": 0.008}}
    }
    cut = {"prune": {"criterion": "random", "keep": {"macs": 0.04}, "min_width": 1}}
    result = run(load(rounds(2, {"max_drop": 0.0}, train, cut)), tmp_path / "run")
    rates = [row["lr"] for row in read(result.folder)[1] if row["label"].startswith("finetune, round")]
    assert rates == pytest.approx([0.008, 0.004])


BARE = {"prune": {"criterion": "random", "keep": {"macs": 0.04}, "min_width": 1}}
SLOW = rounds(3, {"macs": 0.01, "max_drop": 0.05}, BARE, SHORT)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(load(SLOW), tmp_path_factory.mktemp("slow") / "whole")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(load(TAUGHT), tmp_path_factory.mktemp("taught") / "whole")


@pytest.mark.parametrize(
    "moment",
    [
        ("finished", "prune, round 1/3"), ("finished", "distill, round 1/3"), ("started", "prune, round 2/3"),
        ("progress", "distill, round 2/3", 3), ("finished", "distill, round 2/3"), ("started", "finetune"),
    ],
)  # fmt: skip
def test_a_kill_changes_no_decision(moment: tuple[Any, ...], slow: Result, tmp_path: Path) -> None:
    assert "took the round back" in decided(slow)
    with pytest.raises(Killed):
        run(load(SLOW), tmp_path / "run", watch=Killer(*moment))
    again = run(load(SLOW), tmp_path / "run", resume=True)
    assert same(again.model, slow.model)
    assert timeless(read(again.folder)) == timeless(read(slow.folder))


def test_what_was_taken_back_is_no_part_of_what_led_to_the_student(slow: Result) -> None:
    records = read(slow.folder)[0]["stages"]
    steps = plan(load(SLOW).recipe)
    verdicts = [each for each in read(slow.folder)[0]["decisions"] if each["what"] != "warned"]
    held = [each["index"] for each in verdicts if each["what"] != "took the round back"]
    found = line(steps, records, len(steps), "accuracy")
    assert found == [0, *(step for last in held for step in (last - 1, last)), len(steps) - 1]
    assert start(steps, records, len(steps), "accuracy").source == len(steps) - 1


TAUGHT = toys.recipe(
    {"prune": {"criterion": "l2", "keep": {"macs": 0.5}}}, SHORT, {"teach": {}}, {"distill": LONG}, {"quantize": {}},
    student={"model": "toys:net", "args": {"width": 4}}, target={},
)  # fmt: skip


def test_a_student_becomes_the_teacher(taught: Result) -> None:
    result = taught
    coach, book = slivo.load(result.folder / "coach"), read(result.folder)[0]
    macs = {stage["kind"]: stage["after"]["macs"] for stage in book["stages"]}
    assert cost(coach, torch.randn(2, 12)).macs == macs["teach"] <= 0.5 * macs["teacher"]
    before = book["stages"][4]["before"]
    assert before["macs"] < macs["teach"]  # a network of its own, not trained yet
    assert before["accuracy"] < 0.9
    assert book["stages"][4]["after"]["accuracy"] > before["accuracy"]
    assert result.summary["teacher"]["macs"] == macs["teacher"]
    assert result.model.first[0].out_features == 4


@pytest.mark.parametrize(
    "moment", [("finished", "distill"), ("started", "teach"), ("finished", "teach"), ("progress", "distill", 9)]
)
def test_a_kill_does_not_confuse_the_two(moment: tuple[Any, ...], taught: Result, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(load(TAUGHT), tmp_path / "run", watch=Killer(*moment))
    again = run(load(TAUGHT), tmp_path / "run", resume=True)
    assert same(again.model, taught.model)
    assert timeless(read(again.folder)) == timeless(read(taught.folder))


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        (rounds(2, {}), r"repeat\.until is empty; give max_drop, macs, params or bytes"),
        (rounds(2, {"max_drop": 0.1}, {"prune": {}}), r"stages\[0\]\.prune has no keep; rounds that may be taken back"),
        (rounds(2, {"macs": 0.1}, {"repeat": {"times": 2, "until": {"macs": 0.1}, "stages": [CUT]}}), "leave one out"),
        (toys.recipe({"teach": {}}), "needs a student of its own; give student.model"),
        (
            {**TAUGHT, "target": {"macs": 0.5}, "stages": [{"prune": {}}, {"teach": True}]},
            "comes before teach and has no keep",
        ),
        ({**TAUGHT, "stages": [{"teach": {}}, {"teach": {}}]}, "is there twice"),
        ({**TAUGHT, "stages": [{"repeat": {"times": 2, "stages": [{"teach": {}}]}}]}, "is a teach stage inside repeat"),
        ({**TAUGHT, "committee": {"others": [{"model": "toys:net"}]}}, "and committee do not go together"),
    ],
)
def test_what_makes_no_sense_is_refused(recipe: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load(recipe)
