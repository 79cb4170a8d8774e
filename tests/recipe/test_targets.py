"""Targets in the user's own units: latency as a share, on a runtime that is named."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toys
from torch import nn

import slivo
from slivo.errors import RecipeError, SlivoError, TargetError
from slivo.recipe import load, run
from slivo.recipe.plan import plan
from slivo.recipe.result import misses

SHORT = {"distill": {**toys.KD, "epochs": 1}}


def test_stages_without_keep_share_a_latency() -> None:
    two = [{"prune": {}}, SHORT, {"prune": {}}, SHORT]
    goals = [step.goal for step in plan(load(toys.recipe(*two, target={"latency": 0.25})).recipe) if step.goal]
    assert [goal.latency for goal in goals] == pytest.approx([0.5, 0.25])
    assert all(goal.since is None and goal.macs is None for goal in goals)


def test_latency_is_that_of_the_runtime_that_is_named(tmp_path: Path) -> None:
    cut = {"prune": {"keep": {"macs": 0.5}}}
    target = {"latency": 1.0, "latency_ms": 1e6, "runtime": "onnxruntime"}
    result = run(load(toys.recipe(cut, SHORT, target=target)), tmp_path / "run")
    assert result.summary["runtime"].startswith("ONNX Runtime 1.")
    assert not (tmp_path / "run" / "student.onnx").exists()
    assert result.summary["target"] == target
    eager = run(
        load(toys.recipe(cut, SHORT, {"export": {}}, target={**target, "runtime": "eager"})), tmp_path / "eager"
    )
    assert eager.summary["runtime"].startswith("PyTorch")


@pytest.mark.parametrize("kind", ["prune", "joint"])
def test_a_cut_to_half_the_latency_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In place of the clock, a machine whose time is the number of weights.
    def clock(_: object) -> Callable[[nn.Module], float]:
        return lambda model: float(sum(each.numel() for each in model.parameters()))

    monkeypatch.setattr("slivo.recipe.cuts.clock", clock)
    stage = {"prune": {}} if kind == "prune" else {"joint": {**toys.KD, "prune": {}}}
    result = run(load(toys.recipe(stage, target={"latency": 0.5})), tmp_path / "run")
    share = result.summary["student"]["params"] / result.summary["teacher"]["params"]
    assert 0.4 < share <= 0.5


def test_what_is_missed_is_told() -> None:
    summary: dict[str, Any] = {
        "teacher": {"latency_ms": {"1": [2.0, 3.0]}}, "student": {"latency_ms": {"1": [1.5, 2.0]}},
        "target": {"latency": 0.5, "runtime": "eager"},
    }  # fmt: skip
    assert misses(summary, "accuracy") == ["latency is 75.0% of the teacher's, at most 50.0% was asked for"]
    assert slivo.Target(latency=0.5, runtime="openvino").given() == {"latency": 0.5, "runtime": "openvino"}
    with pytest.raises(TargetError, match="target runtime is 'tvm'; what latency is measured on"):
        slivo.Target(latency=0.5, runtime="tvm")


def test_a_runtime_that_is_not_installed_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    recipe = toys.recipe({"prune": {"keep": {"macs": 0.5}}}, target={"latency": 0.5, "runtime": "openvino"})
    with pytest.raises(SlivoError, match=r"pip install 'slivo\[openvino\]'"):
        run(load(recipe), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        (toys.recipe(SHORT, target={"runtime": "eager"}), "give latency or latency_ms, too"),
        (toys.recipe({"prune": {}}, target={"latency": 0.5}, student={"model": "toys:net"}), "give keep"),
        (
            toys.recipe({"prune": {"recover": toys.KD, "controlled": {"max_drop": 0.1}}}, target={"latency": 0.5}),
            "has no steps to a latency",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(recipe: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load(recipe)
