"""Plans: which positions of which axes stay, as a file that people can read, compare, edit and replay."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Integral
from pathlib import Path
from typing import Any, Self

from slivo import files
from slivo.errors import ArtifactError, ShapeError
from slivo.graph import Axis, Graph

FORMAT = 1
"""Version of the file; a reader refuses any other."""


@dataclass(frozen=True)
class Plan:
    """What a pruning keeps.

    Args:
        sizes: For each axis, by name, how many positions it has before the cut.
        keep: For each axis the positions that stay, ascending.

    Raises:
        ShapeError: If a position does not exist or is given twice, or none stays.

    Example:
        >>> plan = Plan({"conv1 out": 8}, {"conv1 out": (0, 1, 2, 5)})
        >>> print(plan.text())
        {
          "format": 1,
          "axes": {
            "conv1 out": {"size": 8, "keep": "0-2, 5"}
          }
        }
        >>> Plan.from_text(plan.text()) == plan
        True
    """

    sizes: Mapping[str, int]
    keep: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        for name, kept in self.keep.items():
            size = self.sizes.get(name, 0)
            whole = all(isinstance(each, Integral) for each in kept)
            if not kept or not whole or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= size:
                raise ShapeError(
                    f"axis {name!r} has {size} positions; a plan keeps one or more of them, each once and ascending, "
                    f"not {list(kept)[:8]}"
                )

    @classmethod
    def of(cls, axes: Iterable[Axis], kept: Mapping[str, Sequence[int]]) -> Self:
        """Return the plan for some axes; those of which nothing is said stay whole."""
        axes = list(axes)
        return cls(
            {axis.name: axis.size for axis in axes},
            {axis.name: tuple(kept.get(axis.name, range(axis.size))) for axis in axes},
        )

    @property
    def cuts(self) -> dict[str, tuple[int, ...]]:
        """The axes that lose something, with what stays of them."""
        return {name: kept for name, kept in self.keep.items() if len(kept) < self.sizes[name]}

    def text(self) -> str:
        """Return the plan as JSON, a line for each axis; runs of positions are written ``first-last``."""
        axes = ",\n".join(
            f"    {json.dumps(name)}: {json.dumps({'size': self.sizes[name], 'keep': _ranges(kept)})}"
            for name, kept in self.keep.items()
        )
        return f'{{\n  "format": {FORMAT},\n  "axes": {{\n{axes}\n  }}\n}}'

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Return the plan that JSON says.

        Raises:
            ArtifactError: If it is no plan, or of another format.
            ShapeError: If its positions make no sense.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise ArtifactError(f"the plan has format {data['format']}; this version reads {FORMAT}")
            axes: Mapping[str, Any] = data["axes"]
            return cls(
                {name: int(axis["size"]) for name, axis in axes.items()},
                {name: tuple(_positions(axis["keep"])) for name, axis in axes.items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"it is no plan: {error}; each axis has a size and keeps positions written as '0-2, 5'"
            ) from error

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan to a file, whole or not at all; returns its path."""
        files.write(Path(path), self.text() + "\n")
        return Path(path)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `write` wrote.

        Raises:
            ArtifactError: If the file cannot be read or is no plan.
        """
        try:
            return cls.from_text(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ArtifactError, ShapeError) as error:
            raise type(error)(f"{path}: {error}") from error

    def fit(self, graph: Graph) -> dict[str, list[int]]:
        """Return what to keep of a graph's axes.

        Raises:
            ShapeError: If the graph has not these axes, in these sizes.
        """
        for name, size in self.sizes.items():
            if graph[name].size != size:
                raise ShapeError(
                    f"the plan is for an axis {name!r} of {size} positions, the model's has {graph[name].size}; was it "
                    "made for another model, or is it applied twice?"
                )
        return {name: list(kept) for name, kept in self.cuts.items()}


def _ranges(positions: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for position in positions:
        if runs and runs[-1][1] == position - 1:
            runs[-1][1] = position
        else:
            runs.append([position, position])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _positions(text: str) -> Iterable[int]:
    runs = (part.strip().partition("-") for part in text.split(","))
    return chain.from_iterable(range(int(first), int(last or first) + 1) for first, _, last in runs)
