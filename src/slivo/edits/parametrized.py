"""Weights that are computed while any code trains what is behind them, and plain parameters again after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from torch.nn.utils import parametrize

from slivo.graph.capture import canonical_names


@contextmanager
def parametrized(model: nn.Module, functions: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Have weights computed by functions of their parameters within a block.

    The parameters are the same all along, in the same order, and have what was computed after it. An optimizer may be
    made before the block, within it or after it.

    Args:
        model: It is changed, and given to the block.
        functions: For each weight, by name, a parametrization of PyTorch whose ``right_inverse`` returns what it is
            given. It is used wherever the same weight is.
    """
    first = canonical_names(model)
    by_first = {first[name]: function for name, function in functions.items()}
    places: dict[tuple[int, str], tuple[nn.Module, str, nn.Module]] = {}
    for name, of in first.items():
        if of in by_first:
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            places.setdefault((id(module), attribute), (module, attribute, by_first[of]))
    orders = {id(module): (module, list(module._parameters)) for module, _, _ in places.values()}
    for module, attribute, function in places.values():
        parametrize.register_parametrization(module, attribute, function)
    try:
        yield model
    finally:
        for module, attribute, _ in places.values():
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
        for module, order in orders.values():
            held = dict(module._parameters)
            module._parameters.clear()
            module._parameters.update({name: held[name] for name in order})
