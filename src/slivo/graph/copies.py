"""Copies of models that are like their originals in all that cuts and artifacts rely on."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from slivo.errors import SlivoError

Model = TypeVar("Model", bound=nn.Module)


def duplicate(model: Model, *, share: bool = False) -> Model:
    """Return a deep copy of a model, whose tensors have the names that they have in the model.

    Args:
        model: Any module.
        share: Whether the copy holds the model's own parameters, where the model lets it.

    Raises:
        SlivoError: If the model holds something that Python cannot copy; names it.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> duplicate(net).weight is net.weight, duplicate(net, share=True).weight is net.weight
        (False, True)
    """
    memo = computed(model)
    if share:
        memo |= {id(parameter): parameter for parameter in model.parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # copies of captured graphs warn of PyTorch's own code
        try:
            new = copy.deepcopy(model, memo)
        except Exception as error:
            raise SlivoError(
                f"{_holder(model)} cannot be copied ({error}), and only copies of a model are changed; take it off the "
                "model, or leave it out of copies by __getstate__"
            ) from error
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


def computed(model: nn.Module) -> dict[int, Tensor]:
    """Return copies of the tensors that a model computed and keeps, by their identity, as `copy.deepcopy` takes them.

    PyTorch refuses to copy those that know how they were computed: the weights that old-style weight norm and masks
    make anew at each call, activations that a module remembers. A copy of the values is all that anyone needs of them.
    """
    kept = (value for module in model.modules() for value in pytree.tree_leaves(vars(module)))
    return {id(each): each.detach().clone() for each in kept if isinstance(each, Tensor) and not each.is_leaf}


def _holder(model: nn.Module) -> str:
    """Say which attribute of which module cannot be copied."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                try:
                    copy.deepcopy(value, computed(model))
                except Exception:
                    return f"{f'{path}.' if path else ''}{name}, a {type(value).__name__},"
    return f"the model, a {type(model).__name__},"


def keep_persistence_(new: nn.Module, old: nn.Module) -> None:
    """Have a module's buffers be persistent where another's of the same names are; copies of graphs forget it."""
    modules = dict(new.named_modules(remove_duplicate=False))
    for path, module in old.named_modules(remove_duplicate=False):
        if path in modules:
            held = modules[path]._non_persistent_buffers_set
            held |= module._non_persistent_buffers_set & modules[path]._buffers.keys()


def stand_for_(graph: fx.GraphModule, module: nn.Module) -> None:
    """Have a graph show what code around it may read of the module whose place it takes; its copies do so too.

    These are numbers, strings and the like, such as ``batch_first``, and which buffers stay out of checkpoints.
    """
    shown = {path: _plain(each) for path, each in module.named_modules(remove_duplicate=False)}
    absent = {path: each._non_persistent_buffers_set for path, each in graph.named_modules(remove_duplicate=False)}
    show = functools.partial(_show_, shown=shown, absent=absent)
    show(graph)
    graph._register_deepcopy_hook(show)


def _show_(graph: nn.Module, shown: Mapping[str, Mapping[str, Any]], absent: Mapping[str, set[str]]) -> None:
    for path, module in graph.named_modules(remove_duplicate=False):
        module._non_persistent_buffers_set |= absent.get(path, set()) & module._buffers.keys()
        for name, value in shown.get(path, {}).items():
            setattr(module, name, value)


def _plain(module: nn.Module) -> dict[str, Any]:
    found = {name: value for name, value in vars(module).items() if name not in _OWN and _is_plain(value)}
    if "_qkv_same_embed_dim" in found:
        # PyTorch's fused encoder layer computes attention itself, by the widths that there were, unless this is so.
        found["_qkv_same_embed_dim"] = False
    return found


_OWN = {*vars(fx.GraphModule(nn.Module(), fx.Graph())), *dir(fx.GraphModule)}
"""What graphs have of their own."""


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
