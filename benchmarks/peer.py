"""The peer, Torch-Pruning, at the same task: prune all widths of a model by half, without any word about the model."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from slivo.graph.capture import evaluating
from slivo.graph.inputs import as_args
from slivo.graph.program import tensors_of

INSTALL = "pip install torch-pruning"


def judge(model: nn.Module, inputs: Any) -> tuple[float, float, str]:
    """Prune a model with Torch-Pruning and check the result as slivo's is checked.

    Linear layers as wide as an output are left out, as its documentation asks for; nothing else is told.

    Returns:
        The processor seconds it took, the share of the parameters that is left, and why its result is no good, or "".
    """
    import torch_pruning

    model = model.eval()
    before = run(model, inputs)
    params = count(model)
    widths = {each.shape[-1] for each in before if each.dim()}
    heads = [each for each in model.modules() if isinstance(each, nn.Linear) and each.out_features in widths]
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    start = time.process_time()
    pruner = torch_pruning.pruner.BasePruner(
        model, as_peer_takes(inputs), importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5, ignored_layers=heads,
    )  # fmt: skip
    pruner.step()
    seconds, left = time.process_time() - start, count(model) / params
    try:
        after = run(model, inputs)
    except Exception as error:
        return seconds, left, f"forward fails: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    if [each.shape for each in before] != [each.shape for each in after]:
        return seconds, left, f"outputs were {shapes(before)} and are {shapes(after)}"
    if left >= 1:
        return seconds, left, f"nothing is removed: {left:.0%} of the parameters left"
    return seconds, left, "" if frozen else backward(model, inputs)


def as_peer_takes(inputs: Any) -> Any:
    return list(inputs) if isinstance(inputs, tuple) else inputs


def backward(model: nn.Module, inputs: Any) -> str:
    args, kwargs = as_args(inputs)
    model.train()
    try:
        sum(each.float().sum() for each in tensors_of(model(*args, **kwargs)) if each.requires_grad).backward()
    except Exception as error:
        return f"backward fails: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return ""


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    args, kwargs = as_args(inputs)
    with evaluating(model), torch.no_grad():
        return tensors_of(model(*args, **kwargs))


def shapes(tensors: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(each.shape) for each in tensors]


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
