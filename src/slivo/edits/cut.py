"""The edit that removes slices of parameters and buffers for good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import nn

from slivo.graph.config import set_config_
from slivo.graph.program import Program, build, recapture
from slivo.graph.slicing import Slices
from slivo.graph.surgery import Attributes, perform_


@dataclass(frozen=True)
class Cut:
    """Keep only the listed slices of each tensor, and set the integers that modules hold about them.

    Args:
        slices: For each parameter or buffer (qualified name) and dimension, the indices that stay, ascending; all
            of them in another order are a permutation.
        attributes: For each module (qualified name, "" for the model itself) the attributes to set.
        axes: For each axis that was cut (its name) the positions that stayed; kept for people, reports and
            later plans, not needed to replay.
        programs: For modules whose own code cannot be cut (qualified name, "" for the model itself) how to make the
            captured graphs that take their places.
        config: Integers of the model's configuration to set, so that it describes the model after the cut.

    Example:
        >>> Cut.from_json(Cut(slices={"w": {0: [0, 1, 2, 5]}}).to_json()).slices
        {'w': {0: [0, 1, 2, 5]}}
    """

    kind: ClassVar[str] = "cut"

    slices: Slices
    attributes: Attributes = field(default_factory=dict)
    axes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    programs: Mapping[str, Program] = field(default_factory=dict)
    config: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data; index lists are stored once each and runs of indices as [start, stop) pairs."""
        lists: dict[tuple[int, ...], int] = {}

        def number(indices: Sequence[int]) -> int:
            return lists.setdefault(tuple(indices), len(lists))

        slices = {name: {str(dim): number(keep) for dim, keep in dims.items()} for name, dims in self.slices.items()}
        axes = {name: number(keep) for name, keep in self.axes.items()}
        return {
            "keep": [_runs(indices) for indices in lists],
            "slices": slices,
            "attributes": {module: dict(values) for module, values in self.attributes.items()},
            "axes": axes,
            "programs": {module: program.to_json() for module, program in self.programs.items()},
            "config": dict(self.config),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild the edit from `to_json`'s data."""
        lists = [[index for start, stop in runs for index in range(start, stop)] for runs in data["keep"]]
        return cls(
            slices={name: {int(dim): lists[n] for dim, n in dims.items()} for name, dims in data["slices"].items()},
            attributes={module: dict(values) for module, values in data["attributes"].items()},
            axes={name: lists[n] for name, n in data["axes"].items()},
            programs={module: Program.from_json(each) for module, each in data.get("programs", {}).items()},
            config=dict(data.get("config", {})),
        )

    def apply_(self, model: nn.Module) -> nn.Module:
        """Cut the model in place; with a program for the model itself, return what that makes."""
        if "" in self.programs:
            whole = self.programs[""]
            return build(recapture(model, whole), self.slices, whole.rewrites, model)
        perform_(model, self.slices, self.attributes, self.programs)
        set_config_(model, self.config)
        return model


def _runs(indices: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1][1] = index + 1
        else:
            runs.append([index, index + 1])
    return runs
