"""What of a training goes into its checkpoint, and how it comes back."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils import _pytree as pytree

from slivo import files
from slivo.errors import ArtifactError
from slivo.train.checkpoint import read, write
from slivo.train.hooks import Hook, TrainState
from slivo.train.inside import Inside

_log = logging.getLogger("slivo")


def places(checkpoint: Path) -> tuple[Path, Path, Path]:
    """Return where a training's checkpoints are: of the last epoch, the one before it, and one in their midst.

    Example:
        >>> [place.name for place in places(Path("net.fit"))]
        ['net.fit', 'net.fit.previous', 'net.fit.inside']
    """
    path = Path(checkpoint)
    previous, inside = (path.with_name(f"{path.name}.{what}") for what in ("previous", "inside"))
    return path, previous, inside


def load(checkpoint: Path, *, whole: bool = False) -> dict[str, Any] | None:
    """Read a training's newest checkpoint that is not damaged, if there is one; without the first file there is none.

    Args:
        checkpoint: Where they are.
        whole: Only those of whole epochs.

    Raises:
        ArtifactError: If there are some and none can be used.
    """
    if Path(checkpoint).is_dir():
        raise ArtifactError(f"checkpoint {checkpoint} is a folder; give a file")
    if not Path(checkpoint).exists():
        return None
    found, faults = list[dict[str, Any]](), list[ArtifactError]()
    for place in places(checkpoint)[: 2 if whole else 3]:
        if not place.exists():
            continue
        try:
            stored = read(place)
        except ArtifactError as error:
            faults.append(error)
            continue
        if "training" not in stored:
            raise ArtifactError(f"checkpoint {place} is none of a training; give another path")
        found.append(stored)
    if faults and not found:
        raise faults[0]
    for fault in faults:
        _log.warning("%s; until then the training goes on from another that is whole", fault)
    return max(found, key=_age, default=None)


def _age(stored: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return what grows from a training's checkpoint to the next."""
    return len(stored.get("setbacks", ())), len(stored["history"]), stored["step"]


def save(checkpoint: Path, tree: Mapping[str, Any]) -> None:
    """Write what `state_of` returned; of whole epochs the last two are kept."""
    path, previous, inside = places(checkpoint)
    if tree["inside"] is not None:
        write(inside, tree)
        return
    try:
        if path.exists():
            files.copy(path, previous)
        write(path, tree)
        inside.unlink(missing_ok=True)  # it is older now
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}") from error


def forget(checkpoint: Path) -> None:
    """Remove what an older training left beside its checkpoint, which is gone."""
    for place in places(checkpoint)[1:]:
        place.unlink(missing_ok=True)


def state_of(
    training: Mapping[str, Any],
    state: TrainState,
    hooks: Sequence[Hook],
    extra: Sequence[Parameter],
    inside: Inside | None = None,
) -> dict[str, Any]:
    """Return all that the steps to come depend on; its tensors are the training's own.

    Random generators are among it only in the midst of an epoch: `fit` sets them from (seed, epoch) before each.
    """
    return {
        "training": training,
        "epoch": state.epoch,
        "step": state.step,
        "history": state.history,
        "setbacks": state.setbacks,
        "inside": None if inside is None else asdict(inside),
        "model": _tensors(state.model),
        "extra": list(extra),
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict(),
        "hooks": [[type(hook).__name__, hook.state_dict()] for hook in hooks],
    }


def copied(tree: Any) -> Any:
    """Return a copy that the training does not change."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), tree)


def restore(
    checkpoint: Path,
    stored: Mapping[str, Any],
    training: Mapping[str, Any],
    state: TrainState,
    hooks: Sequence[Hook],
    extra: Sequence[Parameter],
) -> Inside | None:
    """Bring a training to where its checkpoint was written; returns how far the epoch is that is under way.

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
    state.epoch, state.step, state.history = stored["epoch"], stored["step"], list(stored["history"])
    state.setbacks = list(stored.get("setbacks", ()))
    device = next((tensor.device for tensor in here.values()), torch.device("cpu"))
    for hook, (_, values) in zip(hooks, stored["hooks"], strict=True):
        hook.load_state_dict(pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), values))
    inside = stored.get("inside")
    return None if inside is None else Inside(**inside)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, each once, those included that a state dict leaves out."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _foreign(checkpoint: Path, difference: str) -> ArtifactError:
    return ArtifactError(
        f"checkpoint {checkpoint} belongs to another training ({difference}); remove it, or give another path"
    )
