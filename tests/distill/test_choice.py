"""Teachers are ranked by what a student learns of them in a trial, and nothing is left behind."""

import pytest
import torch
from torch import nn

from slivo.distill import rank_teachers
from slivo.distill.teacher import checksum
from slivo.errors import RecipeError, ShapeError


class Says(nn.Module):
    """Gives out logits that it looks up by the first feature."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, x):
        return self.table[(x[:, 0] > 0).long()]


torch.manual_seed(0)
X = torch.randn(120, 3)
Y = (X[:, 0] > 0).long()
GOOD = Says(torch.tensor([[3.0, -3.0], [-3.0, 3.0]]))
WRONG = Says(torch.tensor([[-3.0, 3.0], [3.0, -3.0]]))
SILENT = Says(torch.zeros(2, 2))


def student():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 2))


def rank(candidates, batch=(X, Y), **options):
    return rank_teachers(student(), candidates, batch, **{"lr": 0.02, **options})


def test_who_teaches_what_is_right_comes_first():
    found = rank({"wrong": WRONG, "silent": SILENT, "good": GOOD})
    assert [each.name for each in found] == ["good", "silent", "wrong"]
    by_name = {each.name: each for each in found}
    assert (by_name["good"].accuracy, by_name["wrong"].accuracy) == (1.0, 0.0)
    assert by_name["silent"].entropy == pytest.approx(0.6931, abs=1e-3)
    assert by_name["good"].entropy < 0.1
    assert all(each.gap >= 0 for each in found)
    assert str(found[0]).startswith("good: score -0.")


def test_nothing_is_left_behind_and_ranks_are_repeatable():
    model, random = student(), torch.get_rng_state()
    before = checksum(model), checksum(GOOD)
    first, again = (rank_teachers(model, {"good": GOOD, "silent": SILENT}, (X, Y), steps=5) for _ in range(2))
    assert first == again
    assert (checksum(model), checksum(GOOD)) == before
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    other = rank_teachers(model, {"silent": SILENT, "good": GOOD}, (X, Y), steps=5)
    assert {each.name: each for each in other} == {each.name: each for each in first}


def test_inputs_may_be_of_any_kind():
    plain = rank({"good": GOOD}, steps=3)
    named = rank({"good": GOOD}, ({"x": X, "more": 1}, Y), steps=3, forward=lambda model, given: model(given["x"]))
    paired = rank({"good": GOOD}, ((X, X), Y), steps=3, forward=lambda model, given: {"logits": model(given[0])})
    assert plain == named == paired


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (({},), {}, RecipeError, "there are 0 candidates"),
        (({"good": GOOD},), {"folds": 1}, RecipeError, "1 folds"),
        (({"good": GOOD},), {"steps": 0}, RecipeError, "0 steps"),
        (({"good": GOOD}, (X[:3], Y[:3])), {}, ShapeError, "there are 3 samples for 2 folds"),
        (({"wide": Says(torch.zeros(2, 3))},), {}, ShapeError, r"logits \(30, 2\) and the teacher \(120, 3\)"),
        (({"good": GOOD},), {"forward": lambda *_: "nothing"}, ShapeError, "puts out str without a tensor"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        rank(*arguments, **options)
