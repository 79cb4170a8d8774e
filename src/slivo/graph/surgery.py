"""Surgery: from positions of axes that stay to slices of tensors, and the slices cut out of a live module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import fx, nn

from slivo.errors import ShapeError
from slivo.graph.axes import Graph
from slivo.graph.capture import canonical_names
from slivo.graph.copies import stand_for_
from slivo.graph.dims import Term, Var, head, positions, size_after
from slivo.graph.parts import replace_
from slivo.graph.program import Program
from slivo.graph.slicing import Slices, check, cut_, within
from slivo.graph.statements import Fact
from slivo.graph.twins import sharing

Attributes = Mapping[str, Mapping[str, Any]]
"""For each module, attributes and their new values."""


def plan_slices(graph: Graph, keep: Mapping[str, Sequence[int]]) -> dict[str, dict[int, list[int]]]:
    """Lower positions of axes to indices of tensors.

    Args:
        graph: The traced model.
        keep: For each axis to cut, by name, the positions that stay.

    Returns:
        For each tensor that changes, for each dimension that changes, the indices that stay, ascending.

    Raises:
        ShapeError: If an axis is fixed, a position does not exist or is given twice, none stays, or axes that
            are tied would differ.
    """
    gone = {graph.variables[name]: _dropped(graph, name, kept) for name, kept in keep.items()}
    for tie in graph.ties:
        sizes = {name: len(keep[name]) if name in keep else graph[name].size for name in tie}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} {size}" for name, size in sorted(sizes.items()))
            raise ShapeError(f"axes that the model parts by number must keep equal sizes: {told}")
    slices: dict[str, dict[int, list[int]]] = {}
    known: dict[Term, list[int] | None] = {}  # tensors share most of their dimensions
    for name, dims in graph.inference.tensors.items():
        for dim, term in enumerate(map(head, dims)):
            if term not in known:
                known[term] = _stays(term, gone)
            stays = known[term]
            if stays is not None:
                slices.setdefault(name, {})[dim] = stays
    return slices


def _stays(term: Term, gone: Mapping[Var, Sequence[int]]) -> list[int] | None:
    """Return which positions of a dimension stay, or None if all do."""
    cut = [rows[gone[axis]].reshape(-1) for axis, rows in positions(term).items() if axis in gone]
    if not sum(len(each) for each in cut):
        return None
    stays = np.ones(term.size, dtype=bool)
    stays[np.concatenate(cut)] = False
    kept: list[int] = np.flatnonzero(stays).tolist()
    return kept


def _dropped(graph: Graph, name: str, kept: Sequence[int]) -> list[int]:
    axis = graph[name]
    if axis.fixed is not None:
        raise ShapeError(f"axis {name!r} may not be cut: {axis.fixed}")
    unique = {int(position) for position in kept}
    if len(unique) < axis.least or len(unique) != len(kept) or min(unique) < 0 or max(unique) >= axis.size:
        raise ShapeError(
            f"axis {name!r} has positions 0 to {axis.size - 1}; keep at least {axis.least} of them, each once, "
            f"not {list(kept)[:8]}"
        )
    return [position for position in range(axis.size) if position not in unique]


def plan_attributes(model: nn.Module, graph: Graph, keep: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
    """Find the integers that modules hold about dimensions that change, and their new values.

    Args:
        model: The model that was traced, uncut.
        graph: Its graph.
        keep: As in `plan_slices`.

    Returns:
        For each module (qualified name) its attributes to set. Integers stay integers, tuples tuples.
    """
    kept: dict[Term, int] = {graph.variables[name]: len(stays) for name, stays in keep.items()}
    found: dict[str, dict[str, Any]] = {}
    for fact in (*graph.inference.facts, *_embeddings(model, graph)):
        before = [term.size for term in fact.terms]
        after = [size_after(term, kept) for term in fact.terms]
        value = getattr(model.get_submodule(fact.module), fact.attribute, None)
        if before != after and (value == before[0] if isinstance(value, int) else _sizes(value) == before):
            found.setdefault(fact.module, {})[fact.attribute] = after[0] if isinstance(value, int) else after
    return found


def _embeddings(model: nn.Module, graph: Graph) -> Iterator[Fact]:
    """Yield what embeddings say of their weights, for those whose weight is read without a lookup that would tell."""
    names = canonical_names(model)
    for path, module in model.named_modules():
        dims = graph.inference.tensors.get(names.get(f"{path}.weight", ""))
        if isinstance(module, nn.Embedding) and dims is not None:
            yield Fact(path, "num_embeddings", dims[:1])
            yield Fact(path, "embedding_dim", dims[1:])


def _sizes(value: object) -> list[int] | None:
    return [int(size) for size in value] if isinstance(value, tuple | list) else None


def perform_(
    model: nn.Module, slices: Slices, attributes: Attributes, programs: Mapping[str, Program] | None = None
) -> None:
    """Cut slices out of a model's tensors, gradients included, and set attributes; tied tensors stay tied.

    Args:
        model: The module to change, on any device, the meta device included.
        slices: What stays of which tensor.
        attributes: What to set.
        programs: For modules that are replaced by their graphs, how to make these.

    Raises:
        ShapeError: If a tensor or module is not there or has no such index; the model is then unchanged.
    """
    programs = programs or {}
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = [name for name in (*attributes, *programs) if name not in modules]
    if missing:
        raise ShapeError(f"the model has no module {missing[0]!r}")
    check(model, slices)
    with sharing():
        for name, program in programs.items():
            replace_(model, name, program)
    if programs:
        slices = within(model, slices)  # of a replaced module only what its program uses is still there
    cut_(model, slices)
    # Those in replaced modules, too: they may be shared with modules that stay.
    for name, values in attributes.items():
        for attribute, value in values.items():
            old = getattr(modules[name], attribute, None)
            setattr(modules[name], attribute, tuple(value) if isinstance(old, tuple) else value)
    for name in programs:
        graph = model.get_submodule(name)
        if isinstance(graph, fx.GraphModule):
            stand_for_(graph, modules[name])
