"""Predictions: what runs then leave, and what need not be run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import toys

from slivo.recipe import load, run
from slivo.search.predict import behind, predict, refused
from slivo.search.record import Row

WHOLE = {"macs": 496.0, "params": 595.0}
TEACHER: dict[str, Any] = {**WHOLE, "accuracy": 0.9, "latency_ms": 2.0}
PLAIN = load(toys.recipe({"prune": {}})).recipe


@pytest.mark.parametrize(
    "stages",
    [
        [{"prune": {}}],
        [
            {"prune": {"keep": {"macs": 0.7}}},
            {"prune": {"keep": {"macs": 0.6, "params": 0.6}, "schedule": {"steps": 2}}},
        ],
        [{"repeat": {"times": 2, "stages": [{"prune": {}}]}}],
        [{"factorize": {"keep": {"params": 0.8}, "samples": 0}}],
    ],
)
def test_runs_leave_at_most_what_was_predicted(stages: list[dict[str, Any]], tmp_path: Path) -> None:
    loaded = load(toys.recipe(*stages, teacher={"model": "toys:net"}))
    found = predict(loaded.recipe, WHOLE, WHOLE, {})
    summary = run(loaded, tmp_path / "run").summary
    assert found
    for name in {"macs", "params"} & found.keys():
        left = summary["student"][name] / summary["teacher"][name]
        assert found[name] - 0.1 < left <= found[name] + 1e-9  # a network of 16 units is cut in steps of some percent


def test_what_cannot_be_told_is_left_out_and_what_is_known_better_wins() -> None:
    assert predict(PLAIN, WHOLE, WHOLE, {}) == {"macs": 0.5}
    known = {"macs": 248.0, "params": 297.5, "latency": 0.7}
    assert predict(PLAIN, WHOLE, WHOLE, known) == {"macs": 0.5, "params": 0.5, "bytes": 0.5, "latency": 0.7}
    energy = load(toys.recipe({"factorize": {"energy": 0.9}})).recipe
    assert predict(energy, WHOLE, WHOLE, {}) == {}
    controlled = toys.recipe({"prune": {"controlled": {"max_drop": 0.1}, "recover": toys.KD}})
    assert predict(load(controlled).recipe, WHOLE, WHOLE, {}) == {}
    rounds = {"times": 3, "until": {"max_drop": 0.1}, "stages": [{"prune": {"keep": {"macs": 0.7}}}]}
    assert predict(load(toys.recipe({"repeat": rounds})).recipe, WHOLE, WHOLE, {}) == {}
    joint = {**toys.KD, "prune": {}, "quantize": {}}
    assert predict(load(toys.recipe({"joint": joint})).recipe, WHOLE, WHOLE, {}) == {"macs": 0.5}
    nothing = load(toys.recipe({"quantize": {}})).recipe
    assert predict(nothing, WHOLE, WHOLE, {}) == {"macs": 1.0, "params": 1.0, "bytes": 0.25}
    few = load(toys.recipe({"quantize": {"scheme": "int4-weights"}})).recipe
    assert predict(few, WHOLE, WHOLE, {})["bytes"] == 0.125


def refusal(predicted: dict[str, float], asked: dict[str, float], rows: list[Row], costs: list[str]) -> str:
    return refused(predicted, PLAIN, asked, TEACHER, "accuracy", rows, costs)


def test_what_misses_the_target_by_its_costs_is_refused() -> None:
    assert "would keep 60.0% of the macs, the target is 50.0%" in refusal({"macs": 0.6}, {"macs": 0.5}, [], ["macs"])
    assert refusal({"macs": 0.5}, {"macs": 0.5}, [], ["macs"]) == ""
    assert "takes 90.0% of the time, the target is 70.0%" in refusal({"latency": 0.9}, {"latency": 0.7}, [], ["macs"])
    assert refusal({"latency": 0.9}, {"latency": 0.7, "runtime": "compile"}, [], ["macs"]) == ""
    assert "takes 1.8 ms, the target is 1 ms" in refusal({"latency": 0.9}, {"latency_ms": 1.0}, [], ["macs"])
    assert refusal({"latency": 0.5}, {"latency_ms": 1.0}, [], ["macs"]) == ""


def test_what_costs_more_than_the_best_there_is_is_refused() -> None:
    best = Row(3, "done", values=(0.92, 0.4), predicted={"macs": 0.4, "params": 0.5})
    assert "trial 3 costs no more" in refusal({"macs": 0.45}, {}, [best], ["macs"])
    assert refusal({"macs": 0.39}, {}, [best], ["macs"]) == ""
    assert refusal({"macs": 0.45, "params": 0.4}, {}, [best], ["macs", "params"]) == ""
    assert refusal({"macs": 0.45}, {}, [best], ["macs", "params"]) == ""  # of params nothing is known
    worse = Row(4, "done", values=(0.89, 0.4), predicted={"macs": 0.4})
    assert refusal({"macs": 0.45}, {}, [worse], ["macs"]) == ""  # the teacher is better


def test_what_is_far_behind_one_that_costs_no_more_is_hopeless() -> None:
    done = Row(1, "done", values=(0.9, 0.4), predicted={"macs": 0.4}, curve=((0.25, 0.6), (0.5, 0.8), (1.0, 0.9)))

    def judged(curve: list[tuple[float, float]], macs: float = 0.4, row: Row = done) -> str:
        return behind(curve, {"macs": macs}, [row], ["macs"], 0.05)

    assert "after 50% of its epochs it was at 0.7, trial 1, which costs no more, at 0.8" in judged([(0.5, 0.7)])
    assert judged([(0.5, 0.76)]) == ""
    assert judged([(0.3, 0.56)]) == ""  # compared with what the other was then, not later
    assert judged([(0.1, 0.1)]) == ""  # the other had not been measured
    assert judged([(0.5, 0.7)], macs=0.3) == ""
    assert judged([]) == ""
    assert judged([(0.5, 0.7)], row=Row(1, "stopped", curve=done.curve, predicted=done.predicted)) == ""
