"""Merge: positions of an axis that are alike become one, whose readers add up what they read of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, lcm
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slivo.errors import SlivoError, require
from slivo.graph import Axis, ExampleInputs, Graph, plan_slices, trace
from slivo.graph.checks import check_values
from slivo.graph.copies import duplicate
from slivo.measure.budget import Budget
from slivo.options import MinWidth, check_widths, is_number, said
from slivo.prune.plans import Plan
from slivo.prune.width import cut, plan, select

Distance = Literal["euclidean", "cosine"]

_Tree = NDArray[np.float64]
"""Which two clusters are joined at each step, and at which distance: rows (one, other, distance, size)."""


def merge(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    keep: Budget | None = None,
    threshold: float | None = None,
    distance: Distance = "euclidean",
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    min_width: MinWidth = 0.1,
    round_to: int = 1,
) -> nn.Module:
    """Return a smaller model in which channels, heads or hidden units that are alike have become one.

    The entries of weights that make a position are laid out as one vector; similar vectors are clustered
    (agglomerative, average linkage), and each cluster becomes its mean. Whatever reads the axis reads the one with the
    sum of the weights with which it read the members: if these are the same, the network computes what it did. Nothing
    else is done for the output; `refit` can follow, which needs samples.

    Args:
        model: The trained model; it is left untouched.
        example_inputs: As for `prune`.
        keep: What may stay; every axis then keeps the same share, and those members are joined that are nearest.
        threshold: In place of a budget: clusters are joined up to this distance. 0 joins only what is the same.
        distance: ``euclidean``: ‖a − b‖ / rms of ‖a‖ over the axis, 0 for twins. ``cosine``: 1 − cos(a, b), 0 for the
            same direction; where no norm lies between, members are then read in proportion to their lengths, which is
            right where activations let positive factors through, as ReLU does.
        only: As for `prune`.
        exclude: As for `prune`.
        min_width: As for `prune`; with a budget.
        round_to: As for `prune`.

    Returns:
        A new model that carries the edit, as from `prune`.

    Raises:
        SlivoError: If neither or both of budget and threshold are given, the distance is none, or scipy is not there.
        TargetError: If the budget cannot be met.
        CaptureError: If the model does not run on the inputs or cannot be captured.

    Source: Srinivas, Babu 2015, "Data-free Parameter Pruning for Deep Neural Networks", arXiv:1507.06149 (sums for
    readers); Ayinde, Zurada 2018, "Building Efficient ConvNets using Redundant Feature Pruning", arXiv:1802.07653
    (agglomerative, by cosine).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
        >>> with torch.no_grad():
        ...     _ = net[0].weight[1].copy_(net[0].weight[0]), net[0].bias[1].copy_(net[0].bias[0])
        >>> x = torch.randn(5, 2, dtype=torch.float64)
        >>> small = merge(net, x, threshold=0.0)
        >>> small[0].out_features, torch.allclose(small(x), net(x))
        (1, True)
    """
    _check(keep, threshold, distance)
    check_widths(min_width, round_to)
    graph = trace(model, example_inputs)
    check_values(model)
    axes = {axis.name: axis for axis in select(graph, only=only, exclude=exclude) if axis.size > 1}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    trees: dict[str, _Tree] = {}
    if keep is None:
        trees = {name: _tree(axis, tensors, distance) for name, axis in axes.items()}
        sizes = _sizes(graph, axes, trees, float(threshold or 0.0), round_to)
    else:
        made = plan(
            model, example_inputs, keep=keep, scope="uniform", only=only, exclude=exclude, min_width=min_width,
            round_to=round_to, graph=graph,
        )  # fmt: skip
        sizes = {name: len(kept) for name, kept in made.cuts.items()}
    joined, kept = dict[str, Tensor](), dict[str, list[int]]()
    with torch.no_grad():
        for name, size in sizes.items():
            axis = graph[name]
            tree = trees[name] if name in trees else _tree(axis, tensors, distance)
            clusters = _clusters(tree, axis.size, size)
            kept[name] = [members[0] for members in clusters]
            for member in axis.members:
                joined.setdefault(member.tensor, tensors[member.tensor].detach().clone())
            scaled = distance == "cosine" and _is_scaled(axis, tensors)
            _join_(axis, clusters, _vectors(axis, tensors) if scaled else None, joined)
    if not kept:
        return duplicate(model)
    small = cut(model, example_inputs, Plan.of([graph[name] for name in kept], kept), graph=graph)
    slices = plan_slices(graph, kept)
    with torch.no_grad():
        for name, tensor in [*small.named_parameters(), *small.named_buffers()]:
            if name in joined:
                value = joined[name]
                for dim, stays in slices.get(name, {}).items():
                    value = value.index_select(dim, torch.tensor(stays, device=value.device))
                tensor.copy_(value)
    return small


def _check(keep: object, threshold: object, distance: object) -> None:
    if (keep is None) == (threshold is None):
        raise SlivoError("merging has one measure: give keep=Budget(…), or threshold=0.1")
    if threshold is not None and not (is_number(threshold) and threshold >= 0):
        raise SlivoError(f"threshold is {said(threshold)}; a distance of 0 or more")
    if distance not in get_args(Distance):
        raise SlivoError(f"distance is {said(distance)}; there are {', '.join(get_args(Distance))}")


def _vectors(axis: Axis, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return what makes each position, shape (positions, entries), float64; the parts of all tensors are as long."""
    parts = []
    for member in axis.members:
        tensor = tensors[member.tensor]
        if not member.reads and tensor.is_floating_point():
            index = torch.from_numpy(member.index).to(tensor.device)
            rows = tensor.detach().double().movedim(member.dim, 0)[index].flatten(1).cpu()
            length = rows.square().sum(1).mean().sqrt()
            parts.append(rows / length if length > 0 else rows)
    return torch.cat(parts, 1) if parts else torch.zeros(axis.size, 1, dtype=torch.float64)


