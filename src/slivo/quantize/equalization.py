"""Equalization: channels of like ranges, so that one scale suits them all; the model computes what it did."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slivo import edits
from slivo.edits.quantize import Quantize
from slivo.errors import SlivoError
from slivo.graph.copies import duplicate
from slivo.options import calls_of, is_number, said
from slivo.quantize.calibrate import run
from slivo.quantize.plan import candidates, planned
from slivo.quantize.scaling import Group, Slices, extremes, groups, scale_

_ROUNDS = 30
_STEADY = 1e-3  # the greatest change of a factor's logarithm at which rounds end
_FURTHEST = 1e4  # no factor is further from 1: a channel that is next to nothing has no range to speak of


def fold(model: nn.Module, batch: Any) -> nn.Module:
    """Return a copy of a model whose batch norms are part of the layers before them, wherever that changes nothing.

    Args:
        model: Left untouched.
        batch: What it is called with.

    Returns:
        The copy, in evaluation mode, with the edit on its record if there is any; norms became identities.
    """
    folded = planned(model, batch).folded
    return (edits.apply(model, Quantize({}, folded)) if folded else duplicate(model)).eval()


def equalize(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Return a model that computes the same, whose channels have weights of like ranges before and behind.

    Where layers write an axis and layers read it, with nothing in between that sees a factor (`scaling`), each channel
    is divided where it is written and multiplied where it is read by ``s = sqrt(r_written / r_read)``: then both ranges
    are ``sqrt(r_written · r_read)``. Axes are balanced in turn until they rest. Residual streams count, too, as far as
    only rectifiers and additions are on them. Batch norms are folded first (`fold`).

    Args:
        model: A trained model; it is left untouched.
        batches: The first shows how the model is called; no values are looked at.

    Returns:
        The new model, in evaluation mode.

    Raises:
        SlivoError: If there are no batches.
        CaptureError: If the model cannot be captured.

    Source: Nagel, van Baalen, Blankevoort, Welling 2019, "Data-Free Quantization Through Weight Equalization and Bias
    Correction", arXiv:1906.04721, section 4.1, eq. 11.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.tensor([[8.0, 0], [0, 1]])), net[2].weight.fill_(2.0)
        >>> same = equalize(net, [torch.randn(4, 2)])
        >>> same[0].weight.abs().amax(1), same[2].weight.abs().amax(0)
        (tensor([4.0000, 1.4142], grad_fn=<AmaxBackward0>), tensor([4.0000, 1.4142], grad_fn=<AmaxBackward0>))
    """
    calls = calls_of(batches)
    made = fold(model, calls[0])
    found = [group for group in groups(made, calls[0]) if not all(each.vector for each in group.writers)]
    for _ in range(_ROUNDS):
        moved = 0.0
        for group in found:
            written, read = (_range(made, group, side) for side in ("writers", "readers"))
            factors = _bounded((written / read).sqrt())
            scale_(made, group, factors)
            moved = max(moved, float(factors.log().abs().max()))
        if moved < _STEADY:
            break
    return made


def smooth(model: nn.Module, batches: Iterable[Any], strength: float = 0.5) -> nn.Module:
    """Return a model that computes the same, with part of the range of activations moved into the weights.

    Of what norms write and layers read, channel i is divided by ``s = a^strength / w^(1 − strength)``, where a is its
    greatest activation and w the greatest weight that reads it. Activations of transformers have a few channels that
    are a hundred times as large as others, for which one scale of a tensor is far too coarse; weights have room.

    Args:
        model: A trained model; it is left untouched.
        batches: Real inputs, from which the ranges of activations come.
        strength: 0 to 1; 0.5 suits most, more where activations are the harder part.

    Returns:
        The new model, in evaluation mode.

    Raises:
        SlivoError: If there are no batches, or the strength is out of range.
        CaptureError: If the model cannot be captured.

    Source: Xiao, Lin, Seznec, Wu, Demouth, Han 2022, "SmoothQuant", arXiv:2211.10438, eq. 4.

    Example:
        >>> net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))
        >>> x = torch.randn(8, 4)
        >>> torch.allclose(smooth(net, [x])(x), net(x), atol=1e-6)
        True
    """
    if not is_number(strength) or not 0 <= strength <= 1:
        raise SlivoError(f"smooth is {said(strength)}; a number from 0 to 1 (0.5 suits most)")
    calls = calls_of(batches)
    made = fold(model, calls[0])
    found = [group for group in groups(made, calls[0]) if all(each.vector for each in group.writers)]
    modules = candidates(made)
    found = [group for group in found if all(_owner(each) in modules for each in group.readers)]
    names = {_owner(each) for group in found for each in group.readers}
    with _peaks({name: modules[name] for name in names}) as peaks:
        run(made, calls)
    for group in found:
        seen = [peaks[_owner(each)][torch.from_numpy(each.index)].amax(1) for each in group.readers]
        peak, read = torch.stack(seen).amax(0), _range(made, group, "readers")
        scale_(made, group, _bounded(peak**strength / read ** (1 - strength)))
    return made


def _owner(slices: Slices) -> str:
    return slices.tensor.rpartition(".")[0]


def _range(model: nn.Module, group: Group, side: str) -> Tensor:
    """Return the greatest weight of each position on a side of a group, float64, shape (size,)."""
    parameters = dict(model.named_parameters())
    slices: Sequence[Any] = getattr(group, side)
    found = [extremes(parameters[each.tensor], each) for each in slices if not each.vector]
    return torch.stack(found).amax(0).cpu()


def _bounded(factors: Tensor) -> Tensor:
    """Return factors within bounds; 1 where a channel has no range."""
    usable = factors.isfinite() & (factors > 0)
    return torch.where(usable, factors, 1.0).clamp(1 / _FURTHEST, _FURTHEST)


@contextmanager
def _peaks(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Watch the greatest magnitude of each channel that goes into layers, float64, shape (channels,)."""
    found: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))

    def watch(name: str, channel: int) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = next(iter((*args, *kwargs.values())))
            peak = x.detach().movedim(channel, 0).flatten(1).abs().amax(1)
            found[name] = torch.maximum(found[name], peak.double().cpu())

        return before

    with ExitStack() as stack:
        for name, module in modules.items():
            channel = -1 if type(module) is nn.Linear else 1
            handle = module.register_forward_pre_hook(watch(name, channel), with_kwargs=True)
            stack.callback(handle.remove)
        yield found
