"""What of a training goes into its checkpoint, and how it comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils import _pytree as pytree

from slivo.errors import ArtifactError
from slivo.train.checkpoint import read, write
from slivo.train.hooks import Hook, TrainState


def load(checkpoint: Path) -> dict[str, Any] | None:
    """Read a training's checkpoint if there is one."""
    if not Path(checkpoint).exists():
        return None
    if Path(checkpoint).is_dir():
        raise ArtifactError(f"checkpoint {checkpoint} is a folder; give a file")
    stored = read(checkpoint)
    if "training" not in stored:
        raise ArtifactError(f"checkpoint {checkpoint} is none of a training; give another path")
    return stored


def save(
    checkpoint: Path, training: Mapping[str, Any], state: TrainState, hooks: Sequence[Hook], extra: Sequence[Parameter]
) -> None:
    """Write all that the epochs to come depend on.

    Random generators are not among it: `fit` sets them from (seed, epoch) before each epoch.
    """
    tree = {
        "training": training,
        "epoch": state.epoch,
        "step": state.step,
        "history": state.history,
        "model": _tensors(state.model),
        "extra": list(extra),
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict(),
        "hooks": [[type(hook).__name__, hook.state_dict()] for hook in hooks],
    }
    write(checkpoint, tree)


def restore(
    checkpoint: Path,
    stored: Mapping[str, Any],
    training: Mapping[str, Any],
    state: TrainState,
    hooks: Sequence[Hook],
    extra: Sequence[Parameter],
) -> None:
    """Bring a training to where its checkpoint was written.

    Raises:
        ArtifactError: If the checkpoint was written by a training with other settings, model or hooks.
    """
    for name, value in training.items():
        if stored["training"].get(name) != value:
            raise _foreign(checkpoint, f"{name} is {value}, there {stored['training'].get(name)}")
    names = [type(hook).__name__ for hook in hooks]
    if names != [name for name, _ in stored["hooks"]]:
        raise _foreign(checkpoint, f"hooks are {names}, there {[name for name, _ in stored['hooks']]}")
    here = {**_tensors(state.model), **{f"extra {index}": tensor for index, tensor in enumerate(extra)}}
    there = {**stored["model"], **{f"extra {index}": tensor for index, tensor in enumerate(stored["extra"])}}
    shapes, others = ({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (here, there))
    for name in sorted(shapes.keys() | others.keys()):
        if shapes.get(name) != others.get(name):
            raise _foreign(checkpoint, f"tensor {name!r} has shape {shapes.get(name)}, there {others.get(name)}")
    with torch.no_grad():
        for name, tensor in here.items():
            tensor.copy_(there[name])
    try:
        state.optimizer.load_state_dict(stored["optimizer"])
    except ValueError as error:
        raise _foreign(checkpoint, f"other parameters are trained: {error}") from error
    state.scheduler.load_state_dict(stored["scheduler"])
    state.epoch, state.step, state.history = stored["epoch"], stored["step"], stored["history"]
    device = next((tensor.device for tensor in here.values()), torch.device("cpu"))
    for hook, (_, values) in zip(hooks, stored["hooks"], strict=True):
        hook.load_state_dict(pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), values))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, each once, those included that a state dict leaves out."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _foreign(checkpoint: Path, difference: str) -> ArtifactError:
    return ArtifactError(
        f"checkpoint {checkpoint} belongs to another training ({difference}); remove it, or give another path"
    )
