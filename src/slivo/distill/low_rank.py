"""Low rank: train only small factors beside a student's layers, which PEFT makes, and add them to its weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from slivo import edits
from slivo.distill.taps import match
from slivo.errors import RecipeError, SlivoError, require
from slivo.graph.capture import canonical_names
from slivo.graph.copies import Model, duplicate

_TRAINED = "_slivo_trained"

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def lora(
    student: Model,
    targets: Sequence[str] | None = None,
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Model:
    """Put low-rank adapters beside layers of a student, and have nothing else be trained.

    A layer of weight W then computes with W + alpha / rank · B A, of which only A and B, of that rank, are trained; B
    starts at zero, so that the student says what it said. The paths of its modules stay, so that they can be tapped.
    Batch norms still follow the data in training mode.

    Args:
        student: Left untouched. It may have been cut; edits stay on record.
        targets: Globs over the paths of layers (linear, convolutions, and transformers' ``Conv1D``). Default: those
            that `lora_targets` proposes.
        rank: Of the adapters. 8 suits attention and linear layers of a few hundred features; a rank near a layer's
            width saves nothing.
        alpha: How much the adapters count, as PEFT's ``lora_alpha``. Default: the rank, a factor of one.
        dropout: Of what goes into the adapters, in training.
        seed: Of A, which does not touch the global random generator.

    Returns:
        A copy to train, as by `slivo.distill.distill`, `slivo.train.fit`, or any loop on the parameters that require
        gradients. `merge_lora` makes of it a student with modules of its own again.

    Raises:
        RecipeError: If an option is out of range.
        SlivoError: If a glob matches no layer that can be adapted (says why), or PEFT is not installed.

    Source: Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen 2021, "LoRA: Low-Rank Adaptation of Large Language
    Models", arXiv:2106.09685, section 4.1.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> adapted = lora(net, rank=2)
        >>> [name for name, each in adapted.named_parameters() if each.requires_grad]
        ['0.lora_A.default.weight', '0.lora_B.default.weight']
        >>> merge_lora(adapted)
        Sequential(
          (0): Linear(in_features=64, out_features=64, bias=True)
          (1): ReLU()
          (2): Linear(in_features=64, out_features=3, bias=True)
        )
    """
    if not isinstance(rank, int) or rank < 1:
        raise RecipeError(f"rank is {rank}; it must be a whole number from 1")
    if not 0 <= dropout < 1:
        raise RecipeError(f"dropout is {dropout}; allowed: 0 up to, not including, 1")
    peft = require("peft", extra="lora", why="low-rank adapters")
    if _adapted(student):
        raise SlivoError(f"{type(student).__name__} has low-rank adapters; merge them first (slivo.distill.merge_lora)")
    paths = lora_targets(student) if targets is None else _chosen(student, targets)
    made = duplicate(student)
    trained = tuple(name for name, each in made.named_parameters() if each.requires_grad)
    config = peft.LoraConfig(
        target_modules="|".join(map(re.escape, paths)),
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # It says so of transformers' Conv1D, and sets it right itself.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, made)
    for _, layer in _adapted(made):
        # PyTorch's fused encoder layer would compute past the adapters; what has hooks it computes module by module.
        layer.register_forward_hook(_unfused)
    _held(made)[_TRAINED] = trained
    return made


def merge_lora(model: Model) -> Model:
    """Add low-rank adapters to the weights that they stand beside, and return the student with its own modules.

    Args:
        model: What `lora` gave, trained, or a copy of it; left untouched.

    Returns:
        A copy that computes the same without adapters. Its modules, the names of its tensors, its edits, and which of
        its parameters require gradients are the student's.

    Raises:
        SlivoError: If there are no adapters, or they make a weight that is not finite.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> torch.equal(merge_lora(lora(net)).get_parameter("0.weight"), net[0].weight)
        True
    """
    made = duplicate(model)
    layers = _adapted(made)
    if not layers:
        raise SlivoError(f"{type(model).__name__} has no low-rank adapters; slivo.distill.lora(student) makes them")
    for path, layer in layers:
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise SlivoError(f"{path}: {error}; lower the learning rate") from error
        parent, _, name = path.rpartition(".")
        setattr(made.get_submodule(parent), name, layer.get_base_layer())
    trained = _held(made).pop(_TRAINED, None)
    vars(made).pop("peft_config", None)  # which PEFT leaves
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(trained is None or name in trained)
    return made


def lora_targets(student: nn.Module) -> list[str]:
    """Return the paths of the layers that `lora` adapts unless told: all that it can but the head.

    The head is what ``get_output_embeddings`` of a transformers model says, or else the last of them. Left out are
    layers whose adapters could not be merged: those that share their weights or have a sparsity on record, those with
    a forward of their own or with weights that are computed, the last of PyTorch's attention, and convolutions with
    groups, dilation, padding by other than zeros, or kernels of 1 x 1 x n.

    Args:
        student: The model.

    Raises:
        SlivoError: If there is none.

    Example:
        >>> lora_targets(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, groups=2), nn.Flatten(), nn.Linear(8, 2)))
        ['0']
    """
    refused = dict(_layers(student))
    found = [path for path, why in refused.items() if why is None]
    said: Any = getattr(student, "get_output_embeddings", None)
    head = said() if callable(said) else None
    rest = found[:-1] if head is None else [path for path in found if student.get_submodule(path) is not head]
    found = rest or found
    if not found:
        why = next((f"; {path!r} {reason}" for path, reason in refused.items() if reason is not None), "")
        raise SlivoError(f"{type(student).__name__} has no layer inside to put low-rank adapters beside{why}")
    return found


def _chosen(student: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the paths of the layers that globs match; what cannot be adapted is passed over, but not if all is."""
    if isinstance(targets, str):
        targets = [targets]
    known = dict(_layers(student))
    chosen: list[str] = []
    for glob in targets:
        matched = match(student, glob, role="student")
        found = [path for path in matched if path in known and known[path] is None]
        if not found:
            reasons = [f"{path!r} {known.get(path, _OTHER)}" for path in matched[:1]]
            raise SlivoError(f"{glob!r} matches no layer that can have low-rank adapters: {reasons[0]}")
        chosen.extend(found)
    if not chosen:
        raise SlivoError("targets is empty; give globs over the paths of layers, or leave it out")
    return list(dict.fromkeys(chosen))


