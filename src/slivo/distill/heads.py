"""Heads: the outputs of a model that has several, by name; and the parts of a batch, which are named alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from slivo.distill._tensors import shape
from slivo.errors import RecipeError, ShapeError

Name = str | int
Head = Name | tuple[Name, Name] | Mapping[Name, Name]
Part = Name | Callable[[Any], Any]


def named(whole: Any) -> dict[str, Tensor]:
    """Return all tensors in a model's output, or in a batch, by name.

    Args:
        whole: Mappings (an output of transformers is one), tuples, lists and dataclasses, in one another to any depth.

    Returns:
        The tensors by key, field or place; names of what lies deeper are joined by dots. A lone tensor is at ``""``.

    Example:
        >>> import torch
        >>> sorted(named({"boxes": torch.ones(4), "scores": (torch.ones(1), torch.ones(2))}))
        ['boxes', 'scores.0', 'scores.1']
    """
    if isinstance(whole, Tensor):
        return {"": whole}
    if isinstance(whole, Mapping):
        items = list(whole.items())
    elif isinstance(whole, tuple | list):
        # The fields of a named tuple are places, too.
        items = [*enumerate(whole), *zip(getattr(whole, "_fields", ()), whole, strict=False)]
    elif is_dataclass(whole):
        items = [(field.name, getattr(whole, field.name)) for field in fields(whole)]
    else:
        items = []
    found = {}
    for name, part in items:
        for deeper, tensor in named(part).items():
            found[f"{name}.{deeper}" if deeper else str(name)] = tensor
    return found


def find(whole: Any, name: Name, what: str) -> Tensor:
    """Return the tensor of a name.

    Args:
        whole: As for `named`.
        name: Such as ``"boxes"``, ``1`` or ``"hidden_states.3"``.
        what: How to call the whole in messages.

    Raises:
        ShapeError: If it is not there; lists what is.

    Example:
        >>> import torch
        >>> find((torch.zeros(2, 3), torch.zeros(2, 4)), 1, "the model").shape
        torch.Size([2, 4])
    """
    there = named(whole)
    if str(name) in there and str(name):
        return there[str(name)]
    shown = [f"{key} {shape(tensor)}" for key, tensor in there.items() if key]
    if "" in there:
        raise ShapeError(f"{what} is one tensor, {shape(there[''])}, and has no {str(name)!r}")
    said = ", ".join([*shown[:12], *(["…"] if len(shown) > 12 else [])]) or f"no tensors in {type(whole).__name__}"
    raise ShapeError(f"{what} has no {str(name)!r}; there {'is' if len(shown) == 1 else 'are'} {said}")


def taken(batch: Any, part: Part) -> Any:
    """Return a part of a batch, by name or by a function of the batch."""
    return part(batch) if callable(part) else find(batch, part, "the batch")


def pairs(loss: str, head: Head) -> list[tuple[str, str]]:
    """Return the heads that a loss compares, by student and teacher.

    Raises:
        RecipeError: If these are no names.
    """
    found: list[tuple[object, object]] = [(head, head)]
    if isinstance(head, Mapping):
        found = list(head.items())
    elif isinstance(head, list | tuple) and len(head) == 2:
        found = [(head[0], head[1])]
    if not found or not all(_is_name(name) for pair in found for name in pair):
        raise RecipeError(
            f"head of {loss} is {head!r}; it must be the name or place of an output, a pair (student, teacher), or a "
            "mapping {student: teacher}"
        )
    return [(str(ours), str(theirs)) for ours, theirs in found]


def check_part(place: str, part: Part | None) -> None:
    """Refuse what can be no part of a batch.

    Raises:
        RecipeError: If it is neither a name nor a function.
    """
    if not (part is None or callable(part) or _is_name(part)):
        raise RecipeError(f"{place} is {part!r}; it must be a part of the batch, by name or place, or a function of it")


def path(name: str) -> str:
    """Return what stands for a head among the paths of modules."""
    return f"[{name}]"


def of_path(place: str) -> str | None:
    """Return the head that stands among the paths of modules; None for a module."""
    return place[1:-1] if place.startswith("[") and place.endswith("]") else None


def _is_name(name: object) -> bool:
    return isinstance(name, str | int) and not isinstance(name, bool) and name != ""
