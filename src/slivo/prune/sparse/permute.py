"""Permutations for N:M patterns: the order of channels in which most of a network's weight falls into what is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slivo import edits
from slivo.edits.mask import Pattern
from slivo.errors import RecipeError, SlivoError
from slivo.graph import Axis, ExampleInputs, Member, trace
from slivo.graph.checks import check_values
from slivo.graph.copies import duplicate
from slivo.options import is_count, said
from slivo.prune import criteria
from slivo.prune.runs import Loss
from slivo.prune.sparse.choice import Site, best, score, sites

_PASSES = 1000
"""Of swaps, at most; some ten are usual, and each makes the sum larger."""

_KICKED = 4
"""One pair of columns for so many groups is swapped at random to escape from a local optimum."""

Orders = dict[tuple[str, int], NDArray[np.int64]]
"""For each tensor and dimension, which entry comes where."""


def permute(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    pattern: str = "2:4",
    criterion: str | criteria.Criterion = "l1",
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    escapes: int = 16,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> nn.Module:
    """Return the same network with its channels in an order in which an N:M pattern costs least.

    Which inputs share a group of M is a matter of their order, and the order of channels is free as long as all weights
    on an axis follow it. Every axis that may be cut is put into the order in which the N best of each group, in all
    weights that have the pattern along it, sum to the most. The network computes what it did, in another order of
    summation, and runs as fast: nothing is permuted at run time.

    Args:
        model: The trained model; it is left untouched.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        pattern: The N:M pattern that `sparsify` is to have.
        criterion: What is summed; as for `sparsify`. Magnitude, if nothing is said.
        only: Which weights will have the pattern, as for `sparsify`.
        exclude: Likewise.
        escapes: How often the search for each axis starts again from its best, a few columns swapped at random, when
            no swap of two improves it any more. The random numbers are its own, and always the same.
        batches: For criteria that need data, as for `sparsify`.
        loss: Likewise.

    Returns:
        A new model with the order on record: a `slivo.edits.Cut` that keeps everything. What the pattern will keep is
        at least as much as before; where no order is better, the model has no edit more.

    Raises:
        CaptureError: If the model does not run on the inputs or cannot be captured.
        RecipeError: If the pattern is not N:M.
        SlivoError: As `sparsify`.

    Source: Pool, Yu 2021, "Channel Permutations for N:M Sparsity", NeurIPS 34: permutations that are undone by the
    layers around, greedy swaps, and escapes from local optima. That one pass makes the best swaps of all pairs of
    groups at once, and that every axis of the graph is searched, not only channels between two layers, is ours.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 1, bias=False))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[3.0, 2.0, 1.0, 0.5]]))
        >>> permute(net, torch.ones(1, 2), pattern="1:2", only=["1"])[1].weight.tolist()
        [[1.0, 2.0, 3.0, 0.5]]
    """
    parsed = Pattern.parse(pattern)
    if parsed.most is None:
        raise RecipeError(f"pattern is {pattern!r}; only the groups of N:M patterns depend on an order, as of '2:4'")
    if not is_count(escapes):
        raise SlivoError(f"escapes is {said(escapes)}; a whole number, 0 or more")
    graph = trace(model, example_inputs)
    check_values(model)
    found = sites(model, pattern, example_inputs=example_inputs, only=only, exclude=exclude)
    worth = _worth(found, score(model, found, criteria.resolve(criterion), batches=batches, loss=loss))
    orders: Orders = {}
    moved: dict[str, list[int]] = {}
    for axis in graph.prunable:
        order = _ordered(axis, found, worth, int(escapes))
        if order is not None:
            _move(axis, order, worth, orders, model)
            moved[axis.name] = order.tolist()
    slices: dict[str, dict[int, list[int]]] = {}
    for (name, dim), entries in orders.items():
        slices.setdefault(name, {})[dim] = entries.tolist()
    if slices:
        return edits.apply(model, edits.Cut(slices, axes=moved))
    with torch.inference_mode(False):
        return duplicate(model)


def retained(scores: Tensor, keep: int) -> float:
    """Return the sum of the greatest of each group.

    Args:
        scores: Not negative, shape (groups, entries of a group).
        keep: How many of each group stay.

    Example:
        >>> retained(torch.tensor([[1.0, 2.0, 0.0, 4.0]]), 2)
        6.0
    """
    return float(scores.double().masked_fill(~best(scores, keep), 0).sum())


def _worth(found: Mapping[str, Site], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return scores in the shapes of the weights, at least 0."""
    return {
        name: site.pattern.untiled(scores[name].clamp(min=0).reshape(-1, prod(site.pattern.tile)), site.shape).clone()
        for name, site in found.items()
    }


