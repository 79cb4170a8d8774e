"""Vocabulary pruning: keep the tokens that a task needs, in the embedding and in the head alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from slivo import edits
from slivo.errors import ShapeError, SlivoError
from slivo.graph import Axis, Graph, plan_slices, settle, trace
from slivo.graph.capture import check_runs
from slivo.graph.checks import check_values
from slivo.graph.infer import operator_name
from slivo.graph.inputs import Call, ExampleInputs, fresh
from slivo.options import listed, said


def keep_tokens(
    model: nn.Module, example_inputs: ExampleInputs, tokens: Sequence[int], *, axes: Sequence[str] = ()
) -> nn.Module:
    """Return a model whose vocabulary is the given tokens alone.

    The rows of the embedding go, and with them those of the output head, whether it shares the embedding's weight or
    has its own. This changes what the model takes and gives out: the id of a token is then its rank among the kept,
    ``sorted(tokens).index(old)``, in the inputs as in the logits. Ids that a tokenizer or a configuration holds are
    to be renumbered accordingly; the padding index of embeddings is.

    Args:
        model: The trained model; left untouched.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments, by the old ids.
        tokens: Ids to keep.
        axes: Names of the axes that are the vocabulary, if it is not found by itself: rows of an embedding that are as
            many as some output of the network has positions, or else those of the largest embedding.

    Returns:
        A new model that carries the edit (`slivo.edits.record`).

    Raises:
        CaptureError: If the model does not run on the inputs or cannot be captured.
        ShapeError: If a token does not exist or is given twice, or no vocabulary is found.
        SlivoError: If the padding of an embedding is not among the tokens.

    Example:
        >>> net = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 100))
        >>> small = keep_tokens(net, torch.tensor([[5, 7, 99]]), [5, 7, 11, 99])
        >>> torch.equal(small(torch.tensor([[0, 1, 3]])), net(torch.tensor([[5, 7, 99]]))[..., [5, 7, 11, 99]])
        True
    """
    kept = _ids(tokens)
    check_runs(model, example_inputs)
    graph = trace(model, example_inputs)
    check_values(model)
    found = [graph[name] for name in listed(axes, "axes")] if axes else _vocabulary(graph)
    names = {axis.name for axis in found}
    freed = replace(graph, axes=tuple(replace(axis, fixed=None) if axis.name in names else axis for axis in graph.axes))
    cut = dict.fromkeys(names, kept)
    slices = plan_slices(freed, cut)
    inputs = _renumbered(graph, example_inputs, found, kept)
    paddings = _paddings(model, found, kept)
    with _padded(model, paddings):
        attributes, programs = settle(model, freed, inputs, cut)
    if "" not in programs:
        for name, index in paddings.items():
            attributes.setdefault(name, {})["padding_idx"] = index
    return edits.apply(model, edits.Cut(slices, attributes, cut, programs))


def _ids(tokens: Sequence[int]) -> list[int]:
    """Return ids in ascending order.

    Raises:
        ShapeError: If they are no whole numbers, one after the other.
    """
    given = tokens.tolist() if isinstance(tokens, Tensor | np.ndarray) else tokens
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise ShapeError(f"tokens is {said(given)}; give the ids to keep, as [0, 5, 7] or range(1000)")
    ids = list(given)
    for each in ids:
        if isinstance(each, bool) or not isinstance(each, Integral):
            raise ShapeError(
                f"tokens hold {said(each)}, a {type(each).__name__}; give the ids to keep as ints in one list (of a "
                "mask, mask.nonzero().flatten())"
            )
    return sorted(map(int, ids))


def _vocabulary(graph: Graph) -> list[Axis]:
    """Return the axes of rows that are looked up, and of outputs, that are the vocabulary."""
    tables = {str(weight) for weight, _ in _lookups(graph)}
    looked_up = [axis for axis in graph.axes if any(each.tensor in tables and each.dim == 0 for each in axis.members)]
    outputs = [axis for axis in graph.axes if axis.fixed == "an output of the network" and axis not in looked_up]
    if not looked_up:
        raise ShapeError("the model has no vocabulary: no embedding looks up rows by number; name its axes, axes=[…]")
    # A head that shares the embedding's weight has one axis with it.
    both = {axis.size for axis in looked_up} & {
        *(axis.size for axis in outputs),
        *(axis.size for axis in looked_up if len({each.tensor for each in axis.members}) > 1),
    }
    size = max(both) if both else max(axis.size for axis in looked_up)
    return [axis for axis in (*looked_up, *outputs) if axis.size == size]


def _lookups(graph: Graph) -> list[tuple[str | None, Any]]:
    """Return the table and the indices of each lookup in the captured graph."""
    captured = graph.inference.capture
    nodes = [node for node in captured.graph.graph.nodes if operator_name(node.target) == "embedding"]
    return [(captured.tensors.get(node.args[0].name), node.args[1]) for node in nodes]


def _renumbered(graph: Graph, example_inputs: ExampleInputs, found: Sequence[Axis], kept: Sequence[int]) -> Call:
    """Return the example inputs by the new ids; tokens that go become the first one."""
    tables = {member.tensor for axis in found for member in axis.members}
    table = torch.zeros(found[0].size, dtype=torch.int64)
    table[torch.tensor(kept)] = torch.arange(len(kept))
    ids = {_placeholder(indices) for weight, indices in _lookups(graph) if weight in tables}
    leaves, spec = pytree.tree_flatten(fresh(example_inputs))
    given = [node for node in graph.inference.capture.graph.graph.nodes if node.op == "placeholder"]
    new = [table[leaf] if node in ids else leaf for node, leaf in zip(given, leaves, strict=True)]
    args, kwargs = pytree.tree_unflatten(new, spec)
    return Call(args, kwargs)


def _placeholder(node: Any) -> fx.Node | None:
    """Follow an index back to the input that it is."""
    while isinstance(node, fx.Node) and node.op == "call_function" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node if isinstance(node, fx.Node) and node.op == "placeholder" else None


def _paddings(model: nn.Module, found: Sequence[Axis], kept: Sequence[int]) -> dict[str, int]:
    """Return the new padding index of each embedding that has one."""
    tables = {member.tensor for axis in found for member in axis.members if member.dim == 0}
    places: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or module.padding_idx is None or f"{name}.weight" not in tables:
            continue
        if module.padding_idx not in kept:
            raise SlivoError(f"token {module.padding_idx} is the padding of {name}; it must be among those to keep")
        places[name] = kept.index(module.padding_idx)
    return places


@contextmanager
def _padded(model: nn.Module, paddings: Mapping[str, int]) -> Iterator[None]:
    """Give embeddings their new padding while the cut is tried: they refuse one that is beyond their rows."""
    before = {name: model.get_submodule(name).padding_idx for name in paddings}
    try:
        for name, index in paddings.items():
            model.get_submodule(name).padding_idx = index  # type: ignore[assignment]
        yield
    finally:
        for name, old in before.items():
            model.get_submodule(name).padding_idx = old
