"""Configurations: what a model is made from is changed so that it describes the cut model, where that can be said."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import islice, product
from typing import Any

import torch
from torch import nn

_TRIALS = 64
"""Most descriptions that are tried; each makes the model once, without data."""


def config_of(model: nn.Module) -> Any:
    """Return what a model was made from: the ``config`` of models that transformers makes, or None."""
    config = getattr(model, "config", None)
    return config if hasattr(config, "to_dict") and isinstance(getattr(config, "__dict__", None), dict) else None


def plan_config(model: nn.Module, small: nn.Module) -> dict[str, int]:
    """Find the integers of a model's configuration that change so that the cut model can be made from it.

    Every integer that is the old size of something that was cut may become one of the new sizes. A choice is right if
    a model made from it has the cut model's tensors, all in their shapes.

    Args:
        model: The model before the cut.
        small: The model after it.

    Returns:
        New values by name; empty if there is no configuration, or none can say what was cut: where layers of one kind
        have different widths, most cannot.
    """
    config = config_of(model)
    if config is None or type(small) is not type(model):
        return {}
    wanted = _shapes(small)
    choices = _choices(config, _shapes(model), wanted)
    for settings in islice(_settings(choices), _TRIALS):
        if _made(type(model), config, settings) == wanted:
            return settings
    return {}


def set_config_(model: nn.Module, settings: Mapping[str, int]) -> None:
    """Set integers of a model's configuration, which its modules share."""
    for name, value in settings.items():
        setattr(config_of(model), name, value)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _choices(
    config: Any, before: Mapping[str, tuple[int, ...]], after: Mapping[str, tuple[int, ...]]
) -> dict[str, list[int]]:
    """Return the values that each integer of a configuration may take, new ones first."""
    ratios: set[tuple[int, int]] = set()
    for name, shape in before.items():
        ratios |= {pair for pair in zip(shape, after.get(name, shape), strict=False) if pair[0] != pair[1]}
    found: dict[str, list[int]] = {}
    for name, value in vars(config).items():
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            # A count of heads, say, shrinks as the width that it divides.
            new = {kept for size, kept in ratios if size == value}
            new |= {value * kept // size for size, kept in ratios if size % value == 0 and value * kept % size == 0}
            new -= {0, value}
            if new:
                found[name] = [*sorted(new), value]
    return found


def _settings(choices: Mapping[str, list[int]]) -> Iterator[dict[str, int]]:
    """Yield the choices, those that change most first; the last of each integer's values is the old one."""
    combined = list(islice(product(*choices.values()), 4096))
    old = [values[-1] for values in choices.values()]
    for values in sorted(combined, key=lambda each: sum(a == b for a, b in zip(each, old, strict=True))):
        changed = {name: new for name, new, was in zip(choices, values, old, strict=True) if new != was}
        if changed:
            yield changed


def _made(kind: type[nn.Module], config: Any, settings: Mapping[str, int]) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of a model's tensors that is made from a configuration with changes; None if it cannot be."""
    changed = copy.deepcopy(config)
    for name, value in settings.items():
        setattr(changed, name, value)
    try:
        with torch.device("meta"):
            return _shapes(kind(changed))
    except Exception:  # a model may refuse a description in any way
        return None