def _ordered(
    axis: Axis, found: Mapping[str, Site], worth: Mapping[str, Tensor], escapes: int
) -> NDArray[np.int64] | None:
    """Return the best order found for an axis, or None if none is better than that there is."""
    grouped = [
        member
        for member in axis.members
        if member.tensor in found and member.dim == len(found[member.tensor].pattern.tile) - 1
    ]
    if not grouped:
        return None
    pattern = found[grouped[0].tensor].pattern
    assert pattern.most is not None
    laid = [_columns(member, worth[member.tensor], pattern.tile[-1]) for member in grouped]
    columns = [each for each in laid if each is not None]
    if not columns:
        return None
    order = search(torch.cat([each.to(columns[0].device) for each in columns]), pattern.most, pattern.tile[-1], escapes)
    # Weights whose groups are not along the axis alone did not enter the search; all are looked at now.
    before, after = (
        sum(retained(found[name].pattern.tiles(value), pattern.most) for name, value in values.items())
        for values in (
            {member.tensor: worth[member.tensor] for member in grouped},
            {member.tensor: _taken(worth[member.tensor], axis, order, member.tensor) for member in grouped},
        )
    )
    return order if after > before else None


def _columns(member: Member, worth: Tensor, group: int) -> Tensor | None:
    """Return what a weight has on each position of an axis, shape (entries, positions).

    None if groups of consecutive entries are not groups of consecutive positions: no order of whole positions is then a
    plain order of columns.
    """
    positions = np.arange(member.index.shape[0])[:, None]
    starts = member.index[:1]
    if len(positions) % group or (member.index - starts != positions).any() or (starts % group).any():
        return None
    columns = worth.movedim(member.dim, -1)[..., torch.from_numpy(member.index.T.copy())]
    return columns.flatten(0, -2)


def _move(axis: Axis, order: NDArray[np.int64], worth: dict[str, Tensor], orders: Orders, model: nn.Module) -> None:
    """Put an axis into an order, in the scores and in what is on record."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in {member.tensor: None for member in axis.members if member.tensor in worth}:
        worth[name] = _taken(worth[name], axis, order, name)
    for member in axis.members:
        size = tensors[member.tensor].shape[member.dim]
        before = orders.get((member.tensor, member.dim), np.arange(size))
        orders[member.tensor, member.dim] = before[_places(member, order, size)]


def _taken(value: Tensor, axis: Axis, order: NDArray[np.int64], name: str) -> Tensor:
    """Return a tensor with an axis in an order."""
    for member in axis.members:
        if member.tensor == name:
            places = _places(member, order, value.shape[member.dim])
            value = value.index_select(member.dim, torch.from_numpy(places).to(value.device))
    return value


def _places(member: Member, order: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return which entry of a dimension comes where, for an order of the axis."""
    places: NDArray[np.int64] = np.arange(size)
    places[member.index.reshape(-1)] = member.index[order].reshape(-1)
    return places


