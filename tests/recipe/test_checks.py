"""What no schema can say: names that do not exist and orders that make no sense are refused before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
from toys import KD, PRUNE, recipe

from slivo.errors import RecipeError
from slivo.recipe import load

LAYERS = {"groups": 2, "stages": [{"prune": {}}]}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{}], r"stages\[0\] has nothing; a stage is a mapping with one key, one of: prune, drop, distill"),
        ([{"prune": PRUNE, "distill": KD}], r"stages\[0\] has prune and distill; a stage is a mapping with one key"),
        ([{"prune": {"criterion": "tailor"}}], r"criterion is 'tailor'; one of: .*Did you mean taylor"),
        ([{"prune": {"keep": {}}}], r"prune.keep is empty; give macs, params, bytes or latency"),
        ([{"prune": {"keep": {"latency": 0.5, "latency_ms": 2.0}}}], "latency, a share, and latency_ms, milliseconds; give one"),  # noqa: E501
        ([{"prune": {"keep": {"latency_ms": 2.0}, "schedule": {"steps": 2}}}], "has latency_ms and several steps"),
        ([{"prune": {"keep": {"latency": 3}}}], r"latency is 3; a share between 0 and 1 .*Did you mean 0.3"),
        ([{"prune": {"min_width": {"*": 1.5}}}], "min_width is .*a share of an axis .* or a mapping of globs"),
        ([{"prune": {"recover": {**KD, "losses": ["kdd"]}}}], r"recover.losses\[0\] is not valid: no loss is called 'kdd'"),  # noqa: E501
        ([{"distill": {**KD, "losses": [{"kd": {"temprature": 2}}]}}], r"losses\[0\] is not valid: .*temperature"),
        ([{"distill": {**KD, "losses": [{"kd": {"temperature": -2}}]}}], r"losses\[0\] is not valid: .*temperature"),
        ([{"quantize": {"scheme": "int7"}}], r"scheme is 'int7'; one of: int8-static, int8-dynamic, int8-w"),
        ([{"quantize": {"method": "gptq"}}], r"method goes with int8-weights or int4-weights; int8-static has it not"),
        ([{"quantize": {}}, {"distill": KD}], r"stages\[1\] comes after quantize; .* put distill before it"),
        ([{"export": {}}, {"quantize": {}}], r"stages\[1\] comes after export; .* put quantize before it"),
        ([{"repeat": {"times": 2, "stages": [{"quantize": {}}]}}], "is a quantize stage inside repeat; it belongs after it"),  # noqa: E501
        ([{"layers": {**LAYERS, "modules": [["a"]]}}], "needs groups, a number of parts, or modules"),
        ([{"layers": {"stages": [{"prune": {}}]}}], "needs groups, a number of parts, or modules"),
        ([{"layers": {**LAYERS, "stages": [{"distill": KD}]}}], "has 0 prune stages; exactly one"),
        ([{"layers": {**LAYERS, "stages": [{"prune": {"schedule": {"steps": 2}}}]}}], "prunes in several steps"),
        ([{"layers": {**LAYERS, "stages": [{"prune": {"only": ["x"]}}]}}], "a prune stage with only"),
        ([{"layers": {**LAYERS, "stages": [{"prune": {}}, {"layers": LAYERS}]}}], "holds layers or repeat"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(recipe(*stages))


def test_a_prune_stage_needs_to_know_how_much() -> None:
    with pytest.raises(RecipeError, match="has no keep, and target asks for neither macs nor params"):
        load(recipe({"prune": {}}, target={"max_drop": 0.01}))


def test_a_student_is_the_teacher_or_another_model_not_both() -> None:
    with pytest.raises(RecipeError, match="student has from and model; give one"):
        load(recipe({"distill": KD}, student={"from": "teacher", "model": "toys:net"}))
