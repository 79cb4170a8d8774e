"""Prune stages that train under pressure beforehand, or go as far as validation allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import nn
from toys import KD, Killed, Killer, read, same, timeless

from slivo import edits
from slivo.errors import RecipeError
from slivo.recipe import Result, load, run
from slivo.recipe.plan import plan

TRAIN = {"epochs": 2, "batch_size": 16, "optimizer": {"lr": 0.05}}
HSPG = {"criterion": "l2", "keep": {"macs": 0.5}, "pressure": {"kind": "hspg", **TRAIN}}
CONTROLLED: dict[str, Any] = {
    "criterion": "l2",
    "keep": {"macs": 0.1},
    "schedule": {"kind": "linear", "steps": 2},
    "recover": KD,
    "controlled": {"max_drop": 0.1, "halvings": 1},
}
BOTH = toys.recipe(
    {"prune": HSPG}, {"prune": {**CONTROLLED, "keep": {"macs": 0.5}, "controlled": {"max_drop": 1.0}}}, target={}
)


def pruned(folder: Path, **part: Any) -> tuple[Result, dict[str, Any]]:
    result = run(load(toys.recipe({"prune": {"criterion": "l2", "keep": {"macs": 0.5}, **part}}, target={})), folder)
    return result, read(folder)[0]["stages"][1]


def test_what_is_driven_to_zero_is_cut_without_a_trace(tmp_path: Path) -> None:
    result, stage = pruned(tmp_path / "run", **HSPG)
    assert stage["details"]["pressure"] == "hspg"
    assert stage["details"]["left"] == 0
    assert stage["after"]["macs"] <= 0.5 * stage["before"]["macs"]
    _, rows, _ = read(result.folder)
    assert [row["epoch"] for row in rows if row["stage"] == 1] == [1, 2]
    # Nothing was lost at the cut: what validation said after the last epoch, before it, is what it says of the student.
    assert rows[-1]["val"]["accuracy"] == stage["after"]["accuracy"]
    assert [edit.kind for edit in edits.record(result.model)] == ["cut"]


def size(model: nn.Module, kind: type[nn.Module]) -> float:
    """Return the mean size of the weights of all layers of a kind."""
    found = [
        module.get_parameter("weight").detach().abs().flatten()
        for module in model.modules()
        if isinstance(module, kind)
    ]
    return float(torch.cat(found).mean())


@pytest.fixture(scope="module")
def unpressed(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """What a training makes that is as long, under a pressure that is none."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    return pruned(folder, pressure={**TRAIN, "kind": "l2", "strength": 1e-12})[0].model


@pytest.mark.parametrize(
    ("pressure", "layers"),
    [
        ({"kind": "l1", "strength": 0.5}, nn.Linear),
        ({"kind": "l2", "strength": 5.0}, nn.Linear),
        ({"kind": "slimming", "strength": 0.5}, nn.BatchNorm1d),
        ({"kind": "group_lasso", "strength": 0.2}, nn.Linear),
    ],
    ids=lambda given: str(given["kind"]) if isinstance(given, dict) else "",
)
def test_pressure_makes_small_what_it_is_for(
    pressure: dict[str, Any], layers: type[nn.Module], unpressed: nn.Module, tmp_path: Path
) -> None:
    result, stage = pruned(tmp_path / "run", pressure={**TRAIN, **pressure})
    assert stage["details"]["pressure"] == pressure["kind"]
    assert stage["after"]["macs"] <= 0.5 * stage["before"]["macs"]
    assert size(result.model, layers) < 0.9 * size(unpressed, layers)


def test_a_growing_penalty_leaves_little_of_what_is_cut(tmp_path: Path) -> None:
    part = {"kind": "greg", "strength": 100.0, "steps": 0.25, **TRAIN}
    _, stage = pruned(tmp_path / "run", pressure=part)
    assert stage["details"]["left"] < 0.1
    assert stage["after"]["accuracy"] >= stage["before"]["accuracy"] - 0.1


