"""Recipes are read whole or refused with a message that names the place, what is allowed, and what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from toys import ALL_KINDS, recipe

from slivo.errors import RecipeError
from slivo.recipe import load, shipped

STAGES = "stages:\n  - distill: {losses: [kd], epochs: 1}\n"


def written(folder: Path, text: str) -> Path:
    file = folder / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("name", shipped())
def test_every_recipe_that_ships_is_valid_and_survives_being_written_down(name: str) -> None:
    loaded = load(name)
    assert loaded.recipe.name == name
    assert load(loaded.recipe.plain()).recipe == loaded.recipe


def test_a_file_and_a_mapping_of_the_same_content_are_the_same_recipe(tmp_path: Path) -> None:
    data = recipe(*ALL_KINDS)
    assert load(written(tmp_path, yaml.safe_dump(data))).recipe == load(data).recipe


def test_a_recipe_without_a_name_has_that_of_its_file(tmp_path: Path) -> None:
    assert load(written(tmp_path, STAGES)).recipe.name == "mine"


def test_a_mapping_is_not_changed_by_settings() -> None:
    data = recipe(*ALL_KINDS)
    before = yaml.safe_dump(data)
    load(data, ["target.macs=0.3"])
    assert yaml.safe_dump(data) == before


def test_settings_reach_every_place() -> None:
    changed = load(
        "prune-then-distill",
        [
            "teacher.fit.epochs=3",
            "stages.0.prune.keep.macs=0.4",
            "stages.1.distill.losses.0.kd.temperature=2",
            "name=x",
        ],
    ).recipe
    assert changed.teacher is not None
    assert changed.teacher.fit is not None
    assert changed.teacher.fit.epochs == 3
    assert changed.stages[0].prune is not None
    assert changed.stages[0].prune.keep is not None
    assert changed.stages[0].prune.keep.macs == 0.4
    assert changed.stages[1].distill is not None
    assert changed.stages[1].distill.losses == [{"kd": {"temperature": 2, "weight": 0.9}}]
    assert changed.name == "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (STAGES + "stagess: []\n", "mine.yaml:3: stagess is no key here; allowed: name, task, teacher, .*Did you mean stages?"),  # noqa: E501
        ("name: x\n", "mine.yaml:1: stages is missing; a list of stages"),
        ("stages: []\n", "mine.yaml:1: stages is \\[\\]; a list of stages"),
        ("stages: {}\n", "mine.yaml:1: stages is {}; a list of stages"),
        (STAGES + "target: {macs: 40}\n", "mine.yaml:3: target.macs is 40; a share between 0 and 1 .*Did you mean 0.4?"),  # noqa: E501
        (STAGES + "target:\n  macs: half\n", "mine.yaml:4: target.macs is 'half'; a share between 0 and 1"),
        (STAGES + "target: {max_drop: -1}\n", "target.max_drop is -1; how much of the task's metric may be lost"),
        (STAGES + "target: 3\n", "mine.yaml:3: target is 3; a mapping with macs"),
        ("stages:\n  - prun: {}\n", r"mine.yaml:2: stages\[0\].prun is no key here; allowed: prune, .*Did you mean prune?"),  # noqa: E501
        ("stages:\n  - distill: {losses: [kd], epochs: 0}\n", r"stages\[0\].distill.epochs is 0; a whole number, 1 or more"),  # noqa: E501
        ("stages:\n  - distill: {losses: [kd], epochs: '5'}\n", "epochs is '5'; a whole number, 1 or more"),
        ("stages:\n  - distill: {losses: [kd], epochs: true}\n", "epochs is True; a whole number, 1 or more"),
        ("stages:\n  - distill: {losses: [], epochs: 1}\n", "losses is \\[\\]; a list of losses"),
        ("stages:\n  - distill: {epochs: 1}\n", r"stages\[0\].distill.losses is missing; a list of losses"),
        ("stages:\n  - distill: {losses: [{kd: {}, mse: {}}], epochs: 1}\n", r"losses\[0\]|losses"),
        ("stages:\n  - finetune: {epochs: 1, optimizer: {kind: sdg}}\n", "kind is 'sdg'; sgd or adamw. Did you mean sgd?"),  # noqa: E501
        ("stages:\n  - 3\n", r"stages\[0\] is 3"),
        ("a: [\n", "mine.yaml:2: it is not valid YAML: "),
        ("- 1\n", "a recipe is a mapping with task, teacher, target and stages"),
        ("", "a recipe is a mapping with task, teacher, target and stages"),
        ("name: \x07\n", "mine.yaml:1: it is not valid YAML"),
        (STAGES + "name: a\nname: b\n", "mine.yaml:4: name is there twice, first on line 3; keep one"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load(written(tmp_path, text))
    assert str(caught.value).startswith(str(tmp_path))
    assert len(str(caught.value).splitlines()) <= 2


def test_more_than_one_mistake_is_counted(tmp_path: Path) -> None:
    text = "stages:\n  - distill: {losses: [kd], epochs: 0, batch_size: 0}\nnam: x\n"
    with pytest.raises(RecipeError, match=r"\(2 more like this\)"):
        load(written(tmp_path, text))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("target.macs", "--set target.macs: write key=value"),
        ("=3", "--set =3: write key=value"),
        ("target.macs=[", "--set target.macs=\\[: the value is not valid YAML"),
        ("stages.9.prune.samples=3", "--set stages.9.prune.samples=3: stages has items 0 to 3"),
        ("stages.x=3", "--set stages.x=3: stages has items 0 to 3"),
        ("name.x=3", "--set name.x=3: name is 'prune-then-distill' and has no keys|has no keys|name"),
        ("target.macs=7", "--set target.macs=7: target.macs is 7; a share"),
        ("stages.0.prune.criterion=tailor", "--set stages.0.prune.criterion=tailor: .* Did you mean taylor?"),
        ("foo=1", "--set foo=1: foo is no key here"),
    ],
)
def test_a_setting_that_is_wrong_is_named(setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load("prune-then-distill", [setting])


def test_a_name_that_is_nothing_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError,
        match=r"prune-then-destill is no file, and no recipe that ships: alternate, deep-compression, .*Did you mean prune-then-distill",  # noqa: E501
    ):
        load("prune-then-destill")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="it is not UTF-8 text"):
        load(tmp_path / "binary")
