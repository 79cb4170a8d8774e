"""Optimizers follow a cut: what they remember of a parameter is cut as the parameter was."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slivo import edits
from slivo.edits.cut import Cut
from slivo.edits.mask import Mask
from slivo.errors import ShapeError
from slivo.graph.checks import check_model

Optim = TypeVar("Optim", bound=Optimizer)


def follow(optimizer: Optim, old: nn.Module, new: nn.Module) -> Optim:
    """Return the optimizer of a model that was cut, as if it had trained the smaller one all along.

    Momenta, Adam's moments and whatever else has a parameter's shape lose the slices that the parameter lost; all
    other state, parameter groups and hyperparameters are as they were.

    Args:
        optimizer: Of the model before; left untouched.
        old: The model before the cut, which the optimizer trains.
        new: The model after it, as `slivo.prune` returned it.

    Returns:
        An optimizer of the same class over the new model's parameters.

    Raises:
        ShapeError: If the optimizer trains a parameter that is not the old model's, or the new model did not come
            from the old one by cuts.

    Example:
        >>> import slivo
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> adam = torch.optim.Adam(net.parameters(), lr=0.01)
        >>> net(torch.randn(3, 4)).sum().backward()
        >>> adam.step()
        >>> small = slivo.prune(net, torch.randn(2, 4), keep=slivo.Budget(macs=0.5))
        >>> follow(adam, net, small).state[small[0].weight]["exp_avg"].shape
        torch.Size([4, 4])
    """
    for model in (old, new):
        check_model(model)
    if not isinstance(optimizer, Optimizer):
        raise ShapeError(f"the optimizer is of type {type(optimizer).__name__}; give the torch.optim.Optimizer itself")
    names = {parameter: name for name, parameter in old.named_parameters()}
    parameters, cuts = dict(new.named_parameters()), _between(old, new)
    made = copy.copy(optimizer)
    made.param_groups, made.state = [], defaultdict(dict)
    for group in optimizer.param_groups:
        trained = []
        for parameter in group["params"]:
            name = names.get(parameter)
            if name is None or name not in parameters:
                raise ShapeError(
                    f"the optimizer trains a parameter of shape {tuple(parameter.shape)} that is not in both models; "
                    "give the model it was made for, and what slivo.prune returned for that"
                )
            trained.append(parameters[name])
            if parameter in optimizer.state:
                made.state[parameters[name]] = {
                    key: _sliced(value, parameter, name, cuts, parameters[name])
                    for key, value in optimizer.state[parameter].items()
                }
        made.param_groups.append({**group, "params": trained})
    return made


def _between(old: nn.Module, new: nn.Module) -> list[Cut]:
    """Return the cuts that lead from one model to the other; masks change no shape."""
    before, after = edits.record(old), edits.record(new)
    added = after[len(before) :]
    if after[: len(before)] != before or not all(isinstance(edit, Cut | Mask) for edit in added):
        raise ShapeError("the new model did not come from the old one by cuts alone; an optimizer follows cuts only")
    return [edit for edit in added if isinstance(edit, Cut)]


def _sliced(value: Any, parameter: Tensor, name: str, cuts: list[Cut], new: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if value.shape == parameter.shape and value.dim():
        for cut in cuts:
            for dim, kept in cut.slices.get(name, {}).items():
                value = value.index_select(dim, torch.as_tensor(kept, device=value.device))
        if value.shape != new.shape:
            raise ShapeError(
                f"{name} has shape {list(new.shape)} in the new model, not {list(value.shape)}; give what slivo.prune "
                "returned for the old one"
            )
    return value.detach().clone()
