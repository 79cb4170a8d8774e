"""The edit that says which weights hold exact zeros, and in which pattern."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from slivo.errors import ArtifactError, RecipeError, ShapeError

_WRITTEN = re.compile(r"(?P<n>\d+):(?P<m>\d+)(@(?P<dim>\d+))?|(?P<rows>\d+)x(?P<columns>\d+)")


@dataclass(frozen=True)
class Pattern:
    """Where in a weight zeros may lie.

    Args:
        tile: Sizes of the tiles that a weight is parted into, along its first dimensions; empty for single entries.
        most: How many entries of a tile are not zero at most; None if a tile is zero as a whole or not at all.

    Example:
        >>> Pattern.parse("2:4"), Pattern.parse("4x8")
        (Pattern(tile=(1, 4), most=2), Pattern(tile=(4, 8), most=None))
        >>> Pattern.parse("2:4@0").tile, Pattern.parse("unstructured").tile
        ((4,), ())
    """

    tile: tuple[int, ...] = ()
    most: int | None = None

    @classmethod
    def parse(cls, written: str) -> Self:
        """Return the pattern that a string says; see `Mask`.

        Raises:
            RecipeError: If it says none.
        """
        if written == "unstructured":
            return cls()
        found = _WRITTEN.fullmatch(written) if isinstance(written, str) else None
        if found is not None:
            given = {name: int(value) for name, value in found.groupdict(default="1").items()}
            if found["rows"] is not None and min(given["rows"], given["columns"]) > 0:
                return cls((given["rows"], given["columns"]))
            if found["n"] is not None and 0 < given["n"] < given["m"]:
                return cls((1,) * given["dim"] + (given["m"],), given["n"])
        raise RecipeError(
            f"pattern is {written!r}; give 'unstructured', N:M as '2:4' (at most 2 of 4 inputs are not zero; '2:4@0' "
            "where the inputs lie along dim 0), or blocks as '4x4'"
        )

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Look whether a weight can be parted into the tiles.

        Raises:
            ShapeError: If it cannot; says in which dimension.
        """
        for dim, size in enumerate(self.tile):
            if dim >= len(shape) or shape[dim] % size:
                there = f"{shape[dim]} entries" if dim < len(shape) else "none"
                raise ShapeError(
                    f"{name} has shape {list(shape)}; the pattern parts dim {dim} into groups of {size}, and there are "
                    f"{there}; leave it out"
                )

    def tiles(self, weight: Tensor) -> Tensor:
        """Lay a weight out by its tiles.

        Args:
            weight: Of a shape that `check` lets pass.

        Returns:
            Shape (tiles, entries of a tile), a copy or a view. Single entries are tiles of one.
        """
        shape, tile = weight.shape, self.tile
        parts = [part for size, each in zip(shape, tile, strict=False) for part in (size // each, each)]
        split = weight.reshape(*parts, *shape[len(tile) :])
        inner = range(1, 2 * len(tile), 2)
        outer = [dim for dim in range(split.dim()) if dim not in inner]
        return split.permute(*outer, *inner).reshape(-1, prod(tile))

    def untiled(self, tiles: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the weight of that shape of which `tiles` gave these tiles."""
        tile = self.tile
        outer = [size // each for size, each in zip(shape, tile, strict=False)] + list(shape[len(tile) :])
        split = tiles.reshape(*outer, *tile)
        # Each of the outer dimensions is followed by its part of the tile.
        order = [place for dim in range(len(tile)) for place in (dim, len(outer) + dim)]
        return split.permute(*order, *range(len(tile), len(outer))).reshape(tuple(shape))

    def holds(self, weight: Tensor) -> bool:
        """Tell whether a weight's zeros are in the pattern: none are wanted, but in no tile is there one too few.

        Example:
            >>> import torch
            >>> Pattern.parse("1:2").holds(torch.tensor([[1.0, 0.0, 0.0, 2.0]]))
            True
            >>> Pattern.parse("1x2").holds(torch.tensor([[1.0, 0.0, 0.0, 2.0]]))
            False
        """
        filled = (self.tiles(weight) != 0).sum(1)
        if self.most is not None:
            return bool((filled <= self.most).all())
        return not self.tile or bool(((filled == 0) | (filled == prod(self.tile))).all())


@dataclass(frozen=True)
class Mask:
    """Say which weights hold exact zeros. The zeros are in the tensors; nothing else changes.

    Args:
        patterns: For each parameter (qualified name) the pattern of its zeros:

            - ``unstructured``: anywhere;
            - ``N:M``, such as ``2:4``: at most N of each M consecutive entries along the input dimension are *not*
              zero. That is dimension 1, as linear layers and convolutions have it, apart for each place of a kernel;
              ``2:4@0`` says dimension 0, as transposed convolutions have it;
            - ``RxC``, such as ``4x4``: blocks of R outputs times C inputs (dimensions 0 and 1), apart for each place
              of a kernel, that are zero as a whole or not at all.

    Raises:
        RecipeError: If a pattern is none of these.

    Example:
        >>> Mask.from_json(Mask({"0.weight": "2:4"}).to_json()).patterns
        {'0.weight': '2:4'}
    """

    kind: ClassVar[str] = "mask"

    patterns: Mapping[str, str]

    def __post_init__(self) -> None:
        for written in self.patterns.values():
            Pattern.parse(written)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {"patterns": dict(self.patterns)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild the edit from `to_json`'s data.

        Raises:
            ArtifactError: If a pattern is not known here.
        """
        try:
            return cls(dict(data["patterns"]))
        except RecipeError as error:
            raise ArtifactError(f"a mask is malformed: {error}; a newer slivo may have written it") from error

    def apply_(self, model: nn.Module) -> nn.Module:
        """Look whether the model has these parameters, in shapes that the patterns fit; return it as it is.

        Raises:
            ShapeError: If it has not.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, written in self.patterns.items():
            if name not in parameters:
                raise ShapeError(f"the model has no parameter {name!r}, which a mask names")
            Pattern.parse(written).check(name, parameters[name].shape)
        return model
