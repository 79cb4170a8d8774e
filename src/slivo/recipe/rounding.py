"""The quantize stage: integers for weights, after a training with the rounding if asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from slivo.edits.quantize import Ranges
from slivo.quantize import QuantizationAware, quantize
from slivo.recipe.plan import Step
from slivo.recipe.schema import Quantize
from slivo.recipe.work import Details, Outcome, Work, distilled, sample_inputs


def run_quantize(work: Work, step: Step) -> Outcome:
    """Turn the student's weights into integers."""
    part = step.part
    assert isinstance(part, Quantize)
    batches = sample_inputs(work, part.samples)
    given = {"weight_bits": part.weight_bits, "group_size": part.group_size, "method": part.method}
    said = {name: value for name, value in given.items() if value is not None}
    details: Details = {"scheme": part.scheme, "samples": part.samples, **said}
    trained, learned = Outcome(work.student, {}, []), None
    if part.aware is not None:
        learned = rehearsal(part, batches)
        trained = distilled(work, step.label, part.aware, more=[learned])
        details["aware"] = trained.details
    ranges = None if learned is None else learned.ranges
    return Outcome(quantized(trained.student, part, batches, ranges), details, trained.history)


def rehearsal(part: Quantize, batches: Sequence[Any]) -> QuantizationAware:
    """Return what trains a network with the rounding of ``int8-static`` that a recipe asks for."""
    return QuantizationAware(batches, weight_bits=part.weight_bits or 7, exclude=part.exclude)


def quantized(
    model: nn.Module, part: Quantize, batches: Sequence[Any], ranges: Mapping[str, Ranges] | None
) -> nn.Module:
    """Return a model with integers for weights, as the recipe says."""
    return quantize(
        model,
        part.scheme,
        batches=batches,
        weight_bits=part.weight_bits,
        group_size=part.group_size,
        symmetric=part.symmetric,
        method=part.method,
        exclude=part.exclude,
        equalize=part.equalize,
        smooth=part.smooth,
        correct_bias=part.correct_bias,
        ranges=ranges,
    )
