"""The edit that says which weights take few different values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from slivo.errors import ArtifactError, RecipeError, ShapeError


@dataclass(frozen=True)
class Shared:
    """How a weight's values are shared.

    Args:
        values: How many different values other than zero there are at most, in each group.
        groups: How many equal parts of consecutive entries along dimension 0 have values of their own.
        trained: Whether the values may be moved by training; powers of two may not.

    Raises:
        RecipeError: If a number is below 1.
    """

    values: int
    groups: int = 1
    trained: bool = True

    def __post_init__(self) -> None:
        if self.values < 1 or self.groups < 1:
            raise RecipeError(f"{self} makes no sense; there are at least 1 value and 1 group")

    def check(self, name: str, size: int) -> None:
        """Look whether a weight of so many rows can be parted into the groups.

        Raises:
            ShapeError: If it cannot.
        """
        if size % self.groups:
            raise ShapeError(f"{name} has {size} rows, which {self.groups} equal groups cannot part; leave it out")


@dataclass(frozen=True)
class Share:
    """Say which weights take few different values. The values are in the tensors; nothing else changes.

    Args:
        weights: For each parameter (qualified name) how its values are shared.

    Example:
        >>> Share.from_json(Share({"0.weight": Shared(16)}).to_json()).weights["0.weight"].values
        16
    """

    kind: ClassVar[str] = "share"

    weights: Mapping[str, Shared]

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {"weights": {name: [one.values, one.groups, one.trained] for name, one in self.weights.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild the edit from `to_json`'s data.

        Raises:
            ArtifactError: If it says what makes no sense.
        """
        try:
            return cls({name: Shared(*given) for name, given in data["weights"].items()})
        except (RecipeError, TypeError) as error:
            raise ArtifactError(f"an edit that shares values is malformed: {error}") from error

    def apply_(self, model: nn.Module) -> nn.Module:
        """Look whether the model has these parameters, and their groups; return it as it is.

        Raises:
            ShapeError: If it has not.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, shared in self.weights.items():
            if name not in parameters:
                raise ShapeError(f"the model has no parameter {name!r}, whose values are said to be shared")
            shared.check(name, len(parameters[name]))
        return model
