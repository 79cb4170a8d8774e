"""The edit that puts products of thin layers in the place of wide ones."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, cast, get_args

import torch
from torch import nn

from slivo.edits.swap import swap_, unfuse_
from slivo.errors import ArtifactError, SlivoError

Kind = Literal["svd", "outputs", "inputs", "spatial", "tucker2", "cp"]
"""How a layer becomes thin ones:

- ``svd``: a linear layer to r features, and one from them to the outputs;
- ``outputs``: the convolution to r channels, then 1 x 1 from them to the outputs;
- ``inputs``: 1 x 1 from the inputs to r channels, then the convolution;
- ``spatial``: a column (k x 1) to r channels, then a row (1 x k);
- ``tucker2``: 1 x 1 to the first rank, the convolution to the second, 1 x 1 to the outputs;
- ``cp``: 1 x 1 to r channels, a column and a row of each channel for itself, 1 x 1 to the outputs.
"""

Layer = nn.Linear | nn.Conv1d | nn.Conv2d
FACTORIZABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)
"""The layers that can be factorized; exactly these classes, because a subclass may compute something else."""


@dataclass(frozen=True)
class Factors:
    """What takes the place of one layer.

    Args:
        kind: How it is parted (`Kind`).
        ranks: Channels or features between the thin layers: one number, of ``tucker2`` two (inputs, outputs).
    """

    kind: Kind
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Factorize:
    """Put sequences of thin layers in the place of layers; the bias goes to the last of them.

    The weights of the thin layers are NaN until they are filled in: the edit says shapes, and a file or
    `slivo.factorize` has the numbers.

    Args:
        modules: For each layer (qualified name) what takes its place.
        left: For each layer that could not be factorized, or was not worth it, why; for people and reports.

    Example:
        >>> edit = Factorize({"0": Factors("svd", (2,))})
        >>> edit.apply_(nn.Sequential(nn.Linear(8, 6)))
        Sequential(
          (0): Sequential(
            (0): Linear(in_features=8, out_features=2, bias=False)
            (1): Linear(in_features=2, out_features=6, bias=True)
          )
        )
        >>> Factorize.from_json(edit.to_json()) == edit
        True
    """

    kind: ClassVar[str] = "factorize"

    modules: Mapping[str, Factors]
    left: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        modules = {name: {"kind": each.kind, "ranks": list(each.ranks)} for name, each in self.modules.items()}
        return {"modules": modules, "left": dict(self.left)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild the edit from `to_json`'s data.

        Raises:
            ArtifactError: If a kind is not known here, or ranks are no numbers of channels.
        """
        modules = {name: Factors(each["kind"], tuple(each["ranks"])) for name, each in data["modules"].items()}
        for name, each in modules.items():
            count = 2 if each.kind == "tucker2" else 1
            whole = all(type(rank) is int and rank > 0 for rank in each.ranks)
            if each.kind not in get_args(Kind) or len(each.ranks) != count or not whole:
                raise ArtifactError(
                    f"a factorization is malformed: {name!r} has kind {each.kind!r} and ranks {list(each.ranks)}; a "
                    "newer slivo may have written it"
                )
        return cls(modules, dict(data.get("left", {})))

    def apply_(self, model: nn.Module) -> nn.Module:
        """Replace the layers in place; return the model, or what takes its place if it is one of them itself.

        Raises:
            SlivoError: If a layer is of another class than its factors are for.
        """
        for name, factors in self.modules.items():
            layer = model.get_submodule(name)
            new = thin(layer, factors, name)
            if layer is model:
                return new
            swap_(model, layer, new)
        unfuse_(model)
        return model


def thin(layer: nn.Module, factors: Factors, name: str = "") -> nn.Sequential:
    """Return the thin layers that take a layer's place: on its device, in its dtype and mode, with its bias.

    Raises:
        SlivoError: If the layer is of another class than the factors are for.
    """
    if (
        type(layer) not in FACTORIZABLE
        or (factors.kind == "svd") != (type(layer) is nn.Linear)
        or not _fits(layer, factors.kind)
    ):
        raise SlivoError(f"{name or 'the model'} is a {type(layer).__name__}; {factors.kind!r} is not for it")
    old, weight = cast(Layer, layer), cast(Layer, layer).weight
    with torch.device("meta"):
        pieces = _pieces(old, factors)
    made = nn.Sequential(*pieces).to(weight.dtype).to_empty(device=weight.device)
    for piece in pieces:
        piece.weight.requires_grad_(weight.requires_grad)
        if not weight.is_meta:
            nn.init.constant_(piece.weight, math.nan)
    pieces[-1].bias = old.bias
    return made.train(layer.training)


def _fits(layer: nn.Module, kind: Kind) -> bool:
    """Tell whether a convolution can be parted so."""
    if isinstance(layer, nn.Linear):
        return True
    return getattr(layer, "groups", 1) == 1 and (isinstance(layer, nn.Conv2d) or kind in ("outputs", "inputs"))


def _pieces(layer: Layer, factors: Factors) -> list[Layer]:
    """Make the thin layers, of which only the last has a bias to be."""
    first, last = factors.ranks[0], factors.ranks[-1]
    if isinstance(layer, nn.Linear):
        return [nn.Linear(layer.in_features, first, bias=False), nn.Linear(first, layer.out_features, bias=False)]
    every, inputs, outputs = range(len(layer.kernel_size)), layer.in_channels, layer.out_channels
    widths: Mapping[Kind, list[tuple[int, int, Collection[int], int]]] = {
        "outputs": [(inputs, first, every, 1), (first, outputs, (), 1)],
        "inputs": [(inputs, first, (), 1), (first, outputs, every, 1)],
        "spatial": [(inputs, first, (0,), 1), (first, outputs, (1,), 1)],
        "tucker2": [(inputs, first, (), 1), (first, last, every, 1), (last, outputs, (), 1)],
        "cp": [
            (inputs, first, (), 1),
            (first, first, (0,), first),
            (first, first, (1,), first),
            (first, outputs, (), 1),
        ],
    }
    return [_convolution(layer, *each) for each in widths[factors.kind]]


def _convolution(layer: nn.Conv1d | nn.Conv2d, inputs: int, outputs: int, dims: Collection[int], groups: int) -> Layer:
    """Make a convolution that does along some dimensions of the image what a layer does, and nothing along others."""

    def along(values: tuple[int, ...], other: int) -> Any:
        return tuple(value if dim in dims else other for dim, value in enumerate(values))

    padding: Any = layer.padding if isinstance(layer.padding, str) else along(layer.padding, 0)
    return type(layer)(
        inputs,
        outputs,
        along(layer.kernel_size, 1),
        stride=along(layer.stride, 1),
        padding=padding if dims else 0,
        dilation=along(layer.dilation, 1),
        groups=groups,
        bias=False,
        padding_mode=layer.padding_mode if dims else "zeros",
    )