def _tree(axis: Axis, tensors: Mapping[str, Tensor], distance: Distance) -> _Tree:
    """Join the nearest clusters of positions, one pair after the other, until there is one."""
    hierarchy = require("scipy.cluster.hierarchy", extra="merge", why="merging")
    vectors = _vectors(axis, tensors)
    lengths = vectors.norm(dim=1, keepdim=True)
    if distance == "cosine":
        unit = torch.where(lengths > 0, vectors / lengths, 0)
        joined = hierarchy.linkage(unit.numpy(), "average", "sqeuclidean")
        joined[:, 2] /= 2  # ‖a − b‖² = 2 (1 − cos) of unit vectors
    else:
        joined = hierarchy.linkage(vectors.numpy(), "average", "euclidean")
        rms = float(lengths.square().mean().sqrt())
        joined[:, 2] /= rms if rms > 0 else 1.0
    found: _Tree = joined
    return found


def _sizes(
    graph: Graph, axes: Mapping[str, Axis], trees: Mapping[str, _Tree], threshold: float, round_to: int
) -> dict[str, int]:
    """Return how many positions each axis keeps, where clusters are joined up to a distance."""
    sizes = {}
    for name, axis in axes.items():
        size = axis.size - int((trees[name][:, 2] <= threshold).sum())
        step = lcm(axis.multiple, round_to)
        sizes[name] = min(axis.size, ceil(max(size, axis.least) / step) * step)
    for tie in graph.ties:
        most = max(sizes.get(name, graph[name].size) for name in tie)
        sizes.update(dict.fromkeys(sizes.keys() & tie, most))
    return {name: size for name, size in sizes.items() if size < axes[name].size}


def _clusters(tree: _Tree, positions: int, count: int) -> list[list[int]]:
    """Return so many clusters, each its members in order."""
    clusters = {position: [position] for position in range(positions)}
    for step, (one, other, *_) in enumerate(tree[: positions - count]):
        clusters[positions + step] = clusters.pop(int(one)) + clusters.pop(int(other))
    return sorted(sorted(members) for members in clusters.values())


def _join_(
    axis: Axis, clusters: Sequence[Sequence[int]], vectors: Tensor | None, tensors: Mapping[str, Tensor]
) -> None:
    """Make the first member of each cluster stand for all: as their mean, read by the sum of what read them.

    Args:
        axis: The axis.
        clusters: Positions that become one.
        vectors: What lengths are taken from, by which members were read; None if all are alike.
        tensors: They are changed.
    """
    for members in clusters:
        if len(members) == 1:
            continue
        shares = torch.ones(len(members), dtype=torch.float64)
        if vectors is not None:
            lengths = vectors[list(members)].norm(dim=1)
            shares = lengths / vectors[list(members)].mean(0).norm() if lengths.sum() > 0 else shares
        for member in axis.members:
            tensor = tensors[member.tensor]
            if tensor.is_floating_point():
                rows = tensor.movedim(member.dim, 0)
                each = rows[torch.from_numpy(member.index[list(members)]).to(tensor.device)].double()
                weights = shares if member.reads else torch.full_like(shares, 1 / len(members))
                joined = (each * weights.to(each.device).reshape(-1, *[1] * (each.dim() - 1))).sum(0)
                rows[torch.from_numpy(member.index[members[0]]).to(tensor.device)] = joined.to(tensor.dtype)


def _is_scaled(axis: Axis, tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether a position's factor reaches its readers: one layer writes it, and no norm lies between."""
    writers = [member for member in axis.members if not member.reads and tensors[member.tensor].is_floating_point()]
    layers = {member.tensor.rpartition(".")[0] for member in writers if tensors[member.tensor].dim() > 1}
    return len(layers) == 1 and all(member.tensor.rpartition(".")[0] in layers for member in writers)
