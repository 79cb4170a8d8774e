"""Passes through a model: what its layers read, part by part, and what becomes of its outputs when one is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slivo.edits.factorize import Factors, thin
from slivo.edits.swap import exchanged
from slivo.errors import SlivoError
from slivo.factorize.ladder import Ladder
from slivo.factorize.sites import Site
from slivo.factorize.solve import Basis, pieces
from slivo.graph import Call
from slivo.graph.inputs import fresh
from slivo.measure.blockwise import Replay, part_of, repeated, run_through
from slivo.measure.quality import distribution
from slivo.measure.readers import Watch, grams, key

_TRIED = (0.15, 0.4, 0.7)  # places on a ladder at which the drop is measured


def walk(
    model: nn.Module, sites: Mapping[str, Site], calls: Sequence[Call], hold: torch.device | str | None
) -> Iterator[tuple[str, dict[str, Tensor | None]]]:
    """Yield the parts of a model in the order in which they run, with what their layers read.

    Layers may be replaced in between; what comes later is measured behind them.

    Args:
        model: In evaluation mode.
        sites: The layers, in the order in which they run.
        calls: The batches; if there are none, nothing is measured.
        hold: Where outputs are kept between parts; None for where they are.

    Yields:
        The part's name; and for each layer in it the products XᵀX of what it reads, None if they were not seen.
    """
    if not calls:
        for name in sites:
            yield name, {name: None}
        return
    blocks = repeated(model)
    holders = {name: part_of(name, blocks) or name for name in sites}
    order = list(dict.fromkeys(holders.values()))
    for site in sites.values():  # the model is a copy: what is watched must lie in memory as usual
        site.layer.weight.data = site.layer.weight.data.contiguous()
    replay = Replay(model, run_through(model, order, calls[0]), calls, hold)
    for index, part in enumerate(order):
        names = {name: f"{name}.weight".lstrip(".") for name, holder in holders.items() if holder == part}
        watch = Watch({each: sites[name].layer.weight for name, each in names.items()}, grams, spread=False)
        replay.watch(index, watch)
        yield part, {name: _found(watch, each) for name, each in names.items()}


def _found(watch: Watch, name: str) -> Tensor | None:
    found = watch.found.pop(key(name, 1), None)
    if found is None:
        return None
    if not bool(found.isfinite().all()):
        raise SlivoError(
            f"what {name} reads is NaN or infinite on some sample; repair the model, or give other batches"
        )
    return found[0] if found.dim() == 3 else found


def fill_(layer: nn.Module, weights: Sequence[Tensor]) -> None:
    """Put weights into thin layers."""
    with torch.no_grad():
        for piece, weight in zip(layer.children(), weights, strict=True):
            piece.get_parameter("weight").copy_(weight)


class Sensitivity:
    """How far the outputs of a model move when one layer is factorized.

    Args:
        model: In evaluation mode, without gradients; its outputs on the batches are kept.
        calls: The batches.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call]) -> None:
        self.model, self.calls = model, calls
        self.before = [_output(self._run(call)) for call in calls]

    def weigh(self, found: Ladder, site: Site, bases: Mapping[str, Basis]) -> Ladder:
        """Return a ladder whose losses are drops: measured at a few choices, and in between as the losses are."""
        count = len(found.choices) - 1
        places = sorted({int(share * count) for share in _TRIED}) if count else []
        if not places:
            return found
        factors = [found.choices[place] for place in places]
        drops = [self._drop(site, each, bases[each.kind]) for each in factors if each is not None]
        ratio = np.log(np.maximum(drops, 1e-12)) - np.log(np.maximum(found.losses[places], 1e-12))
        return replace(found, losses=found.losses * np.exp(np.interp(range(count + 1), places, ratio)))

    def _drop(self, site: Site, factors: Factors, basis: Basis) -> float:
        new = thin(site.layer, factors, site.name)
        fill_(new, pieces(basis, factors.ranks))
        with exchanged(self.model, [(site.layer, new)]) as model:
            after = [_output(self._run(call, model)) for call in self.calls]
        moved = [_distance(one, other) for one, other in zip(self.before, after, strict=True)]
        return float(np.mean(moved))

    def _run(self, call: Call, model: nn.Module | None = None) -> Any:
        args, kwargs = fresh(call)
        return (model or self.model)(*args, **kwargs)


def _output(output: Any) -> tuple[bool, Tensor]:
    """Return logarithms of chances, or what else the model gives out; and whether it is the first."""
    try:
        return True, distribution(output)
    except SlivoError:
        leaves = [each for each in pytree.tree_leaves(output) if isinstance(each, Tensor) and each.is_floating_point()]
        if not leaves:
            raise
        return False, leaves[0].float()


def _distance(one: tuple[bool, Tensor], other: tuple[bool, Tensor]) -> float:
    """Return the divergence of chances, in nats, or the share of the squared output that changed."""
    (chances, before), (_, after) = one, other
    if chances:
        return float((before.exp() * (before - after)).nan_to_num().sum(-1).mean())
    return float((before - after).square().sum() / before.square().sum().clamp(min=1e-30))
