"""Mixed precision: how much each layer suffers from being quantized, and which may be, by what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn

from slivo import edits
from slivo.edits.quantize import Quantize
from slivo.edits.swap import exchanged
from slivo.errors import SlivoError, TargetError
from slivo.graph import Call
from slivo.graph.capture import evaluating
from slivo.measure.quality import distribution
from slivo.options import calls_of, is_count, is_number, said
from slivo.quantize.post import quantize

Metric = Callable[[nn.Module], float]
"""How good a model is; more is better."""


@dataclass(frozen=True)
class Damage:
    """What quantizing one layer does.

    Args:
        layer: Its path.
        damage: What it does to the model when it alone is quantized: Kullback-Leibler divergence in nats, or by how
            much the metric falls.
        bytes: Of the layer's tensors as it is, with the batch norm that is folded into it.
        quantized_bytes: The same once it is quantized.
    """

    layer: str
    damage: float
    bytes: int
    quantized_bytes: int


@dataclass(frozen=True)
class Mixed:
    """A model of which the layers are quantized that suffer least.

    Args:
        model: The model.
        layers: What was measured of each layer, those that suffer least first.
        kept: The layers that stay in floating point.
        damage: What quantizing the others together does.
        bytes: Of all tensors of the model.
    """

    model: nn.Module
    layers: tuple[Damage, ...]
    kept: tuple[str, ...]
    damage: float
    bytes: int


def sensitivity(
    model: nn.Module,
    scheme: str = "int8-static",
    *,
    batches: Iterable[Any],
    metric: Metric | None = None,
    **options: Any,
) -> tuple[Damage, ...]:
    """Measure for each layer what quantizing it alone does to the model.

    Args:
        model: A trained model; it is left untouched.
        scheme: As in `slivo.quantize`.
        batches: Real inputs; ranges come from them, and the damage is measured on them: the Kullback-Leibler divergence
            of the distribution that the model gives out from the one that it gave out before, mean over all samples.
        metric: Measures a model in its stead, more is better.
        options: Others of `slivo.quantize`: ``weight_bits``, ``exclude``.

    Returns:
        One for each layer, those that suffer least first.

    Raises:
        SlivoError: As `slivo.quantize`; or if the model gives out no logits and there is no metric.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> sorted(each.layer for each in sensitivity(net, batches=[torch.randn(16, 4)]))
        ['0', '2']
    """
    calls = calls_of(batches)
    whole = quantize(model, scheme, batches=calls, **options)
    edit = edits.record(whole)[-1]
    assert isinstance(edit, Quantize)
    base = edits.apply(model, Quantize({}, edit.folded)).eval()
    judge = _judge(base, calls, metric)
    behind = {layer: model.get_submodule(norm) for norm, layer in edit.folded.items()}
    found = []
    for name in edit.modules:
        old, new = base.get_submodule(name), whole.get_submodule(name)
        before = _bytes(model.get_submodule(name)) + (_bytes(behind[name]) if name in behind else 0)
        with exchanged(base, [(old, new)]) as one:
            found.append(Damage(name, judge(one), before, _bytes(new)))
    return tuple(sorted(found, key=lambda each: each.damage))


def mixed(
    model: nn.Module,
    scheme: str = "int8-static",
    *,
    batches: Iterable[Any],
    max_bytes: int | None = None,
    max_damage: float | None = None,
    metric: Metric | None = None,
    **options: Any,
) -> Mixed:
    """Quantize the layers that suffer least, until a model is small enough, or as many as it bears.

    Args:
        model: A trained model; it is left untouched.
        scheme: As in `slivo.quantize`.
        batches: As in `sensitivity`.
        max_bytes: Quantize no more layers than it takes for all tensors to have so few bytes.
        max_damage: Quantize as many layers as the model bears with so much damage, measured on them together. The
            number is searched by halving, as if each layer did more damage. One of the two is given.
        metric: As in `sensitivity`.
        options: Others of `slivo.quantize`: ``weight_bits``, ``exclude``.

    Returns:
        The model, with what was measured of each layer. What stays in floating point is as it was.

    Raises:
        TargetError: If all layers quantized are not small enough, or the least sensitive alone does too much damage.
        SlivoError: As `sensitivity`; or if not one of the limits is given.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> found = mixed(net, batches=[torch.randn(16, 4)], max_damage=1.0)
        >>> found.kept, found.damage < 1
        ((), True)
    """
    _check(max_bytes, max_damage)
    calls = calls_of(batches)
    found = sensitivity(model, scheme, batches=calls, metric=metric, **options)
    judge = _judge(model, calls, metric)
    given: Sequence[str] = options.pop("exclude", ())
    excluded = [given] if isinstance(given, str) else [*given]

    def made(count: int) -> nn.Module:
        kept = [escape(each.layer) for each in found[count:]]
        return quantize(model, scheme, batches=calls, exclude=[*excluded, *kept], **options)

    if max_bytes is not None:
        count = _few(found, _bytes(model), max_bytes)
    else:
        assert max_damage is not None
        count = _many(lambda count: judge(made(count)) <= max_damage, len(found))
        if not count:
            raise TargetError(f"quantizing {found[0].layer} alone does damage of {found[0].damage:.3g}; allow more")
    if not count:
        raise SlivoError(f"the model has {_bytes(model)} bytes, max_bytes is {max_bytes}: there is nothing to quantize")
    new = made(count)
    while max_bytes is not None and _bytes(new) > max_bytes:  # by what bias and norms become, a little
        if count == len(found):
            raise TargetError(f"with all layers quantized there are {_bytes(new)} bytes; max_bytes is {max_bytes}")
        count += 1
        new = made(count)
    return Mixed(new, found, tuple(each.layer for each in found[count:]), judge(new), _bytes(new))


def _check(max_bytes: object, max_damage: object) -> None:
    if (max_bytes is None) == (max_damage is None):
        raise SlivoError("give max_bytes, for a model of so many bytes at most, or max_damage; one of them")
    if max_bytes is not None and not is_count(max_bytes, least=1):
        raise SlivoError(f"max_bytes is {said(max_bytes)}; a whole number of bytes")
    if max_damage is not None and not (is_number(max_damage) and max_damage >= 0):
        raise SlivoError(f"max_damage is {said(max_damage)}; a number of at least 0")


def _judge(base: nn.Module, calls: Sequence[Call], metric: Metric | None) -> Metric:
    """Return what measures the damage of a model, less being better."""
    if metric is not None:
        best = float(metric(base))
        return lambda model: best - float(metric(model))
    wanted = [_logits(base, call) for call in calls]

    def divergence(model: nn.Module) -> float:
        total, count = 0.0, 0
        for call, right in zip(calls, wanted, strict=True):
            rows = (right.exp() * (right - _logits(model, call))).sum(-1)
            total, count = total + float(rows.sum()), count + rows.numel()
        return total / count

    return divergence


def _logits(model: nn.Module, call: Call) -> Tensor:
    with evaluating(model), torch.no_grad():
        return distribution(model(*call.args, **call.kwargs), torch.float64)


def _few(found: Sequence[Damage], size: int, limit: int) -> int:
    """Return how many layers it takes."""
    for count, each in enumerate(found):
        if size <= limit:
            return count
        size -= each.bytes - each.quantized_bytes
    return len(found)


def _many(borne: Callable[[int], bool], most: int) -> int:
    """Return how many layers a model bears: all, or the most of those tried by halving."""
    if borne(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if borne(middle) else (low, middle)
    return low


def _bytes(module: nn.Module) -> int:
    """Return the bytes of a module's tensors, each counted once."""
    tensors = {id(each): each for each in (*module.parameters(), *module.buffers())}
    return sum(each.numel() * each.element_size() for each in tensors.values())