def search(columns: Tensor, keep: int, group: int, escapes: int = 0) -> NDArray[np.int64]:
    """Search for an order of columns in which the ``keep`` greatest of each group of columns, row by row, sum to most.

    Args:
        columns: Scores, not negative, shape (rows, columns); the columns are a multiple of ``group``.
        keep: N, below ``group``.
        group: M.
        escapes: How often to start again from the best, disturbed at random.

    Returns:
        For each place the column that comes there. The sum is that of the given order, or more.

    Example:
        >>> search(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 1, 2).tolist()
        [2, 1, 0, 3]
    """
    generator = torch.Generator().manual_seed(0)
    columns = columns.float().T.contiguous()
    size = len(columns)
    start = _State(torch.arange(size), columns.new_empty(size, size), 0.0)
    found = _climb(columns, start, range(size // group), keep, group)
    for _ in range(escapes if size > group else 0):
        order = found.order.clone()
        places = torch.randperm(size, generator=generator)[: 2 * max(1, size // group // _KICKED)]
        order[places] = order[places.flip(0)]
        moved = sorted({place // group for place in places.tolist()})
        tried = _climb(columns, _State(order, found.changes.clone(), 0.0), moved, keep, group)
        found = tried if tried.most > found.most else found
    best_order: NDArray[np.int64] = found.order.numpy()
    return best_order


@dataclass
class _State:
    """Where a search stands.

    Args:
        order: Which column is where.
        changes: For each column c what its group gains if another column x comes in its place, shape (columns,
            columns).
        most: The sum of what is kept.
    """

    order: Tensor
    changes: Tensor
    most: float


def _sum(columns: Tensor, order: Tensor, keep: int, group: int) -> float:
    grouped = columns[order.to(columns.device)].reshape(-1, group, columns.shape[1])
    return retained(grouped.movedim(1, 2).flatten(0, 1), keep)


def _climb(columns: Tensor, state: _State, moved: Iterable[int], keep: int, group: int) -> _State:
    """Swap columns of different groups as long as the sum grows; what is known of groups that moved is out of date."""
    state.most = _sum(columns, state.order, keep, group)
    for _ in range(_PASSES):
        members = state.order.reshape(-1, group)[list(moved)].to(columns.device)
        state.changes[members.flatten()] = _changes(columns, members, keep)
        order = state.order.to(columns.device)
        changes = state.changes[order][:, order]
        swaps = _swaps((changes + changes.T).cpu(), group, state.most)
        tried = state.order.clone()
        for one, other in swaps:
            tried[one], tried[other] = state.order[other], state.order[one]
        found = _sum(columns, tried, keep, group)
        if found <= state.most:
            break
        state.order, state.most = tried, found
        moved = sorted({place // group for swap in swaps for place in swap})
    return state


def _changes(columns: Tensor, members: Tensor, keep: int) -> Tensor:
    """Return by how much the sum of a group changes if a column comes in the place of one of its own.

    Without its column c a group keeps, in each row, the sum of the N − 1 greatest that are left and the greater of the
    next and of what comes in: Σ max(a, b) = (Σa + Σb + Σ|a − b|) / 2, so that all pairs are one matrix of distances.

    Args:
        columns: Shape (columns, rows).
        members: Which columns each group has, shape (groups, M).
        keep: N.

    Returns:
        Shape (groups × M, columns).
    """
    grouped = columns[members]
    ranked = grouped.sort(dim=1, descending=True).values
    last, following = ranked[:, keep - 1 : keep], ranked[:, keep : keep + 1]
    inside = grouped >= last
    left = -torch.where(inside, grouped, last).sum(2).flatten()
    bar = torch.where(inside, following, last).flatten(0, 1)
    entering = (bar.sum(1)[:, None] + columns.sum(1) + torch.cdist(bar, columns, p=1)) / 2
    return left[:, None] + entering


def _swaps(gains: Tensor, group: int, most: float) -> list[tuple[int, int]]:
    """Choose the best swap of each of as many pairs of groups as possible, the best pairs first."""
    count = len(gains) // group
    by_group = gains.reshape(count, group, count, group).permute(0, 2, 1, 3).flatten(2)
    value, pair = by_group.max(2)
    value = value.triu(1)  # a swap within a group changes nothing
    rows, others = (value > 1e-7 * most).nonzero(as_tuple=True)
    chosen: list[tuple[int, int]] = []
    free = set(range(count))
    for at in value[rows, others].argsort(descending=True, stable=True).tolist():
        one, other = int(rows[at]), int(others[at])
        if one in free and other in free:
            free -= {one, other}
            first, second = divmod(int(pair[one, other]), group)
            chosen.append((one * group + first, other * group + second))
    return chosen
