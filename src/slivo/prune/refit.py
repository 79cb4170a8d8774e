"""Refit: after a cut, set the weights that stay so that each layer computes what it did, in closed form."""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from slivo import edits
from slivo.errors import SlivoError
from slivo.graph import Call
from slivo.graph.capture import canonical_names, evaluating, trying
from slivo.graph.copies import duplicate
from slivo.options import calls_of, said
from slivo.prune.watch import LAYERS, NORMS, End, Pass, watch

_log = logging.getLogger("slivo")

_AHEAD = 8
"""Layers whose outputs one pass of the uncut model serves: the more, the fewer passes and the more memory."""

_ENTRIES = 1 << 25
"""Entries of a convolution's patches that are laid out at a time."""

_Shown = Sequence[tuple[Tensor, Tensor | None]]
"""For each call of a layer of the uncut model its output and what that was added to, of the channels that stay."""


@dataclass(frozen=True)
class _Site:
    """A layer to refit: how often it is called, which of its outputs stayed, and what comes right behind it.

    Behind it may be a batch norm of its own, and an addition.
    """

    name: str
    stays: Sequence[int] | None
    norm: str | None
    end: End


def refit(small: nn.Module, model: nn.Module, batches: Iterable[Any], *, ridge: float = 1e-3) -> nn.Module:
    """Return a pruned model whose weights make up for what was cut, by least squares and without labels or training.

    Every linear layer and convolution, from the first that reads a cut axis on, is set in order of execution: given
    what it now reads, it is to compute what the uncut layer did. Where its output is added to a residual stream, it is
    the sum that is to be as it was, so that errors made before are mended and do not pile up. Where a batch norm
    follows a layer without a bias, its running mean takes the constant part.

    Layers inside parts that were replaced by captured graphs, layers that share weights with others, and layers of
    other classes stay as they are.

    Args:
        small: What `prune` or `cut` returned, trained since or not; it is left untouched.
        model: The model that was cut; it is left untouched.
        batches: Example inputs, unlabelled, each as for `prune`; all are held in memory. A few hundred samples of what
            the model was trained on are enough: more than a layer has inputs, counting a sample once a position.
        ridge: Pull towards the weights as they are, relative to the mean square of what a layer reads. A thousandth
            holds back directions that the samples hardly show; more of it suits fewer samples.

    Returns:
        A new model of the same structure, with the same record of edits.

    Raises:
        SlivoError: If there are no batches, the ridge is no positive number, or the one was not cut from the other.

    Source: He, Zhang, Sun 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv:1707.06168, eq. 4
    (least squares) and section 3.3 (residual streams); the pull towards the weights is ours.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1)).double()
        >>> cut = edits.Cut({"0.weight": {0: [0, 2]}, "0.bias": {0: [0, 2]}, "1.weight": {1: [0, 2]}})
        >>> small, x = edits.apply(net, cut), torch.randn(50, 2, dtype=torch.float64)
        >>> mended = refit(small, net, [x], ridge=1e-9)
        >>> torch.allclose(mended(x), net(x)), torch.allclose(small(x), net(x))
        (True, False)
    """
    calls = calls_of(batches)
    if isinstance(ridge, bool) or not isinstance(ridge, Real) or not 0 < ridge < math.inf:
        raise SlivoError(f"ridge is {said(ridge)}; a positive number, 1e-3 for a few hundred samples")
    slices = _slices(small, model)
    with torch.inference_mode(False):
        new = duplicate(small)
        with trying(model), evaluating(new), torch.no_grad():
            sites = _sites(new, model, slices, calls[0])
            shown: dict[str, list[_Shown]] = {}
            for index, site in enumerate(sites):
                if site.name not in shown:
                    shown = _show(model, sites[index : index + _AHEAD], calls)
                _refit_(new, site, calls, shown.pop(site.name), ridge)
    if slices and not sites:
        _log.warning("nothing was refitted: no linear layer or convolution of its own reads what was cut")
    return new