_OTHER = "is no linear layer or convolution inside the model"


def _layers(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """Yield the paths of all linear layers and convolutions, and why adapters beside each could not be merged, if so.

    That a layer is itself the model counts as no layer: nothing could take its place.
    """
    first = canonical_names(model)
    several = {name for name, other in first.items() if name != other}
    several |= {first[name] for name in several}
    masked = {name for edit in edits.record(model) if isinstance(edit, edits.Mask) for name in edit.patterns}
    attention = {id(each.out_proj) for each in model.modules() if isinstance(each, nn.MultiheadAttention)}
    for path, module in model.named_modules():
        if path and (isinstance(module, _PLAIN) or _transposed(module)):
            name = f"{path}.weight"
            if name in several:
                yield path, "shares its weight with another layer"
            elif name in masked:
                yield path, "has zeros on record (slivo.sparsify), which would be filled"
            elif id(module) in attention:
                yield path, "is computed with by PyTorch's attention, which does not call it"
            else:
                yield path, _own_way(module)


def _transposed(module: nn.Module) -> bool:
    """Tell whether a module is the linear layer of GPT-2, which keeps its weight transposed."""
    return (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D")


def _own_way(module: nn.Module) -> str | None:
    """Say what a layer does that its adapters would not."""
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return "has no weight of its own in floating point"
    kinds = [kind for kind in _PLAIN if isinstance(module, kind)]
    changed = any(
        getattr(type(module), name, None) is not getattr(kind, name, None)
        for kind in kinds
        for name in ("forward", "_conv_forward")
    )
    if changed or "forward" in vars(module):
        return "has a forward of its own"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups > 1:
            return f"has {module.groups} groups"
        if module.padding_mode != "zeros":
            return f"pads by {module.padding_mode!r}"
        if any(size > 1 for size in module.dilation):
            return "has a dilation"
        if isinstance(module, nn.Conv3d) and module.kernel_size[:2] == (1, 1):
            return f"has a kernel of {' x '.join(map(str, module.kernel_size))}, which PEFT cannot merge"
    return None


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the layers with adapters that PEFT put into a model, by path."""
    layer = require("peft.tuners.tuners_utils", extra="lora", why="low-rank adapters").BaseTunerLayer
    return [(path, module) for path, module in model.named_modules() if isinstance(module, layer)]


def _unfused(*_: Any) -> None:
    """Do nothing; that it is there is enough."""


def _held(model: nn.Module) -> dict[str, Any]:
    """Return where copies of a model keep what is remembered of it."""
    return model.meta if isinstance(model, fx.GraphModule) else vars(model)
