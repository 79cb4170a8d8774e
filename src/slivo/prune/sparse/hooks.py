"""Hooks of a training that keeps a network sparse, makes it sparser step by step, or keeps its sparsity in a band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor, inf
from typing import Any

import torch
from torch import Tensor, nn

from slivo import edits
from slivo.edits.mask import Mask, Pattern
from slivo.errors import SlivoError
from slivo.options import is_count, is_number, said
from slivo.prune import criteria
from slivo.prune.schedule import steps
from slivo.prune.sparse.choice import Scope, Site, best, check_criterion, choose, score, sites
from slivo.prune.sparse.hold import zeros_of
from slivo.prune.sparse.masks import check_scope, check_sparsity, zero_
from slivo.train.hooks import Hook, TrainState

Kept = Mapping[str, Tensor]
"""For each weight what of it may be other than zero."""


class HoldMasks(Hook):
    """Keep the zeros of a sparse model (`slivo.sparsify`) through a training.

    Gradients of zeros are zeroed before the optimizer's step, so that no momentum gathers and none of it counts in a
    norm that is clipped after; after the step the weights are, so that nothing else revives them. Give it before hooks
    that read gradients and after those that change weights, such as `EMA`.

    Raises:
        SlivoError: When the training starts, if the model carries no mask.
    """

    def __init__(self) -> None:
        self.kept: Kept = {}

    def on_fit_start(self, state: TrainState) -> None:
        """Take the zeros as they are."""
        if state.epoch == 0:
            self.kept = zeros_of(state.model)

    def on_gradients(self, state: TrainState) -> None:
        """Zero the gradients of zeros."""
        parameters = dict(state.model.named_parameters(remove_duplicate=False))
        for name, stays in self.kept.items():
            grad = parameters[name].grad
            if grad is not None:
                grad.masked_fill_(~stays, 0)

    def on_step_end(self, state: TrainState) -> None:
        """Zero the weights again."""
        zero_(state.model, self.kept)

    def on_fit_end(self, state: TrainState) -> None:
        """Zero the weights that another hook may have left."""
        zero_(state.model, self.kept)

    def state_dict(self) -> dict[str, Any]:
        """Return the masks."""
        return {"kept": dict(self.kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the masks."""
        self.kept = state["kept"]


