"""Edits: small, JSON-serializable, replayable changes of a model's structure.

A compressed model is its factory, the list of its edits, and its tensors. Every technique returns a new model that
carries the edits that made it (`record`), so that saving needs nothing but the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import fx, nn

from slivo.edits.cut import Cut
from slivo.edits.drop import Drop
from slivo.edits.factorize import Factorize
from slivo.edits.mask import Mask
from slivo.edits.quantize import Quantize
from slivo.edits.share import Share
from slivo.errors import ArtifactError
from slivo.graph.copies import duplicate

__all__ = [
    "Cut",
    "Drop",
    "Edit",
    "Factorize",
    "Mask",
    "Quantize",
    "Share",
    "apply",
    "from_json",
    "record",
    "replay",
    "to_json",
]

_RECORD = "_slivo_edits"


@runtime_checkable
class Edit(Protocol):
    """What every edit offers; edits are frozen dataclasses."""

    kind: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """Return the edit as JSON-ready data, without its kind."""
        ...

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild the edit from what `to_json` returned."""
        ...

    def apply_(self, model: nn.Module) -> nn.Module:
        """Change the model in place and return it, or the module that takes its place.

        Works on the meta device too, where only shapes matter.
        """
        ...


_KINDS: dict[str, type[Edit]] = {edit.kind: edit for edit in (Cut, Drop, Factorize, Mask, Quantize, Share)}


def record(model: nn.Module) -> tuple[Edit, ...]:
    """Return the edits that a model carries, oldest first; empty for a model that slivo has not changed."""
    held = model.meta if isinstance(model, fx.GraphModule) else vars(model)
    found: tuple[Edit, ...] = held.get(_RECORD, ())
    return found


def apply(model: nn.Module, edit: Edit) -> nn.Module:
    """Apply one edit to a copy of the model.

    Args:
        model: Any module; it is left untouched.
        edit: The change to make.

    Returns:
        A deep copy with the edit applied and added to its record.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 1))
        >>> cut = Cut(slices={"0.weight": {0: [0, 2]}, "0.bias": {0: [0, 2]}, "1.weight": {1: [0, 2]}})
        >>> small = apply(net, cut)
        >>> small[0].weight.shape, net[0].weight.shape
        (torch.Size([2, 2]), torch.Size([4, 2]))
        >>> record(small) == (cut,)
        True
    """
    with torch.inference_mode(False):  # tensors made in it could never be trained
        return replay(duplicate(model), (edit,))


def replay(model: nn.Module, edits: Iterable[Edit]) -> nn.Module:
    """Apply edits to the model itself, in order, and add them to its record; returns it, or what took its place."""
    for edit in edits:
        carried = (*record(model), edit)
        model = edit.apply_(model)
        if isinstance(model, fx.GraphModule):
            model.meta[_RECORD] = carried  # all that its copies keep
        else:
            object.__setattr__(model, _RECORD, carried)
    return model


def to_json(edits: Iterable[Edit]) -> list[dict[str, Any]]:
    """Return edits as JSON-ready data: one object each, its ``kind`` first."""
    return [{"kind": edit.kind, **edit.to_json()} for edit in edits]


def from_json(data: Iterable[Mapping[str, Any]]) -> tuple[Edit, ...]:
    """Rebuild edits from `to_json`'s data.

    Raises:
        ArtifactError: If a kind is not known here (a newer version wrote it) or its data is malformed.
    """
    edits = []
    for index, item in enumerate(data):
        kind = item.get("kind")
        if kind not in _KINDS:
            known = ", ".join(sorted(_KINDS))
            raise ArtifactError(
                f"edits[{index}] has kind {kind!r}; known are {known}: a newer slivo may have written it"
            )
        try:
            edits.append(_KINDS[kind].from_json({key: value for key, value in item.items() if key != "kind"}))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"edits[{index}] ({kind}) is malformed: {error}") from error
    return tuple(edits)
