"""Compressing a network that is at hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import toys
from torch import nn

import slivo
from slivo.errors import OutputError, SlivoError, TargetError
from slivo.recipe import Watch, compress

RECIPE = {"stages": [{"prune": {"criterion": "l1"}}, {"distill": toys.KD}]}


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return toys.net()


def test_the_model_is_left_untouched_and_the_target_is_met(net: nn.Module) -> None:
    before = copy.deepcopy(net.state_dict())
    result = slivo.compress(net, toys.task(), RECIPE, slivo.Target(macs=0.4))
    assert result.met
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.training
    assert not result.folder.exists()  # nothing was asked to be left


def test_with_a_folder_all_is_there_and_loads_by_the_callers_factory(net: nn.Module, tmp_path: Path) -> None:
    result = compress(net, toys.task(), RECIPE, slivo.Target(macs=0.4), out=tmp_path / "run")
    again = slivo.load(tmp_path / "run" / "student", factory=toys.net)
    inputs = torch.randn(4, 12)
    assert torch.equal(again.eval()(inputs), result.model(inputs))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["task"]["name"] == "points"
    with pytest.raises(OutputError):
        compress(net, toys.task(), RECIPE, slivo.Target(macs=0.4), out=tmp_path / "run")


def test_a_recipe_that_ships_runs_on_another_task(net: nn.Module) -> None:
    short = [f"stages.{place}=1" for place in ("0.prune.recover.epochs", "1.distill.epochs")]
    result = compress(net, toys.task(), settings=[*short, "stages.3={finetune: {epochs: 1}}", "stages.2={finetune: {epochs: 1}}"], target=slivo.Target(params=0.5))  # fmt: skip  # noqa: E501
    assert result.summary["student"]["params"] <= 0.5 * result.summary["teacher"]["params"]


def test_an_interrupted_compression_resumes(net: nn.Module, tmp_path: Path) -> None:
    class Interrupt(Watch):
        def started(self, label: str, index: int, count: int) -> None:
            if (label, index) == ("distill", 2) and count == 3:
                raise KeyboardInterrupt

    target = slivo.Target(macs=0.4)
    whole = compress(net, toys.task(), RECIPE, target)
    with pytest.raises(KeyboardInterrupt):
        compress(net, toys.task(), RECIPE, target, out=tmp_path / "run", watch=Interrupt())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["error"] == "interrupted"
    resumed = compress(net, toys.task(), RECIPE, target, out=tmp_path / "run", resume=True)
    inputs = torch.randn(4, 12)
    assert torch.equal(resumed.model(inputs), whole.model(inputs))


def test_a_model_that_was_cut_before_can_be_cut_again(net: nn.Module, tmp_path: Path) -> None:
    small = slivo.prune(net, torch.randn(2, 12), keep=slivo.Budget(macs=0.5))
    result = compress(small, toys.task(), RECIPE, slivo.Target(macs=0.5))
    assert result.met
    again = compress(small, toys.task(), RECIPE, slivo.Target(macs=0.5), out=tmp_path / "run")
    loaded = slivo.load(tmp_path / "run" / "student", factory=toys.net)
    inputs = torch.randn(4, 12)
    assert torch.equal(loaded.eval()(inputs), again.model(inputs))


def test_a_target_out_of_range_is_refused_at_once() -> None:
    with pytest.raises(TargetError, match="target max_drop is -1; how much of the task's metric may be lost"):
        slivo.Target(max_drop=-1)
    with pytest.raises(SlivoError, match="target macs is 'half'; a share between 0 and 1"):
        slivo.Target(macs="half")  # type: ignore[arg-type]
