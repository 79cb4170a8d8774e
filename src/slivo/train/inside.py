"""An epoch that is under way: how far it is, and how it goes on in another process."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader


@dataclass
class Inside:
    """What an epoch has done.

    Attributes:
        batches: How many it has had.
        samples: That were in them.
        rate: Learning rate of the last step.
        seconds: That it took.
        sums: Of each term of the loss over the samples.
        random: States of all random generators after the last step; None where the epoch begins.
    """

    batches: int = 0
    samples: int = 0
    rate: float = 0.0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    random: dict[str, Any] | None = None

    def add(self, terms: Mapping[str, float], size: int, rate: float) -> None:
        """Count a step."""
        self.batches += 1
        self.samples += size
        self.rate = rate
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * size


def rest(batches: DataLoader[Any], inside: Inside, device: torch.device) -> Iterator[Any]:
    """Return the batches of an epoch that are left; generators must be as they are where an epoch begins.

    Samples of batches that are passed over are not read where the process itself reads them: their order is drawn and
    left out. Processes that read for it read them again, since what they draw may depend on what they read before.
    """
    iterator = iter(batches)  # draws what an epoch draws first
    if inside.random is None:
        return iterator
    if type(batches) is DataLoader and batches.num_workers == 0 and batches.batch_sampler is not None:
        order = list(islice(batches.batch_sampler, inside.batches, None))
        left: DataLoader[Any] = DataLoader(
            batches.dataset, batch_sampler=order, collate_fn=batches.collate_fn, pin_memory=batches.pin_memory
        )
        iterator = iter(left)
    else:
        for _ in range(inside.batches):
            next(iterator)
    set_random(inside.random, batches, device)
    return iterator


def get_random(batches: DataLoader[Any], device: torch.device) -> dict[str, Any]:
    """Return the states of all generators that a training draws from, as a checkpoint holds them."""
    kind, words, *others = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(words).astype(np.int64)), *(float(other) for other in others)),
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "data": [each.get_state() for each in generators(batches)],
    }


def set_random(states: Mapping[str, Any], batches: DataLoader[Any], device: torch.device) -> None:
    """Put generators into the states that `get_random` returned."""
    random.setstate(states["python"])
    kind, words, place, spare, gauss = states["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), int(place), int(spare), gauss))
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["device"], device)
    for generator, state in zip(generators(batches), states["data"], strict=True):
        generator.set_state(state)


def generators(batches: DataLoader[Any]) -> list[torch.Generator]:
    """Return the generators that a loader and its samplers have of their own."""
    owners = (batches, batches.sampler, batches.batch_sampler)
    found = [getattr(owner, "generator", None) for owner in owners]
    return [each for each in found if isinstance(each, torch.Generator)]


def finite(tensors: list[Tensor]) -> bool:
    """Tell whether there is no NaN or infinity in tensors."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