class GradualSparsity(HoldMasks):
    """Make a network sparse while it trains: gradual magnitude pruning.

    Args:
        sparsity: Share of zeros in the end, 0 to below 1.
        pattern: ``unstructured``, or blocks such as ``4x4``.
        criterion: As for `slivo.sparsify`, of the weights alone.
        scope: As for `slivo.sparsify`.
        start: When the first weights start to go, as a share of all steps.
        stop: When the last go. After it there should be time to recover.
        updates: In how many steps between the two, evenly spaced.
        min_keep: As for `slivo.sparsify`.
        only: As for `slivo.sparsify`.
        exclude: As for `slivo.sparsify`.

    The model carries a `slivo.edits.Mask` when the training ends. What is zero stays so; of a model that is sparse at
    the start, its zeros count.

    Source: Zhu, Gupta 2017, "To prune, or not to prune", arXiv:1710.01878, eq. 1, with s_i = 0:
    s_t = s·(1 − (1 − t)³), t from 0 to 1 between start and stop.
    """

    def __init__(
        self,
        sparsity: float,
        *,
        pattern: str = "unstructured",
        criterion: str | criteria.Criterion = "l1",
        scope: Scope = "global",
        start: float = 0.0,
        stop: float = 0.75,
        updates: int = 20,
        min_keep: float = 0.01,
        only: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if Pattern.parse(pattern).most is not None:
            raise SlivoError(f"pattern {pattern!r} has a sparsity of its own; slivo.sparsify, and train with HoldMasks")
        self.sparsity = check_sparsity(sparsity, pattern)
        check_scope(scope, min_keep)
        if not (is_number(start) and is_number(stop) and 0 <= start <= stop <= 1):
            raise SlivoError(f"GradualSparsity start and stop are {start} and {stop}; shares of the steps, in order")
        _check_count(updates, "updates")
        self.criterion = criteria.resolve(criterion)
        check_criterion(self.criterion)
        if self.criterion.needs_batches:
            raise SlivoError(
                f"criterion {self.criterion.name!r} needs {self.criterion.needs}; a hook has weights alone"
            )
        self.pattern, self.scope, self.min_keep = pattern, scope, min_keep
        self.start, self.stop, self.updates = start, stop, updates
        self.only, self.exclude = only, exclude

    def on_fit_start(self, state: TrainState) -> None:
        """Find the weights, and when how many of them go."""
        if state.epoch == 0:
            self.kept = {}
        self._sites = sites(state.model, self.pattern, only=self.only, exclude=self.exclude)
        shares = steps("cubic", self.updates, 1 - self.sparsity)
        times = [self.start + (self.stop - self.start) * (index + 1) / self.updates for index in range(self.updates)]
        # Where there are fewer steps than updates, the last update of a step counts.
        self._due = {
            max(1, round(time * state.total_steps)): 1 - share for time, share in zip(times, shares, strict=True)
        }

    def on_step_end(self, state: TrainState) -> None:
        """Choose what stays if it is time, and zero the rest."""
        if state.step in self._due:
            share = self.sparsity if state.step == max(self._due) else self._due[state.step]
            scores = score(state.model, self._sites, self.criterion)
            self.kept = choose(self._sites, scores, sparsity=share, scope=self.scope, min_keep=self.min_keep)
        super().on_step_end(state)

    def on_fit_end(self, state: TrainState) -> None:
        """Put the mask on record."""
        super().on_fit_end(state)
        _note_(state.model, self._sites)


class SparsityBand(HoldMasks):
    """Keep the share of zeros between two bounds while a network trains.

    At every so many steps, weights that have shrunk to nothing join the zeros. If there are now too few, the smallest
    of all weights go until there are exactly as many as the lower bound asks; if there are too many, those zeros whose
    gradients are greatest may grow again, from zero, until there are as many as the upper bound allows. Between,
    zeros stay zero. With pressure that drives weights to zero (an L1 penalty, decay) the pressure decides within the
    band; without, the network stays where it starts, or at the nearer bound.

    Args:
        low: Least share of zeros, 0 to below 1.
        high: Greatest share, not below ``low``.
        every: Steps from one look to the next; the first is at the first step.
        threshold: Weights of at most this absolute value have shrunk to nothing.
        only: Which weights, as for `slivo.sparsify`.
        exclude: Likewise.

    The model carries a `slivo.edits.Mask` when the training ends.

    Source: Growing by the gradient, Evci, Gale, Menick, Castro, Elsen 2019, "Rigging the Lottery", arXiv:1911.11134.
    """

    def __init__(
        self,
        low: float,
        high: float,
        *,
        every: int = 100,
        threshold: float = 0.0,
        only: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not (is_number(low) and is_number(high) and 0 <= low <= high < 1):
            raise SlivoError(
                f"SparsityBand is from {said(low)} to {said(high)}; shares of zeros, 0 to below 1, in order"
            )
        if not (is_number(threshold) and threshold >= 0):
            raise SlivoError(f"SparsityBand threshold is {said(threshold)}; an absolute value, 0 or above")
        _check_count(every, "every")
        self.low, self.high, self.every, self.threshold = low, high, every, threshold
        self.only, self.exclude = only, exclude

    def on_fit_start(self, state: TrainState) -> None:
        """Find the weights."""
        self._sites = sites(state.model, "unstructured", only=self.only, exclude=self.exclude)
        if state.epoch == 0:
            weights = dict(state.model.named_parameters())
            self.kept = {name: weights[name].detach() != 0 for name in self._sites}

    def on_gradients(self, state: TrainState) -> None:
        """Bring the share of zeros into the band if it is time, and zero the gradients of zeros."""
        if state.step % self.every == 0:
            weights = {name: each for name, each in state.model.named_parameters() if name in self._sites}
            self.kept = self._banded(weights)
        super().on_gradients(state)

    def on_fit_end(self, state: TrainState) -> None:
        """Put the mask on record."""
        super().on_fit_end(state)
        _note_(state.model, self._sites)

    def _banded(self, weights: Mapping[str, nn.Parameter]) -> Kept:
        home = next(iter(weights.values())).device
        size = torch.cat([each.detach().abs().flatten().float().to(home) for each in weights.values()])
        kept = torch.cat([self.kept[name].flatten().to(home) for name in weights]) & (size > self.threshold)
        count, left = len(kept), int(kept.sum())
        most, least = count - ceil(self.low * count - 1e-9), count - floor(self.high * count + 1e-9)
        if left > most:
            kept = best(size.masked_fill(~kept, -inf)[None], most)[0]
        elif left < least:
            slopes = [torch.zeros_like(each) if each.grad is None else each.grad for each in weights.values()]
            slope = torch.cat([each.detach().abs().flatten().float().to(home) for each in slopes])
            kept = kept | best(slope.masked_fill(kept, -inf)[None], least - left)[0]
        parts = torch.split(kept, [each.numel() for each in weights.values()])
        return {
            name: part.reshape(each.shape).to(each.device)
            for (name, each), part in zip(weights.items(), parts, strict=True)
        }


def _note_(model: nn.Module, found: Mapping[str, Site]) -> None:
    """Put a mask on a model's record, unless its last edit is the same."""
    mask = Mask({name: site.written for name, site in found.items()})
    if edits.record(model)[-1:] != (mask,):
        edits.replay(model, [mask])


def _check_count(value: object, what: str) -> None:
    if not is_count(value, least=1):
        raise SlivoError(f"{what} is {said(value)}; a whole number, 1 or more")
