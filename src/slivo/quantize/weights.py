"""Weights alone as codes: the nearest ones, or those that change least what layers compute on a few samples."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from slivo import edits
from slivo.edits.quantize import Layer, Quantize, QuantSpec
from slivo.edits.uniform import Coded, Grid, Sharing, from_codes
from slivo.errors import SlivoError
from slivo.graph.capture import trying
from slivo.graph.copies import duplicate
from slivo.measure.blockwise import Replay, part_of, repeated, run_order, run_through
from slivo.measure.hessian import check_damping
from slivo.measure.readers import Watch, grams, key, lay_out_
from slivo.options import calls_of, said
from slivo.quantize.awq import awq
from slivo.quantize.gptq import gptq
from slivo.quantize.plan import Plan

_log = logging.getLogger("slivo")

Method = Literal["round", "gptq", "awq"]


@dataclass(frozen=True)
class Weights:
    """How weights are rounded; `slivo.quantize` says what each is.

    Raises:
        SlivoError: If something is out of its range, or does not go together.
    """

    bits: int
    sharing: Sharing = "channel"
    symmetric: bool = True
    method: Method = "round"
    damping: float = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        _ = self.grid
        if self.method not in get_args(Method):
            raise SlivoError(f"method is {said(self.method)}; one of {', '.join(get_args(Method))}")
        if self.method != "round" and self.sharing == "tensor":
            raise SlivoError(f"{self.method} has no use for one scale a tensor; give group_size='channel', or a count")
        check_damping(self.damping)

    @property
    def grid(self) -> Grid:
        """Which numbers weights can be."""
        return Grid(self.bits, self.symmetric, self.sharing)

    def spec(self, layer: Layer) -> QuantSpec:
        """Return how a layer is stored; a group that is a whole row, or more, is none."""
        group = self.sharing if isinstance(self.sharing, int) else None
        return QuantSpec(
            self.bits,
            None if self.sharing == "tensor" else 0,
            group_size=None if group is None or group >= layer.weight[0].numel() else group,
            symmetric=self.symmetric,
            packed=self.bits < 8,
            divided=self.method == "awq",
        )


def weight_only(model: nn.Module, found: Plan, batches: Sequence[Any], how: Weights) -> Quantize:
    """Return the edit that stores weights as codes, and decodes them when they are used."""
    specs = {name: how.spec(cast(Layer, model.get_submodule(name))) for name in found.layers}
    edit = Quantize(specs, found.folded)
    return edit if how.method == "round" else replace(edit, codes=calibrated(model, edit, batches, how))


def calibrated(model: nn.Module, edit: Quantize, batches: Sequence[Any], how: Weights) -> dict[str, Coded]:
    """Return the codes of layers, found part by part; what each part reads is measured behind the rounded ones.

    Args:
        model: Left untouched.
        edit: Which layers, and how.
        batches: What the model is called with.
        how: The method and its options.
    """
    calls = calls_of(batches)
    with torch.inference_mode(False):
        new = lay_out_(edits.replay(duplicate(model), (Quantize({}, edit.folded),)))
        blocks = repeated(new)
        names = {name: f"{name}.weight".lstrip(".") for name in edit.modules}
        weights = {names[name]: cast(Layer, new.get_submodule(name)).weight for name in edit.modules}
        parts = {weight: part_of(weight, blocks) or name for name, weight in names.items()}
        codes: dict[str, Coded] = {}
        with trying(new):
            order = run_order(new, weights, parts, calls[0])
            replay = Replay(new, run_through(new, order, calls[0]), calls)
            for index, part in enumerate(order):
                here = {name: weight for name, weight in names.items() if parts[weight] == part}
                watch = Watch({weight: weights[weight] for weight in here.values()}, _statistic, spread=False)
                replay.watch(index, watch)
                codes |= _settled(new, here, watch.found, edit, how)
    rounded = [name for name in edit.modules if name not in codes]
    if rounded:
        _log.warning("%s are rounded to the nearest codes: no product with their weights was seen", ", ".join(rounded))
    return codes


def _settled(
    model: nn.Module, names: Mapping[str, str], seen: dict[str, Tensor], edit: Quantize, how: Weights
) -> dict[str, Coded]:
    """Find the codes of a part's layers, and put in their weights what the codes say."""
    codes = {}
    for name, weight in names.items():
        found = seen.pop(key(weight, 1), None)
        if found is None:
            continue
        if not bool(found.isfinite().all()):
            raise SlivoError(f"what {name} reads is NaN or infinite on some sample; repair the model, or give others")
        layer, grid = cast(Layer, model.get_submodule(name)), edit.modules[name].grid
        codes[name] = _coded(layer, found, grid, how)
        _set_(layer, codes[name], grid)
    return codes


def _statistic(activations: Tensor) -> Tensor:
    """Products of all columns with one another, and below them the sums of magnitudes."""
    return torch.cat([grams(activations), activations.abs().sum(1, keepdim=True)], 1)


def _coded(layer: Layer, seen: Tensor, grid: Grid, how: Weights) -> Coded:
    """Return the codes of a layer, of what its groups of channels read."""
    weight = layer.weight.detach().float()
    gram, sums = seen[:, :-1], seen[:, -1]
    matrices = weight.reshape(len(gram), -1, gram.shape[1])
    if how.method == "awq":
        level = sums.reshape(len(gram), weight.shape[1], -1).sum(2)
        found = awq(matrices, gram, level, grid)
        return replace(found, codes=found.codes.reshape(weight.shape))
    each = [
        gptq(matrix, one, grid, damping=how.damping, act_order=how.act_order)
        for matrix, one in zip(matrices, gram, strict=True)
    ]
    points = [one.zero_point for one in each if one.zero_point is not None]
    codes = torch.cat([one.codes for one in each]).reshape(weight.shape)
    return Coded(codes, torch.cat([one.scale for one in each]), torch.cat(points) if points else None)


def _set_(layer: Layer, coded: Coded, grid: Grid) -> None:
    """Put in a layer's weight what codes say."""
    weight = from_codes(coded.codes, grid, coded.scale, coded.zero_point)
    if coded.divisor is not None:
        divisor = coded.divisor.reshape(getattr(layer, "groups", 1), 1, -1, *[1] * (weight.dim() - 2))
        weight = (weight.reshape(len(divisor), -1, *weight.shape[1:]) / divisor).reshape(weight.shape)
    with torch.no_grad():
        layer.weight.copy_(weight)
