"""Importance: a criterion applied to every axis of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slivo.errors import SlivoError
from slivo.graph import Axis, Graph, Member
from slivo.graph.capture import evaluating
from slivo.graph.copies import duplicate
from slivo.prune.criteria import Criterion

Loss = Callable[[nn.Module, Any], Tensor]
"""``loss(model, batch)``: a scalar, the mean over the batch's samples."""


def importance(
    model: nn.Module,
    graph: Graph,
    axes: Sequence[Axis],
    criterion: Criterion,
    *,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Score every position of axes.

    Args:
        model: The model that was traced; it is left as it was, its gradients too.
        graph: Its graph.
        axes: The axes to score.
        criterion: The criterion.
        batches: What ``loss`` is called with; needed by criteria of the gradient, not used by the others.
        loss: ``loss(model, batch)``, a scalar; the model is in evaluation mode.

    Returns:
        For each axis, by name, float64 scores of shape (axis size,). A relative criterion's are divided by their
        mean on the axis.

    Raises:
        SlivoError: If the criterion needs batches or a loss that are not given, or a score is not a number.
    """
    parameters = set(graph.parameters)
    members = {axis.name: _chosen(axis, parameters, criterion) for axis in axes}
    scores: dict[str, Tensor] = {}
    passes = 0
    for weights, grads in _passes(model, members, criterion, batches, loss):
        passes += 1
        for name, chosen in members.items():
            matrices = [_matrix(chosen, weights)] if grads is None else [_matrix(chosen, v) for v in (weights, grads)]
            score = criterion.score(*matrices).double()
            scores[name] = scores[name] + score if name in scores else score
    if not passes:
        raise SlivoError(f"criterion {criterion.name!r} was given no batches; give at least one")
    return {name: _finished(score / passes, criterion, name) for name, score in scores.items()}


def _passes(
    model: nn.Module,
    members: Mapping[str, Sequence[Member]],
    criterion: Criterion,
    batches: Iterable[Any] | None,
    loss: Loss | None,
) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Tensor] | None]]:
    """Yield the weights, and for each batch their gradients if the criterion needs them."""
    if not criterion.needs_grads:
        yield {name: value.detach() for name, value in model.named_parameters(remove_duplicate=False)}, None
        return
    if batches is None or loss is None:
        raise SlivoError(f"criterion {criterion.name!r} needs gradients: give batches=… and loss=…")
    # A copy, because parameters may be frozen and gradients may be in use.
    twin = duplicate(model).requires_grad_(True)
    weights = dict(twin.named_parameters(remove_duplicate=False))
    used = sorted({member.tensor for chosen in members.values() for member in chosen})
    with evaluating(twin):
        for batch in batches:
            grads = torch.autograd.grad(loss(twin, batch), [weights[name] for name in used], allow_unused=True)
            found = {
                name: torch.zeros_like(weights[name]) if grad is None else grad
                for name, grad in zip(used, grads, strict=True)
            }
            yield {name: weights[name].detach() for name in used}, found


def _chosen(axis: Axis, parameters: set[str], criterion: Criterion) -> list[Member]:
    """The members whose weights the criterion sees; an axis that nothing reads is scored on all."""
    mine = [member for member in axis.members if member.tensor in parameters]
    reading = [member for member in mine if member.reads]
    return reading if criterion.on == "read" and reading else mine


def _matrix(members: Sequence[Member], tensors: Mapping[str, Tensor]) -> Tensor:
    """Lay out the entries of all members as one matrix of shape (positions, entries), float32 at least."""
    rows = []
    for member in members:
        tensor = tensors[member.tensor].movedim(member.dim, 0)
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        rows.append(tensor[torch.from_numpy(member.index)].flatten(1))
    return torch.cat(rows, dim=1)


def _finished(score: Tensor, criterion: Criterion, axis: str) -> NDArray[np.float64]:
    if not bool(score.isfinite().all()):
        raise SlivoError(
            f"criterion {criterion.name!r} gives axis {axis!r} scores that are no finite numbers: "
            "the model's weights or its loss are NaN or infinite"
        )
    values: NDArray[np.float64] = score.detach().cpu().numpy()
    mean = float(values.mean())
    return values / mean if criterion.relative and mean > 0 else values
