"""The JSON Schema of recipes: it takes what `load` takes, refuses what has another form, and is the one in the docs."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toys
import yaml

from slivo.errors import RecipeError
from slivo.recipe import json_schema, load, shipped

SCHEMA = json_schema()
KNOWN = {
    "$schema", "$defs", "$ref", "title", "description", "default", "type", "properties", "required", "enum", "const",
    "additionalProperties", "anyOf", "items", "minItems", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "minProperties", "maxProperties",
}  # fmt: skip
TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
    "null": type(None),
}  # fmt: skip


def faults(value: Any, schema: dict[str, Any], at: str = "") -> Iterator[str]:
    """What a schema refuses, for the words that ours has (JSON Schema 2020-12, validation)."""
    assert schema.keys() <= KNOWN, schema.keys() - KNOWN
    if "$ref" in schema:
        yield from faults(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], at)
    if "anyOf" in schema and all(list(faults(value, each, at)) for each in schema["anyOf"]):
        yield f"{at}: none of several"
    kind = schema.get("type")
    whole = kind == "boolean" or not isinstance(value, bool)
    if kind is not None and not (isinstance(value, TYPES[kind]) and whole):
        yield f"{at}: no {kind}"
        return
    if ("enum" in schema and value not in schema["enum"]) or ("const" in schema and value != schema["const"]):
        yield f"{at}: another value"
    if isinstance(value, int | float):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        above, below = schema.get("exclusiveMinimum", value - 1), schema.get("exclusiveMaximum", value + 1)
        if not (low <= value <= high and above < value < below):
            yield f"{at}: out of range"
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield f"{at}: too few"
        for index, item in enumerate(value):
            yield from faults(item, schema.get("items", {}), f"{at}[{index}]")
    if isinstance(value, dict):
        count = len(value)
        if not schema.get("minProperties", 0) <= count <= schema.get("maxProperties", count):
            yield f"{at}: {count} keys"
        yield from (f"{at}: lacks {name}" for name in schema.get("required", []) if name not in value)
        others = schema.get("additionalProperties", True)
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name, others)
            if inner is False:
                yield f"{at}.{name}: unknown"
            elif inner is not True:
                yield from faults(item, inner, f"{at}.{name}")


VALID = {
    **{name: yaml.safe_load(text) for name, text in shipped().items()},
    "all kinds": toys.recipe(*toys.ALL_KINDS),
    "short": toys.recipe({"distill": {"losses": ["kd", {"kd": None}], "epochs": 1, "cache": True}}),
}


@pytest.mark.parametrize("name", VALID)
def test_valid_recipes_are_valid_as_written_and_as_a_run_writes_them_down(name: str) -> None:
    assert not list(faults(VALID[name], SCHEMA))
    plain = load(VALID[name]).recipe.plain()
    assert not list(faults(json.loads(json.dumps(plain)), SCHEMA))


@pytest.mark.parametrize(
    "change",
    [
        {"stage": []}, {"stages": []}, {"stages": None}, {"stages": [{}]}, {"stages": [{"prune": {}, "export": {}}]},
        {"stages": [{"prune": {"kep": {}}}]}, {"stages": [{"finetune": {"epochs": 0}}]}, {"target": {"macs": 7}},
        {"stages": [{"finetune": {"epochs": True}}]}, {"stages": [{"quantize": {"method": "gtpq"}}]}, {"task": 3},
        {"stages": [{"distill": {"losses": "kd", "epochs": 1}}]}, {"teacher": {"args": {}}},
    ],
    ids=str,
)  # fmt: skip
def test_what_has_another_form_is_refused_by_both(change: dict[str, Any]) -> None:
    recipe = {**copy.deepcopy(VALID["all kinds"]), **change}
    assert list(faults(recipe, SCHEMA))
    with pytest.raises(RecipeError):
        load(recipe)


def test_every_key_is_explained() -> None:
    lacking = [
        f"{part}.{key}"
        for part, schema in {**SCHEMA["$defs"], "": SCHEMA}.items()
        for key, each in schema.get("properties", {}).items()
        if "description" not in each and "$ref" not in each
    ]
    assert lacking == []


def test_the_schema_in_the_docs_is_that_of_the_code() -> None:
    file = Path(__file__).parents[2] / "docs" / "recipe.schema.json"
    assert json.loads(file.read_text(encoding="utf-8")) == SCHEMA, "slivo recipes --schema > docs/recipe.schema.json"
