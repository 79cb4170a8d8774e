"""The edit that removes slices of parameters and buffers for good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

from torch import nn

from slivo.graph.config import set_config_
from slivo.graph.program import Program, Rewrite, build, recapture
from slivo.graph.slicing import Slices
from slivo.graph.surgery import Attributes, perform_


@dataclass(frozen=True)
class Cut:
    """Keep only the listed slices of each tensor, and set the integers that modules hold about them.

    Args:
        slices: For each parameter or buffer (qualified name) and dimension, the indices that stay, ascending.
        attributes: For each module (qualified name, "" for the model itself) the attributes to set.
        axes: For each axis that was cut (its name) the positions that stayed; kept for people, reports and
            later plans, not needed to replay.
        program: How to make the captured graph that takes the model's place, where the model's own code cannot be
            cut; None where it can.
        config: Integers of the model's configuration to set, so that it describes the model after the cut.

    Example:
        >>> Cut.from_json(Cut(slices={"w": {0: [0, 1, 2, 5]}}).to_json()).slices
        {'w': {0: [0, 1, 2, 5]}}
    """

    kind: ClassVar[str] = "cut"

    slices: Slices
    attributes: Attributes = field(default_factory=dict)
    axes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    program: Program | None = None
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
            "program": None if self.program is None else asdict(self.program),
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
            program=_program(data.get("program")),
            config=dict(data.get("config", {})),
        )

    def apply_(self, model: nn.Module) -> nn.Module:
        """Cut the model in place; with a program, return that."""
        if self.program is None:
            perform_(model, self.slices, self.attributes)
            set_config_(model, self.config)
            return model
        return build(recapture(model, self.program), self.slices, self.program.rewrites, model)


def _program(data: Mapping[str, Any] | None) -> Program | None:
    if data is None:
        return None
    rewrites = (Rewrite(**{**each, "path": tuple(each["path"])}) for each in data["rewrites"])
    return Program(data["inputs"], tuple(rewrites), data["dynamic"])


def _runs(indices: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1][1] = index + 1
        else:
            runs.append([index, index + 1])
    return runs
