"""Statements: what rules say of the dimensions of a graph, beside which are equal."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from slivo.graph.dims import Term


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one operator: a constant times a product of dimensions."""

    constant: int
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Fact:
    """An integer that a module holds about a dimension, such as ``out_channels``."""

    module: str
    attribute: str
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Literal:
    """An integer in the graph (a size given to ``view``, say) that stands for a dimension, or for one less, say."""

    node: fx.Node
    module: str
    path: tuple[int, ...]
    term: Term
    shift: int = 0


@dataclass(frozen=True)
class Limit:
    """What the size of a dimension has to be, besides more than nothing.

    Args:
        term: The dimension.
        multiple: Its size is a multiple of this.
        least: Its size is at least this.
        routed: Whether each sample takes its own few positions, so that it is no cheaper if others go.
    """

    term: Term
    multiple: int = 1
    least: int = 1
    routed: bool = False


@dataclass(frozen=True)
class Mark:
    """What the values of a tensor of integers say of a dimension.

    Its order may change as long as all who are told do as they are told: ``numbers`` are positions of the dimension;
    a ``permutation`` has each once; ``counts`` say how often each was among the numbers, ``offsets`` are their running
    sum, and ``range`` is all positions of the tensor's own dimension in order. A reader that makes nothing of
    the values knows them as numbers, and the order is fixed.
    """

    kind: str
    term: Term
