"""Plans are what a pruning would do: written, compared, edited and replayed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from zoo import build

import slivo
from slivo import edits
from slivo.errors import ArtifactError, ShapeError
from slivo.prune import Plan, cut, plan

HALF = slivo.Budget(macs=0.5)


@pytest.mark.parametrize("name", ["ResNet", "Transformer"])
def test_a_cut_by_a_plan_from_a_file_is_the_pruning(name: str, tmp_path: Path) -> None:
    model, x = build(name)
    found = plan(model, x, keep=HALF)
    again = Plan.read(found.write(tmp_path / "plan.json"))
    assert again == found
    small, direct = cut(model, x, again), slivo.prune(model, x, keep=HALF)
    assert edits.record(small) == edits.record(direct)
    assert all(map(torch.equal, small.state_dict().values(), direct.state_dict().values()))
    assert set(found.keep) == {axis.name for axis in slivo.trace(model, x).prunable}


def test_a_plan_can_be_edited_by_hand(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 3)
    file = plan(model, x, keep=slivo.Budget(macs=1.0)).write(tmp_path / "plan.json")
    assert '"0 out": {"size": 8, "keep": "0-7"}' in file.read_text()
    file.write_text(file.read_text().replace("0-7", "1, 4-6"))
    small = cut(model, x, Plan.read(file))
    assert torch.equal(small[0].weight, model[0].weight[[1, 4, 5, 6]])
    assert Plan.read(file).cuts == {"0 out": (1, 4, 5, 6)}
    with pytest.raises(ShapeError, match=r"plan is for an axis '0 out' of 8 positions, the model's has 4; .* twice"):
        cut(small, x, Plan.read(file))


@given(st.dictionaries(st.text(), st.sets(st.integers(0, 50), min_size=1), max_size=4))
def test_every_plan_survives_being_written(kept: dict[str, set[int]]) -> None:
    found = Plan(dict.fromkeys(kept, 51), {name: tuple(sorted(each)) for name, each in kept.items()})
    assert Plan.from_text(found.text()) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is no plan"),
        ("[]", "it is no plan"),
        ('{"format": 1}', "it is no plan: 'axes'"),
        ('{"format": 2, "axes": {}}', "format 2; this version reads 1"),
        ('{"format": 1, "axes": {"a": {"size": 3, "keep": "0-x"}}}', "written as '0-2, 5'"),
        ('{"format": 1, "axes": {"a": {"size": 3, "keep": ""}}}', "written as '0-2, 5'"),
        ('{"format": 1, "axes": {"a": {"size": 3, "keep": "2-1"}}}', "keeps one or more"),
        ('{"format": 1, "axes": {"a": {"size": 3, "keep": "0-3"}}}', "axis 'a' has 3 positions"),
        ('{"format": 1, "axes": {"a": {"size": 3, "keep": "1, 1"}}}', "each once"),
    ],
)
def test_what_is_no_plan_is_refused_with_its_file(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises((ArtifactError, ShapeError), match=message) as caught:
        Plan.read(file)
    assert str(file) in str(caught.value)


def test_a_plan_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"plan.json cannot be read: No such file"):
        Plan.read(tmp_path / "plan.json")