def reestimate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Return a model whose batch norms have the mean and variance of given inputs, each batch counting the same.

    After a cut it helps a network that is not refitted. After `refit` it rather harms: what least squares cannot
    explain is missing from the variance, and scaling the rest up scales the error up.

    Args:
        model: Any model; it is left untouched.
        batches: Example inputs as for `refit`; large batches give better estimates.

    Returns:
        A new model, with the same record of edits; the same as before if it has no batch norms.

    Raises:
        SlivoError: If there are no batches.
    """
    calls = calls_of(batches)
    with torch.inference_mode(False):
        new = duplicate(model)
        norms = [each for each in new.modules() if isinstance(each, NORMS) and each.running_mean is not None]
        with evaluating(new), torch.no_grad():
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
                norm.train()
            for call in calls:
                watch(new, (), call)
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return new


def _slices(small: nn.Module, model: nn.Module) -> dict[str, dict[int, list[int]]]:
    """Return what stays of which tensor of the uncut model, whether it was cut once or several times."""
    before, after = edits.record(model), edits.record(small)
    if after[: len(before)] != before:
        raise SlivoError("the first model was not cut from the second; give refit(prune(model, …), model, batches)")
    found: dict[str, dict[int, list[int]]] = {}
    for edit in after[len(before) :]:
        if not isinstance(edit, edits.Cut):
            raise SlivoError(f"the model carries a {edit.kind!r} edit besides its cuts; refit it before that")
        for name, dims in edit.slices.items():
            known = found.setdefault(name, {})
            for dim, stays in dims.items():
                known[dim] = [known[dim][index] for index in stays] if dim in known else list(stays)
    return found


def _sites(
    new: nn.Module, model: nn.Module, slices: Mapping[str, Mapping[int, Sequence[int]]], call: Call
) -> list[_Site]:
    """Return the layers to refit, in order of execution: those from the first on that reads a cut axis."""
    uncut, names = dict(model.named_modules()), canonical_names(model)
    held = Counter(id(each) for module in new.modules() for each in module._parameters.values() if each is not None)
    layers = [
        name
        for name, module in new.named_modules()
        if type(module) in LAYERS
        and type(uncut.get(name, model)) is type(module)
        and "weight" in module._parameters
        and all(held[id(each)] == 1 for each in module.parameters(recurse=False))
    ]
    cuts = {name: slices.get(names[f"{name}.weight"], {}) for name in layers}
    sites = (
        _Site(name, cuts[name].get(0), passes[0].norm, End(len(passes), all(each.other is not None for each in passes)))
        for name, passes in watch(new, layers, call).items()
    )
    return list(itertools.dropwhile(lambda site: 1 not in cuts[site.name], sites))


def _show(model: nn.Module, sites: Sequence[_Site], calls: Sequence[Call]) -> dict[str, list[_Shown]]:
    """Run the uncut model on all batches; return for each layer what is to be reached on each."""
    found: dict[str, list[_Shown]] = {site.name: [] for site in sites}
    for call in calls:
        seen = watch(model, found, call, {site.name: site.end for site in sites})
        for site in sites:
            dim = -1 if isinstance(model.get_submodule(site.name), nn.Linear) else -_spatial(model, site.name) - 1
            passes = seen.get(site.name, [])
            found[site.name].append(
                [
                    (_kept(each.y, dim, site.stays), None if each.other is None else _kept(each.other, dim, site.stays))
                    for each in passes
                ]
            )
    return found


def _spatial(model: nn.Module, name: str) -> int:
    layer: Any = model.get_submodule(name)
    return len(layer.kernel_size)


def _kept(tensor: Tensor, dim: int, stays: Sequence[int] | None) -> Tensor:
    return tensor if stays is None else tensor.index_select(dim, torch.tensor(stays, device=tensor.device))


def _refit_(new: nn.Module, site: _Site, calls: Sequence[Call], shown: Sequence[_Shown], ridge: float) -> None:
    """Set the weights of one layer, the ones before it being set."""
    layer: Any = new.get_submodule(site.name)
    norm: Any = new.get_submodule(site.norm) if site.norm is not None else None
    sums = _Sums()
    for call, wanted in zip(calls, shown, strict=True):
        passes = watch(new, [site.name], call, {site.name: site.end}).get(site.name, [])
        if [each.y.shape for each in passes] != [y.shape for y, _ in wanted]:
            _log.warning("%s is not refitted: it is not called as it was, or on other samples", site.name)
            return
        for each, (y, other) in zip(passes, wanted, strict=True):
            sums.add(layer, each.x, _missing(norm, each, y, other))
    weight, constant = sums.solve(ridge, free=layer.bias is not None or norm is not None)
    layer.weight += weight.reshape(layer.weight.shape).to(layer.weight)
    if layer.bias is not None:
        layer.bias += constant.to(layer.bias)
    elif norm is not None:
        norm.running_mean -= constant.to(norm.running_mean)


def _missing(norm: Any, seen: Pass, y: Tensor, other: Tensor | None) -> Tensor:
    """Return what is to be added to a layer's output so that it, or the sum that it goes into, is as it was."""
    found = y - seen.y
    if other is None or seen.other is None or other.shape != seen.other.shape:
        return found
    behind = other - seen.other
    if norm is None:
        return found + behind
    # Through the batch norm: what it multiplies by is divided by, except where it multiplies by almost nothing.
    scale = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
    inverse = (norm.running_var + norm.eps).sqrt() / scale
    inverse = torch.where(scale.abs() > 1e-3 * scale.abs().max(), inverse, 0)
    return found + behind * inverse.reshape(-1, *[1] * (behind.dim() - 2))


