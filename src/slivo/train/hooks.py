"""Hooks: what may happen at the fixed points of a training beside the loss and the step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from slivo.errors import SlivoError


@dataclass
class TrainState:
    """Where a training stands; hooks may read all of it and change the model and the optimizer.

    Attributes:
        model: The model in training.
        optimizer: Its optimizer.
        scheduler: Of the learning rate.
        epochs: How many there will be.
        total_steps: How many there will be.
        epoch: Number of the running epoch, from 1; 0 before the first.
        step: Steps that are done.
        terms: The last step's terms of the loss.
        history: One row for each epoch that is done.
        setbacks: One note for each time that the training went back to its last good epoch.
        save: A hook sets it in `Hook.on_step_end` to have a checkpoint written in the midst of the epoch.
        stop: Likewise, to have the training broken off (`Stopped`) once that is written.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: LambdaLR
    epochs: int
    total_steps: int
    epoch: int = 0
    step: int = 0
    terms: Mapping[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    setbacks: list[dict[str, Any]] = field(default_factory=list)
    save: bool = False
    stop: bool = False


class Stopped(KeyboardInterrupt):
    """A training was asked to stop, and did; what was done is in its checkpoint."""


class Hook:
    """Does nothing at every point; a hook overrides the points it needs.

    A training that resumes restores `load_state_dict` first and then calls `on_fit_start` with the epoch it goes on
    from; what must happen only once is done where ``state.epoch == 0``. So does one that goes back to its last good
    epoch. A checkpoint may be written after any step. State is nested dicts, lists, tuples, numbers, strings and
    tensors.
    """

    def on_fit_start(self, state: TrainState) -> None:
        """Before the first step of this process."""

    def on_step_start(self, state: TrainState) -> None:
        """Before the forward pass."""

    def on_gradients(self, state: TrainState) -> None:
        """After the backward pass, before the optimizer's step."""

    def on_step_end(self, state: TrainState) -> None:
        """After the optimizer's step; ``state.step`` counts it."""

    def on_epoch_end(self, state: TrainState) -> None:
        """After validation; the epoch's row is the last of ``state.history``."""

    def on_fit_end(self, state: TrainState) -> None:
        """After the last epoch; not when a training is broken off."""

    def on_close(self, state: TrainState) -> None:
        """At the very end, also when a training is broken off: what was put on the model goes."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the hook must remember to resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""


class Saves(Hook):
    """Have a checkpoint written in the midst of epochs: every so often, and when the training is to stop.

    Args:
        every: Seconds between checkpoints; more if writing one takes long, so that it stays below a twentieth of the
            time. A minute is what a killed process may lose.
        stop: Asked after each step whether to stop.
    """

    def __init__(self, every: float = 60.0, *, stop: Callable[[], bool] | None = None) -> None:
        if not every > 0:
            raise SlivoError(f"Saves every is {every}; a number of seconds above 0")
        self.every, self.stop = every, stop
        self._due, self._asked = math.inf, math.inf

    def on_fit_start(self, state: TrainState) -> None:
        """Start the clock."""
        del state
        self._due = time.monotonic() + self.every

    def on_step_start(self, state: TrainState) -> None:
        """See how long it took to write a checkpoint, if one was written."""
        del state
        if self._asked < math.inf:
            now = time.monotonic()
            self._due, self._asked = now + max(self.every, 20 * (now - self._asked)), math.inf

    def on_step_end(self, state: TrainState) -> None:
        """Ask for a checkpoint if it is time."""
        state.stop = state.stop or (self.stop is not None and self.stop())
        if state.stop or time.monotonic() >= self._due:
            state.save, self._asked = True, time.monotonic()


class ClipGradients(Hook):
    """Scale gradients down where their norm over all trained parameters is above a limit.

    Args:
        norm: The limit; 1 to 5 is common.

    Source: Pascanu, Mikolov, Bengio 2012, arXiv:1211.5063.
    """

    def __init__(self, norm: float) -> None:
        if not norm > 0:
            raise SlivoError(f"ClipGradients norm is {norm}; it must be above 0")
        self.norm = norm

    def on_gradients(self, state: TrainState) -> None:
        """Clip, adapters and other extra parameters included."""
        parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(parameters, self.norm)


class EMA(Hook):
    """Keep a running mean of the weights, and leave it in the model when the training ends.

    Buffers, such as the statistics of batch norm, are averaged alike; those that are not floating-point are those
    of the last step. Validation within the training sees the raw weights.

    Args:
        decay: Share of the mean that stays at each step: 0.99 averages over about a hundred steps.

    Source: Polyak, Juditsky 1992, doi:10.1137/0330046.
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise SlivoError(f"EMA decay is {decay}; allowed: 0 up to, not including, 1")
        self.decay = decay
        self.mean: dict[str, Tensor] = {}

    def on_fit_start(self, state: TrainState) -> None:
        """Start from the model as it is."""
        if state.epoch == 0:
            self.mean = {name: tensor.detach().clone() for name, tensor in _averaged(state.model).items()}

    def on_step_end(self, state: TrainState) -> None:
        """Move the mean towards the model."""
        with torch.no_grad():
            for name, tensor in _averaged(state.model).items():
                self.mean[name].lerp_(tensor, 1 - self.decay)

    def on_fit_end(self, state: TrainState) -> None:
        """Put the mean into the model."""
        with torch.no_grad():
            for name, tensor in _averaged(state.model).items():
                tensor.copy_(self.mean[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the mean."""
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the mean."""
        self.mean = state["mean"]


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
