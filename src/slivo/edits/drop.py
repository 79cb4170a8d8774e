"""The edit that takes whole blocks out of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from torch import nn

from slivo.graph.blocks import Block


class Skip(nn.Module):
    """Stands where a block was: gives out what came in, in the form in which the block gave it out."""

    def __init__(self, argument: int | str, outputs: int | None, index: int) -> None:
        super().__init__()
        self.argument = argument
        self.outputs = outputs
        self.index = index

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the residual stream."""
        stream = args[self.argument] if isinstance(self.argument, int) else kwargs[self.argument]
        if self.outputs is None:
            return stream
        return tuple(stream if place == self.index else None for place in range(self.outputs))

    def extra_repr(self) -> str:
        """Show which argument passes."""
        return f"argument={self.argument!r}"


@dataclass(frozen=True)
class Drop:
    """Let what enters the listed blocks pass them by.

    Args:
        blocks: The blocks, as `slivo.graph.blocks.blocks` finds them.

    Example:
        >>> Drop.from_json(Drop((Block("layers.1", 0),)).to_json()).blocks[0].module
        'layers.1'
    """

    kind: ClassVar[str] = "drop"

    blocks: Sequence[Block]

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {"blocks": [asdict(block) for block in self.blocks]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild the edit from `to_json`'s data."""
        return cls(tuple(Block(**block) for block in data["blocks"]))

    def apply_(self, model: nn.Module) -> nn.Module:
        """Put a `Skip` in the place of each block."""
        for block in self.blocks:
            model.set_submodule(block.module, Skip(block.argument, block.outputs, block.index), strict=True)
        return model
