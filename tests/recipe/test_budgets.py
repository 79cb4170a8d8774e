"""Budgets of a recipe beyond MACs and parameters: bytes, latency, and least widths of layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toys
from torch import Tensor, nn

from slivo.errors import TargetError
from slivo.measure import cost
from slivo.recipe import Result, load, run


def pruned(folder: Path, prune: dict[str, Any], **parts: Any) -> tuple[Result, list[dict[str, Any]]]:
    """Run a recipe that prunes; return its result, and its prune steps."""
    teacher = {"model": "toys:net", "args": {"width": 40}, "fit": {"epochs": 1}}
    result = run(load(toys.recipe({"prune": prune}, teacher=teacher, target={}, **parts)), folder)
    stages = json.loads((folder / "run.json").read_text())["stages"]
    return result, [stage for stage in stages if stage["kind"] == "prune"]


def test_bytes_are_kept_to(tmp_path: Path) -> None:
    keep = {"bytes": 0.5}
    result, steps = pruned(tmp_path / "run", {"keep": keep, "schedule": {"kind": "linear", "steps": 2}})
    before = steps[0]["before"]["bytes"]
    assert [step["after"]["bytes"] / before for step in steps] == pytest.approx([0.75, 0.5], abs=0.02)
    assert cost(result.model, (toys.task().example_inputs)).size_bytes <= 0.5 * before


def test_layers_have_least_widths_of_their_own(tmp_path: Path) -> None:
    prune = {"keep": {"params": 0.3}, "min_width": {"first*": 0.75, "*": 1}}
    assert pruned(tmp_path / "run", prune)[0].model.first[0].out_features >= 30
    with pytest.raises(TargetError, match="cannot be met"):
        pruned(tmp_path / "other", {"keep": {"params": 0.3}, "min_width": {"*": 0.75}})


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """In place of the clock, a machine whose time is the number of weights; what it was to call models with."""
    seen = []

    def clock(inputs: tuple[Any, ...]) -> Callable[[nn.Module], float]:
        seen.append(inputs)
        return lambda model: float(sum(each.weight.numel() for each in model.modules() if isinstance(each, nn.Linear)))

    monkeypatch.setattr("slivo.recipe.cuts.clock", clock)
    return seen


def weights(model: nn.Module) -> int:
    return sum(each.weight.numel() for each in model.modules() if isinstance(each, nn.Linear))


def test_latency_is_a_share_of_what_it_was_when_the_stage_began(tmp_path: Path, clocks: list[tuple[Any, ...]]) -> None:
    prune = {"keep": {"latency": 0.4}, "schedule": {"kind": "linear", "steps": 3}, "recover": toys.KD}
    result, steps = pruned(tmp_path / "run", prune)
    whole = weights(toys.net(40))
    achieved = 1.0
    for step, share in zip(steps, (0.8, 0.6, 0.4), strict=True):
        achieved *= step["details"]["latency"]
        assert 0.94 * share <= achieved <= 1.001 * share  # one unit is some percent
    assert 0.94 * 0.4 <= weights(result.model) / whole <= 0.4
    assert all(isinstance(x, Tensor) and len(x) == 1 for (x,) in clocks)


def test_milliseconds(tmp_path: Path, clocks: list[tuple[Any, ...]]) -> None:
    whole = weights(toys.net(40))
    result, _ = pruned(tmp_path / "run", {"keep": {"latency_ms": 0.5 * whole, "macs": 0.9}})
    assert 0.94 * 0.5 <= weights(result.model) / whole <= 0.5
    assert clocks
