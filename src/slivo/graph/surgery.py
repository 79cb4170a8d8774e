"""Surgery: from positions of axes that stay to slices of tensors, and the slices cut out of a live module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slivo.errors import ShapeError
from slivo.graph.axes import Graph
from slivo.graph.dims import Term, Var, head, positions, size_after

Slices = Mapping[str, Mapping[int, Sequence[int]]]
"""For each tensor and dimension, the indices that stay."""

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
    if not unique or len(unique) != len(kept) or min(unique) < 0 or max(unique) >= axis.size:
        raise ShapeError(
            f"axis {name!r} has positions 0 to {axis.size - 1}; keep at least one of them, each once, "
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
    kept: dict[Var, int] = {graph.variables[name]: len(stays) for name, stays in keep.items()}
    found: dict[str, dict[str, Any]] = {}
    for fact in graph.inference.facts:
        before = [term.size for term in fact.terms]
        after = [size_after(term, kept) for term in fact.terms]
        value = getattr(model.get_submodule(fact.module), fact.attribute, None)
        if before != after and (value == before[0] if isinstance(value, int) else _sizes(value) == before):
            found.setdefault(fact.module, {})[fact.attribute] = after[0] if isinstance(value, int) else after
    return found


def _sizes(value: object) -> list[int] | None:
    return [int(size) for size in value] if isinstance(value, tuple | list) else None


def perform_(model: nn.Module, slices: Slices, attributes: Attributes) -> None:
    """Cut slices out of a model's tensors, gradients included, and set attributes; tied tensors stay tied.

    Args:
        model: The module to change, on any device, the meta device included.
        slices: What stays of which tensor.
        attributes: What to set.

    Raises:
        ShapeError: If a tensor or module is not there or has no such index; the model is then unchanged.
    """
    owners = _owners(model)
    tensors = {name: _tensor(owners, name) for name in slices}
    for name, dims in slices.items():
        for dim, stays in dims.items():
            if dim >= tensors[name].dim() or (stays and max(stays) >= tensors[name].shape[dim]):
                raise ShapeError(
                    f"{name} has shape {list(tensors[name].shape)}; it cannot be cut as asked in dim {dim}"
                )
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = [name for name in attributes if name not in modules]
    if missing:
        raise ShapeError(f"the model has no module {missing[0]!r}")
    for name, dims in slices.items():
        new = _sliced(tensors[name], dims)
        for module, attribute, kind in owners[id(tensors[name])]:
            getattr(module, kind)[attribute] = new
            _replace_in_lists_(module, tensors[name], new)
    for name, values in attributes.items():
        for attribute, value in values.items():
            old = getattr(modules[name], attribute, None)
            setattr(modules[name], attribute, tuple(value) if isinstance(old, tuple) else value)


def _replace_in_lists_(module: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put the new tensor into lists of weights that a module keeps, as recurrent layers do."""
    for value in vars(module).values():
        if isinstance(value, list):
            value[:] = [new if each is old else each for each in value]


def _owners(model: nn.Module) -> dict[Any, list[Any]]:
    """Map each tensor's identity to all (module, attribute, dictionary) that hold it, and each name to the tensor."""
    owners: dict[Any, list[Any]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for kind in ("_parameters", "_buffers"):
            for attribute, tensor in getattr(module, kind).items():
                if tensor is None:
                    continue
                owners.setdefault(f"{path}.{attribute}" if path else attribute, []).append(tensor)
                holders = owners.setdefault(id(tensor), [])
                if not any(holder[0] is module and holder[1] == attribute for holder in holders):
                    holders.append((module, attribute, kind))
    return owners


def _tensor(owners: Mapping[Any, list[Any]], name: str) -> Tensor:
    if name not in owners:
        raise ShapeError(f"the model has no tensor {name!r}")
    tensor: Tensor = owners[name][0]
    return tensor


def _sliced(tensor: Tensor, dims: Mapping[int, Sequence[int]]) -> Tensor:
    def cut(value: Tensor) -> Tensor:
        for dim, stays in dims.items():
            value = value.index_select(dim, torch.from_numpy(np.asarray(stays, dtype=np.int64)).to(value.device))
        return value.contiguous()

    with torch.no_grad():
        new = cut(tensor.detach())
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            if tensor.grad is not None:
                new.grad = cut(tensor.grad)
    return new