class _Sums:
    """The normal equations of a layer, one set for each of its groups, in float64."""

    def __init__(self) -> None:
        self.rows = 0
        self.xx = self.xr = self.x = self.r = torch.zeros((), dtype=torch.float64)

    def add(self, layer: Any, x: Tensor, missing: Tensor) -> None:
        """Add what a layer read in one call, and what its output lacked."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        for read, lacked in _matrices(layer, x.to(dtype), missing.to(dtype)):
            self.rows += read.shape[-1]
            self.xx = self.xx + (read @ read.mT).cpu().double()
            self.xr = self.xr + (read @ lacked.mT).cpu().double()
            self.x = self.x + read.sum(-1, keepdim=True).cpu().double()
            self.r = self.r + lacked.sum(-1, keepdim=True).cpu().double()

    def solve(self, ridge: float, *, free: bool) -> tuple[Tensor, Tensor]:
        """Return what to add to the weights, shape (groups, outputs, inputs), and the constant, if it is free."""
        xx, xr, constant = self.xx, self.xr, torch.zeros_like(self.r)
        if free:
            xx, xr = xx - self.x @ self.x.mT / self.rows, xr - self.x @ self.r.mT / self.rows
        scale = xx.diagonal(dim1=-2, dim2=-1).mean(-1)
        scale = torch.where(scale > 0, scale, 1)  # of inputs that never change nothing is learned
        eye = torch.eye(xx.shape[-1], dtype=xx.dtype)
        factor, failed = torch.linalg.cholesky_ex(xx + (ridge * scale)[:, None, None] * eye)
        while bool(failed.any()) and ridge < 1:  # float32's rounding may be larger than a small ridge
            ridge *= 10
            factor, failed = torch.linalg.cholesky_ex(xx + (ridge * scale)[:, None, None] * eye)
        weight = torch.cholesky_solve(xr, factor).mT
        if bool(failed.any()) or not bool(weight.isfinite().all()):
            return torch.zeros_like(weight), constant.flatten()
        if free:
            constant = (self.r - weight @ self.x) / self.rows
        return weight, constant.flatten()


def _matrices(layer: Any, x: Tensor, missing: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and missing outputs of a layer, of shapes (groups, inputs, rows) and (groups, outputs, rows)."""
    if isinstance(layer, nn.Linear):
        yield x.reshape(1, -1, x.shape[-1]).mT, missing.reshape(1, -1, missing.shape[-1]).mT
        return
    spatial = len(layer.kernel_size)
    x, missing = (each if each.dim() > spatial + 1 else each[None] for each in (x, missing))
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    entries = layer.weight[0].numel() * layer.groups * math.prod(missing.shape[2:])
    count = max(1, _ENTRIES // max(1, entries))
    for read, lacked in zip(torch.split(x, count), torch.split(missing, count), strict=True):
        outputs = lacked.movedim(0, 1).reshape(layer.groups, lacked.shape[1] // layer.groups, -1)
        yield _patches(layer, read, lacked.shape[2:]), outputs


def _patches(layer: Any, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Lay out a padded input as the layer's weights see it, shape (groups, inputs of a group x kernel, rows)."""
    kernel = list(itertools.product(*map(range, layer.kernel_size)))
    found = x.new_empty(x.shape[1], len(kernel), x.shape[0], *sizes)
    for index, offsets in enumerate(kernel):
        window = [
            slice(offset * dilation, offset * dilation + (size - 1) * stride + 1, stride)
            for offset, dilation, size, stride in zip(offsets, layer.dilation, sizes, layer.stride, strict=True)
        ]
        found[:, index] = x.movedim(0, 1)[(slice(None), slice(None), *window)]
    return found.reshape(layer.groups, x.shape[1] // layer.groups * len(kernel), -1)
