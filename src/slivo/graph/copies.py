"""Copies of models that are like their originals in all that cuts and artifacts rely on."""

from __future__ import annotations

import copy
import warnings
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def duplicate(model: Model, *, share: bool = False) -> Model:
    """Return a deep copy of a model, whose tensors have the names that they have in the model.

    Args:
        model: Any module.
        share: Whether the copy holds the model's own parameters, where the model lets it.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> duplicate(net).weight is net.weight, duplicate(net, share=True).weight is net.weight
        (False, True)
    """
    memo = {id(parameter): parameter for parameter in model.parameters()} if share else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # copies of captured graphs warn of PyTorch's own code
        new = copy.deepcopy(model, memo)
    keep_persistence_(new, model)
    # Keras copies a model by its description, and counts names on.
    for old, made in zip(model.modules(), new.modules(), strict=False):
        for held in ("_parameters", "_buffers"):
            names, tensors = list(getattr(old, held)), getattr(made, held)
            if names != list(tensors) and len(names) == len(tensors):
                values = list(tensors.values())
                tensors.clear()
                tensors.update(zip(names, values, strict=True))
    return new


def keep_persistence_(new: nn.Module, old: nn.Module) -> None:
    """Have a module's buffers be persistent where another's of the same names are; copies of graphs forget it."""
    modules = dict(new.named_modules(remove_duplicate=False))
    for path, module in old.named_modules(remove_duplicate=False):
        if path in modules:
            held = modules[path]._non_persistent_buffers_set
            held |= module._non_persistent_buffers_set & modules[path]._buffers.keys()