def test_an_allowance_stops_the_cut_where_validation_says_so(tmp_path: Path) -> None:
    free, stage = pruned(tmp_path / "free", **{**CONTROLLED, "controlled": {"max_drop": 1.0}})
    assert stage["details"] | {"axes": 0} == {
        "criterion": "l2", "scope": "global", "trials": 2, "held": 2, "met": True, "axes": 0,
    }  # fmt: skip
    assert len(edits.record(free.model)) == 2
    recover = {**KD, "optimizer": {"lr": 1e-6}}  # nothing is made up for, so that a deep cut costs much
    strict, stage = pruned(tmp_path / "strict", **{**CONTROLLED, "recover": recover, "controlled": {"max_drop": 0.0}})
    book, rows, _ = read(strict.folder)
    assert not stage["details"]["met"]
    assert stage["details"]["trials"] > stage["details"]["held"]
    assert stage["after"]["accuracy"] >= stage["before"]["accuracy"]
    assert stage["after"]["macs"] > 0.1 * stage["before"]["macs"]
    assert "stopped before its goal" in " ".join(decision["why"] for decision in book["decisions"])
    epochs = [row["epoch"] for row in rows if row["stage"] == 1]
    assert epochs == list(range(1, 2 * stage["details"]["trials"] + 1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(load(BOTH), tmp_path_factory.mktemp("runs") / "whole")


@pytest.mark.parametrize(
    "moment",
    [
        ("progress", "prune", 7), ("finished", "prune"), ("progress", "prune, trial 1", 5),
        ("progress", "prune, trial 2", 9),
    ],
)  # fmt: skip
def test_it_is_killed_at_any_moment_and_resumed_to_the_bit(
    moment: tuple[Any, ...], whole: Result, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run(load(BOTH), tmp_path / "run", watch=Killer(*moment))
    result = run(load(BOTH), tmp_path / "run", resume=True)
    assert same(result.model, whole.model)
    assert timeless(read(result.folder)) == timeless(read(whole.folder))


def test_no_training_of_a_trial_is_done_twice(tmp_path: Path) -> None:
    class Counts(Killer):
        steps = 0

        def progress(self, label: str, done: int, total: int, fields: Any) -> None:
            self.steps += 0 < done < total and "trial 1" in label
            super().progress(label, done, total, fields)

    first, then = Counts("progress", "prune, trial 2", 9), Counts("never", "")
    with pytest.raises(Killed):
        run(load(BOTH), tmp_path / "run", watch=first)
    run(load(BOTH), tmp_path / "run", watch=then, resume=True)
    assert first.steps > 0
    assert then.steps == 0


def test_a_controlled_stage_is_one_step_with_the_whole_goal() -> None:
    steps = plan(load(toys.recipe({"prune": CONTROLLED}, target={})).recipe)
    assert [step.label for step in steps] == ["teacher", "prune"]
    assert steps[1].goal is not None
    assert steps[1].goal.macs == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"pressure": {"kind": "l1", **TRAIN}}, r"stages\[0\].prune.pressure is l1 and needs strength"),
        ({"pressure": {"kind": "l3", **TRAIN}}, "kind is 'l3'; l1, l2, slimming, group_lasso, greg or hspg"),
        ({"pressure": {"kind": "l1", "strength": 0, **TRAIN}}, "strength is 0; above 0"),
        ({"pressure": {"kind": "hspg", "strength": 1.0, **TRAIN}}, "strength is nothing that hspg has; leave it out"),
        ({"pressure": {"kind": "l2", "strength": 1.0, "steps": 0.5, **TRAIN}}, "steps is for greg and hspg; l2 acts"),
        ({"pressure": {"kind": "greg", "steps": 2, **TRAIN}}, "steps is 2; of greg and hspg, by when: a share"),
        ({"controlled": {"max_drop": 0.1}}, "controlled needs recover, the training after each cut"),
        ({**CONTROLLED, "pressure": HSPG["pressure"]}, "controlled and pressure do not go together"),
        ({**CONTROLLED, "keep": {"latency": 0.5}}, "controlled has no steps to a latency; keep macs, params or bytes"),
        ({**CONTROLLED, "controlled": {"max_drop": 5}}, "max_drop is 5; how much of the task's metric"),
    ],
)
def test_what_makes_no_sense_is_refused(part: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(toys.recipe({"prune": {"keep": {"macs": 0.5}, **part}}))


@pytest.mark.parametrize("part", [HSPG, CONTROLLED])
def test_parts_of_a_network_have_neither(part: dict[str, Any]) -> None:
    single = {name: value for name, value in part.items() if name != "schedule"}
    with pytest.raises(RecipeError, match="prunes with pressure or controlled, which are for whole networks"):
        load(toys.recipe({"layers": {"groups": 2, "stages": [{"prune": single}]}}))


def test_it_survives_being_written_down() -> None:
    recipe = load(BOTH).recipe
    assert load(json.loads(json.dumps(recipe.plain()))).recipe == recipe
