"""A recipe laid out as steps: in order, with goals that add up to what was asked."""

from __future__ import annotations

from typing import Any

import pytest
from toys import KD, recipe

from slivo.recipe import load
from slivo.recipe.plan import Goal, Step, plan


def steps(*stages: dict[str, Any], **parts: Any) -> list[Step]:
    return plan(load(recipe(*stages, **parts)).recipe)


def goals(found: list[Step]) -> list[Goal]:
    return [step.goal for step in found if step.goal is not None]


def test_the_steps_of_a_schedule_end_at_what_is_kept() -> None:
    keep = {"macs": 0.4, "params": 0.5}
    found = steps({"prune": {"keep": keep, "schedule": {"kind": "linear", "steps": 3}, "recover": KD}}, {"export": {}})
    labels = ["teacher", "prune 1/3", "recover 1/3", "prune 2/3", "recover 2/3", "prune 3/3", "recover 3/3", "export"]
    assert [step.label for step in found] == labels
    assert [goal.macs for goal in goals(found)] == pytest.approx([0.8, 0.6, 0.4])
    assert [goal.params for goal in goals(found)] == pytest.approx([5 / 6, 4 / 6, 0.5])
    assert {goal.since for goal in goals(found)} == {1}  # shares of what the student had when the stage began


def test_bytes_and_latency_have_steps_too() -> None:
    keep = {"bytes": 0.4, "latency": 0.5}
    found = goals(steps({"prune": {"keep": keep, "schedule": {"kind": "linear", "steps": 2}}}))
    assert [goal.bytes for goal in found] == pytest.approx([0.7, 0.4])
    assert [goal.latency for goal in found] == pytest.approx([0.75, 0.5])
    assert all(goal.macs is None and goal.latency_ms is None for goal in found)
    assert [goal.latency_ms for goal in goals(steps({"prune": {"keep": {"latency_ms": 3.0}}}))] == [3.0]


def test_stages_without_a_budget_share_the_target_in_equal_ratios() -> None:
    found = steps({"repeat": {"times": 3, "stages": [{"prune": {}}, {"distill": KD}]}}, target={"macs": 0.2})
    assert [step.label for step in found[1:3]] == ["prune, round 1/3", "distill, round 1/3"]
    shares = [goal.macs for goal in goals(found)]
    assert shares == pytest.approx([0.2 ** (1 / 3), 0.2 ** (2 / 3), 0.2])
    assert all(goal.since is None and goal.params is None for goal in goals(found))  # of the teacher


def test_a_schedule_inside_a_round_starts_where_the_round_before_ended() -> None:
    prune = {"schedule": {"kind": "exponential", "steps": 2}}
    found = goals(steps({"repeat": {"times": 2, "stages": [{"prune": prune}]}}, target={"params": 0.16}))
    assert [goal.params for goal in found] == pytest.approx([0.16**0.25, 0.4, 0.16**0.75, 0.16])


def test_the_parts_of_a_network_have_one_goal() -> None:
    found = steps({"layers": {"groups": 3, "stages": [{"prune": {}}, {"distill": KD}]}}, target={"macs": 0.3})
    assert [goal.macs for goal in goals(found)] == pytest.approx([0.3] * 3)
    pieces = [step.piece for step in found if step.kind == "prune"]
    assert [(piece.index, piece.count) for piece in pieces if piece is not None] == [(0, 3), (1, 3), (2, 3)]
    assert [step.label for step in found[-2:]] == ["prune, part 3/3", "distill, part 3/3"]
    modules = steps({"layers": {"modules": [["first"], ["second", "head"]], "stages": [{"prune": {}}]}})
    assert [step.piece.count for step in modules if step.piece is not None] == [2, 2]


def test_every_step_says_where_it_comes_from() -> None:
    found = steps({"repeat": {"times": 1, "stages": [{"distill": KD}]}}, {"quantize": {}})
    assert [step.path for step in found[1:]] == [
        ("stages", 0, "repeat", "stages", 0, "distill"), ("stages", 1, "quantize"),
    ]  # fmt: skip
