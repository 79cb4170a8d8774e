"""Broken recipes: each is refused in one line that says where, whatever is wrong with it."""

from __future__ import annotations

import importlib
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slivo.errors import RecipeError
from slivo.recipe import Loaded, load
from slivo.recipe.prepare import prepare


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    path = list(sys.path)
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("fuzz_recipes")
    sys.modules.pop("fuzz_recipes")
    sys.path[:] = path


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_broken_recipe_is_refused_with_its_place_or_valid(script: Any, seed: int) -> None:
    _, text = script.broken(random.Random(seed), script.bases()[:4])
    with tempfile.TemporaryDirectory() as folder:
        end, told = script.judged(Path(folder) / "recipe.yaml", text)
    assert end in ("refused", "valid"), f"{told}\n{text}"


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_at_all_is_refused_with_its_place(script: Any, text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        end, told = script.judged(Path(folder) / "recipe.yaml", text)
    assert end == "refused", told


def test_the_script_counts_and_prepares(script: Any, tmp_path: Path) -> None:
    found, bad = script.fuzz(12, 3, tmp_path, prepares=1)
    assert not bad
    assert sum(number for (kind, _), number in found.items() if kind != "prepared") == 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nstages: &a [*a]\n", r":2: it holds itself, by an alias; write it out"),
        ("name: x\nstages:\n- 2001-99-99\n", r":3: '2001-99-99' is not valid YAML: month must be in 1..12"),
        (f"name: x\n\nstages: {'1' * 5000}\n", r":3: '1111.* is not valid YAML: Exceeds the limit"),
        ("name: x\nstages:\n  " + "[" * 3000, r":3: it is not valid YAML: more than 60 levels"),
        ("name: x\nstages: \x07\n", r":2: it is not valid YAML: special characters are not allowed"),
        ("name: x\nname: y\n", r":2: name is there twice, first on line 1; keep one"),
        ("- a\n- b\n", r":1: a recipe is a mapping with task"),
        ("", r":1: a recipe is a mapping with task"),
        (f'stages: [{{prune: {{}}}}]\n"{"x" * 20}\\u2028{"y" * 50}": 1\n', r":2: 'x+\\u2028y+… is no key here"),
        ("name: {[1]: 2}\n", r":1: it is not valid YAML: found unhashable key"),
        ("name: [\n", r":2: it is not valid YAML: expected the node content"),
        ("name: x\nstages: [{prune: {}}]\n1: 2\n", r":3: \[1\] is 1; Keys should be strings"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=rf"recipe\.yaml{message}"):
        load(tmp_path / "recipe.yaml")


def test_aliases_that_stand_for_too_much_are_refused_and_others_are_not(script: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(script.BOMB, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+: it holds more than 50000 values, by aliases of aliases"):
        load(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text(
        "target: {macs: 0.5}\nstages:\n- finetune: &fit {epochs: 2}\n- prune: {}\n- finetune: *fit\n", encoding="utf-8"
    )
    found = load(tmp_path / "recipe.yaml")
    assert isinstance(found, Loaded)
    assert found.recipe.stages[0] == found.recipe.stages[2]
    with pytest.raises(RecipeError, match="--set name=2001-99-99: the value is not valid YAML"):
        load(tmp_path / "recipe.yaml", ["name=2001-99-99"])


def test_a_network_that_refuses_its_arguments_is_named_with_its_place(tmp_path: Path) -> None:
    recipe = "task: {kind: image-classification, data: digits}\nteacher:\n  model: slivo.zoo:small_cnn\n"
    (tmp_path / "recipe.yaml").write_text(f"{recipe}  args: {{width: -3}}\nstages: [{{finetune: {{epochs: 1}}}}]\n")
    with pytest.raises(RecipeError, match=r"recipe.yaml:3: slivo.zoo:small_cnn cannot be called with") as caught:
        prepare(load(tmp_path / "recipe.yaml"))
    assert len(str(caught.value).splitlines()) == 1
