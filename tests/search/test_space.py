"""The space: what is derived from a recipe is valid whatever is chosen, and mistakes are said where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import toys

from slivo.errors import RecipeError
from slivo.recipe import load, shipped
from slivo.search.derive import Choice, Span
from slivo.search.space import SHAPED, Arm, arms, epochs, first_guesses, shapeable, suggest


class Dice:
    """Chooses at random, or what it is told to; keeps what was asked."""

    def __init__(self, seed: int, told: dict[str, Any] | None = None) -> None:
        self.random, self.told, self.asked = np.random.default_rng(seed), told or {}, dict[str, Any]()

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        assert name not in self.asked
        drawn = choices[int(self.random.integers(len(choices)))]
        self.asked[name] = self.told.get(name, drawn)
        assert self.asked[name] in choices
        return self.asked[name]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        assert low < high
        assert low > 0 or not log
        self.asked[name] = self.told.get(name, float(self.random.uniform(low, high)))
        return self.asked[name]

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        assert low > 0 or not log
        self.asked[name] = int(self.random.integers(low, high + 1))
        return self.asked[name]


@pytest.mark.parametrize("name", shipped())
def test_whatever_is_chosen_of_a_recipe_that_ships_is_a_valid_recipe(name: str) -> None:
    recipe = load(name).recipe
    found = arms(recipe)
    # That one needs a student of its own.
    fitting = [other for other in shipped() if other != "pruned-teacher" or recipe.student.model is not None]
    names = [arm.name for arm in found]
    assert names == ["recipe", *fitting] or (recipe.target.macs is None and set(names) < {"recipe", *fitting})
    assert len(found[0].parameters) >= 4
    for seed in range(4):
        chosen = suggest(Dice(seed), found)
        valid = load(chosen.plain).recipe
        assert valid.search is None
        assert valid.task == recipe.task
        assert 0.4 * epochs(recipe) <= epochs(valid) <= 1.1 * epochs(recipe) + 8


def test_all_kinds_of_stages_have_something_to_vary() -> None:
    recipe = toys.recipe(
        {"prune": {"keep": {"params": 0.5}, "pressure": {"kind": "l1", "strength": 0.1, "epochs": 1}}},
        {"factorize": {"keep": {"macs": 0.8}}},
        {"factorize": {"energy": 0.99}},
        {"finetune": {"epochs": 1, "optimizer": {"kind": "adamw"}}},
        {"share": {"clusters": 16}},
        {"quantize": {"scheme": "int4-weights"}},
    )
    names = {each.name for each in arms(load(recipe).recipe)[0].parameters}
    assert names == {
        "stages.0.prune.keep.params", "stages.0.prune.criterion", "stages.0.prune.scope",
        "stages.0.prune.pressure.optimizer.lr", "stages.1.factorize.keep.macs", "stages.1.factorize.method",
        "stages.1.factorize.by", "stages.2.factorize.energy", "stages.2.factorize.method",
        "stages.3.finetune.optimizer.lr", "stages.4.share.clusters", "stages.5.quantize.weight_bits",
        "stages.5.quantize.method",
    }  # fmt: skip
    for seed in range(8):
        load(suggest(Dice(seed), arms(load({**recipe, "search": {"strategies": []}}).recipe)).plain)


def said(**search: Any) -> list[Arm]:
    return arms(load(toys.recipe({"prune": {}}, {"distill": toys.KD}, search=search)).recipe)


def test_what_a_recipe_says_is_varied_and_nothing_else() -> None:
    found = said(
        vary={
            "stages.0.prune.criterion": ["l1", "l2"],
            "stages.1.distill.losses": [["kd"], [{"kd": {"temperature": 2.0}}]],
            "stages.1.distill.epochs": {"low": 1, "high": 3},
            "target.macs": {"low": 0.2, "high": 0.6, "log": True},
        }
    )
    assert len(found) == 1
    assert found[0].prune is None
    assert found[0].parameters == (
        Choice("stages.0.prune.criterion", ("l1", "l2"), "l2"),
        Choice("stages.1.distill.losses", (["kd"], [{"kd": {"temperature": 2.0}}])),
        Span("stages.1.distill.epochs", 1, 3, False, 2),
        Span("target.macs", 0.2, 0.6, True, 0.5),
    )
    for seed in range(4):
        chosen = suggest(Dice(seed), found)
        assert chosen.settings["stages.1.distill.epochs"] in (1, 2, 3)
        assert load(chosen.plain).recipe.target.macs == chosen.settings["target.macs"]
    assert list(first_guesses(found)) == [
        {"stages.0.prune.criterion": "l2", "stages.1.distill.epochs": 2, "target.macs": 0.5}
    ]


def test_strategies_and_widths_can_be_asked_for() -> None:
    found = said(vary={"stages.0.prune.scope": ["global", "uniform"]}, widths=True, strategies=["alternate"])
    assert [arm.name for arm in found] == ["recipe", "alternate"]
    assert found[0].parameters == (Choice("stages.0.prune.scope", ("global", "uniform", SHAPED), "global"),)
    guesses = list(first_guesses(found))
    assert [guess["stages.0.prune.scope"] for guess in guesses] == ["global", "uniform", SHAPED]
    assert {guess["strategy"] for guess in guesses} == {"recipe"}
    dice = Dice(0, guesses[2] | {"stages.0.prune.widths.cost": 0.1})
    chosen = suggest(dice, found)
    assert chosen.shape is not None
    assert chosen.shape.cost == 0.1
    assert chosen.prune == ("stages", 0, "prune")
    assert said(vary={}, widths=False, strategies=[])[0].parameters == ()
    other = Dice(0, {"strategy": "alternate"})
    assert suggest(other, found).strategy == "alternate"
    assert all(name == "strategy" or name.startswith("alternate:") for name in other.asked)


@pytest.mark.parametrize(
    ("stages", "place"),
    [
        ([{"prune": {}}], 0),
        ([{"finetune": {"epochs": 1}}, {"prune": {}}], 1),
        ([{"prune": {}}, {"prune": {}}], None),
        ([{"repeat": {"times": 2, "stages": [{"prune": {}}]}}], None),
        ([{"factorize": {"energy": 0.9}}, {"prune": {}}], None),
        ([{"prune": {"keep": {"latency": 0.5}}}], None),
        ([{"prune": {"recover": toys.KD, "controlled": {"max_drop": 0.1}}}], None),
        ([{"finetune": {"epochs": 1}}], None),
        ([{"drop": {"keep": {"macs": 0.9}}}, {"prune": {}}], None),
    ],
)
def test_widths_are_for_recipes_that_prune_once(stages: list[dict[str, Any]], place: int | None) -> None:
    found = shapeable(load(toys.recipe(*stages)).recipe)
    assert found == (None if place is None else ("stages", place, "prune"))


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (
            {"vary": {"stages.0.prune.criterion": ["l2", "taylr"]}},
            r"criterion\[1\] makes no valid .* Did you mean taylor",
        ),
        ({"vary": {"stages.0.prune.critrion": ["l2"]}}, r"critrion\[0\] makes no valid .* Did you mean criterion"),
        ({"vary": {"stages.7.prune": [{}]}}, "is no key of this recipe: stages has items 0 to 1"),
        ({"vary": {"target.macs": {"low": 0.2, "high": 7}}}, "target.macs.high makes no valid .* Did you mean 0.7"),
        ({"vary": {"target.macs": {"low": 0.6, "high": 0.2}}}, "is from 0.6 to 0.2; low must be below high"),
        ({"vary": {"target.macs": {"low": 0.0, "high": 0.2, "log": True}}}, "is 0.0; above 0 where log is true"),
        ({"vary": {"target.macs": {"low": 0.2, "hi": 0.3}}}, "a mapping of keys such as target.macs to lists"),
        ({"vary": {"target.macs": 3}}, "a mapping of keys such as target.macs to lists"),
        ({"vary": {"task.data": ["digits"]}}, "cannot be varied; trials share task and teacher"),
        ({"varied": {}}, "search.varied is no key here; allowed: vary, .* Did you mean vary"),
        ({"objectives": ["mac"]}, r"objectives\[0\] is 'mac'; a list of costs"),
        ({"objectives": ["macs", "macs"]}, "has macs twice; once"),
        ({"strategies": ["alternat"]}, r"strategies\[0\] is 'alternat'; .* Did you mean alternate"),
        ({"margin": -1}, "search.margin is -1; a share of the metric"),
        ({"widths": 2}, "search.widths is 2; true to set widths"),
    ],
)
def test_mistakes_are_said_where_they_are(search: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(toys.recipe({"prune": {}}, {"distill": toys.KD}, search=search))
