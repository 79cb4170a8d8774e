"""Post-training quantization: no training, a few batches to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from slivo import edits
from slivo.edits.quantize import ActivationSpec, Quantize, QuantSpec, Ranges
from slivo.edits.uniform import Sharing
from slivo.errors import SlivoError
from slivo.quantize import equalization
from slivo.quantize.calibrate import Site, best_range, observe
from slivo.quantize.correct import correct_biases_
from slivo.quantize.plan import Plan, planned
from slivo.quantize.weights import Method, Weights, weight_only


def quantize(
    model: nn.Module,
    scheme: str = "int8-static",
    *,
    batches: Iterable[Any],
    weight_bits: int | None = None,
    group_size: Sharing | None = None,
    symmetric: bool | None = None,
    method: Method | None = None,
    damping: float | None = None,
    act_order: bool | None = None,
    exclude: Sequence[str] = (),
    equalize: bool = False,
    smooth: float | None = None,
    correct_bias: bool = False,
    ranges: Mapping[str, Ranges] | None = None,
) -> nn.Module:
    """Return a model whose linear layers and convolutions hold integer codes.

    Batch norms are folded into the layers before them first. Layers with tied weights, layers that are not called,
    and all other modules stay in floating point.

    Args:
        model: The trained model; it is left untouched.
        scheme: ``int8-static`` rounds weights and activations, for integer kernels; ``int8-weights`` rounds the
            weights alone: a quarter of the bytes, and the speed of floating point; ``int4-weights`` an eighth, in
            groups. Codes of fewer than eight bits are stored bit behind bit, and unpacked when they are used.
            ``int8-dynamic`` rounds the weights of linear layers, and their inputs as they come, each batch by its own
            range: nothing is calibrated.
        batches: What the model is called with, some tens to hundreds of samples of the data it will see: tensors,
            tuples of positional arguments or mappings of keyword arguments. Ranges of activations come from them.
        weight_bits: Width of the weights' codes, 2-8. Default: that of the name; but 7 for ``int8-static`` and
            ``int8-dynamic``, because integer kernels of x86 processors without VNNI add two products in 16 bits, which
            eight-bit weights overflow: results would be silently wrong there (not slightly: sums are cut off).
        group_size: Of the schemes of weights alone: how many consecutive weights of an output have a scale for
            themselves; the last group may be smaller. Or ``channel`` (default of ``int8-weights``), or ``tensor``.
            ``int4-weights`` has 64: 16 bits of a scale for 256 of codes, and coarse steps where there is one outlier,
            not in a whole row.
        symmetric: Of the same: whether zero is the code 0 (default), or has one that is found, for weights that lean
            to one side. Exact zeros stay exact zeros in both.
        method: Of the same: ``round`` takes the nearest codes (default); ``gptq`` and ``awq`` those that change least
            what each layer computes on the batches, see `slivo.quantize.gptq.gptq` and `slivo.quantize.awq.awq`.
        damping: Of ``gptq``: what is added to the diagonal of XᵀX, as a share of its mean; 0.01 if None.
        act_order: Of ``gptq``: whether inputs of most energy come first; so it is if None.
        exclude: Globs over module paths; what they match stays in floating point.
        equalize: Give the channels weights of like ranges first (`slivo.quantize.equalize`): for depthwise
            convolutions and few bits.
        smooth: Move so much of the range of activations into the weights first (`slivo.quantize.smooth`): 0.5 for
            transformers; None for none of it.
        correct_bias: Take back by biases what rounding shifts the mean of each channel by.
        ranges: Ranges of activations for some layers, such as `QuantizationAware` learned, in place of calibrated
            ones.

    Returns:
        A new model that carries the edit (`slivo.edits.record`), in evaluation mode, ready for `slivo.save` and for
        export.

    Raises:
        SlivoError: If the scheme is unknown, an option is out of its range or not one of the scheme, there are no
            batches, a glob matches nothing, or there is nothing to quantize.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> small = quantize(net, batches=[torch.randn(16, 4)])
        >>> small[0].weight_codes.dtype, net[0].weight.dtype
        (torch.int8, torch.float32)
    """
    if scheme not in SCHEMES:
        raise SlivoError(f"{scheme!r} is no scheme of quantization; there are {', '.join(SCHEMES)}")
    given = {
        "sharing": group_size, "symmetric": symmetric, "method": method, "damping": damping, "act_order": act_order,
    }  # fmt: skip
    how = _weights(scheme, {name: value for name, value in given.items() if value is not None}, weight_bits)
    calibration = list(batches)
    if not calibration:
        raise SlivoError("there are no batches to calibrate on; give at least one batch of real inputs")
    if equalize:
        model = equalization.equalize(model, calibration)
    if smooth is not None:
        model = equalization.smooth(model, calibration, smooth)
    found = planned(model, calibration[0], exclude)
    if not found.layers:
        raise SlivoError(
            f"{type(model).__name__} has nothing to quantize: no linear layer or convolution with a weight of its "
            "own is called on the first batch, or all are excluded"
        )
    if how is not None:
        edit = weight_only(model, found, calibration, how)
    else:
        edit = ROUNDED[scheme](model, found, calibration, weight_bits)
    edit = replace(edit, ranges={**edit.ranges, **(ranges or {})})
    made = edits.apply(model, edit).eval()
    if correct_bias:
        correct_biases_(made, edits.apply(model, Quantize({}, edit.folded)), calibration)
    return made


def int8_static(model: nn.Module, found: Plan, batches: Sequence[Any], weight_bits: int | None) -> Quantize:
    """Weights and activations as integers, with ranges fixed beforehand."""
    spec, modules = ActivationSpec(), dict(model.named_modules())
    behind = {layer: norm for norm, layer in found.folded.items()}
    inputs = {name: Site(name, modules[name], "input") for name in found.layers}
    outputs = {
        name: Site(name, modules[behind.get(name, name)], "output", positive)
        for name, positive in found.rounded.items()
    }
    observe(model, [*inputs.values(), *outputs.values()], batches)
    bits = 7 if weight_bits is None else weight_bits
    specs = {name: QuantSpec(bits, 0, spec, spec if name in outputs else None) for name in found.layers}
    ranges = {
        name: Ranges(
            best_range(inputs[name], spec.bits),
            best_range(outputs[name], spec.bits) if name in outputs else None,
        )
        for name in found.layers
    }
    return Quantize(specs, found.folded, ranges)


def int8_dynamic(model: nn.Module, found: Plan, batches: Sequence[Any], weight_bits: int | None) -> Quantize:
    """Weights of linear layers as integers, and their inputs, too, with the range of each batch."""
    del batches
    modules = dict(model.named_modules())
    linear = [name for name in found.layers if type(modules[name]) is nn.Linear]
    if not linear:
        raise SlivoError(
            f"{type(model).__name__} has nothing for int8-dynamic, which takes linear layers alone: runtimes are "
            "slower with convolutions of that kind than in floating point; choose int8-static"
        )
    spec = QuantSpec(7 if weight_bits is None else weight_bits, 0, ActivationSpec(dynamic=True))
    folded = {norm: layer for norm, layer in found.folded.items() if layer in linear}
    return Quantize(dict.fromkeys(linear, spec), folded)


ROUNDED: Mapping[str, Callable[[nn.Module, Plan, Sequence[Any], int | None], Quantize]] = {
    scheme.__name__.replace("_", "-"): scheme for scheme in (int8_static, int8_dynamic)
}
"""The schemes that round activations, by name: functions of the model, the plan, the batches and the weights' width."""

WEIGHTS: Mapping[str, Weights] = {"int8-weights": Weights(8), "int4-weights": Weights(4, 64)}
"""The schemes of weights alone, by name, with their defaults."""

SCHEMES = (*ROUNDED, *WEIGHTS)
"""Names of the schemes."""


def _weights(scheme: str, given: dict[str, Any], bits: int | None) -> Weights | None:
    """Return how the weights are rounded if nothing else is, with what the caller gives in place of defaults."""
    if scheme in WEIGHTS:
        if bits is not None:
            given["bits"] = bits
        return replace(WEIGHTS[scheme], **given)
    if given:
        name = next(iter(given)).replace("sharing", "group_size")
        raise SlivoError(f"{name} is an option of {', '.join(WEIGHTS)}; {scheme} has it not: leave it out")
    return None
