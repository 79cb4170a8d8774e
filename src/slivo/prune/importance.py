"""Importance: a criterion applied to every axis of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slivo.errors import SlivoError
from slivo.graph import Axis, Graph, Member
from slivo.graph.capture import evaluating
from slivo.graph.checks import check_values
from slivo.graph.copies import duplicate
from slivo.prune.criteria import Criterion
from slivo.prune.options import check_batches, said

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
        SlivoError: If the criterion needs batches or a loss that are not given, the loss is not computed from the
            model, or a score is not a finite number; names the tensor that is at fault.
    """
    check_values(model)
    parameters = set(graph.parameters)
    members = {axis.name: _chosen(axis, parameters, criterion) for axis in axes}
    scores: dict[str, Tensor] = {}
    passes = 0
    for weights, grads in _passes(model, members, criterion, batches, loss):
        passes += 1
        for name, chosen in members.items():
            matrices = [_matrix(chosen, weights)] if grads is None else [_matrix(chosen, v) for v in (weights, grads)]
            score = _score(criterion, matrices, name)
            if not bool(score.isfinite().all()):
                raise SlivoError(_infinite(criterion, name, chosen, weights, grads))
            scores[name] = scores[name] + score if name in scores else score
    if not passes:
        raise SlivoError(f"criterion {criterion.name!r} was given no batches; give at least one")
    return {name: _finished(score / passes, criterion) for name, score in scores.items()}


def _passes(
    model: nn.Module,
    members: Mapping[str, Sequence[Member]],
    criterion: Criterion,
    batches: Iterable[Any] | None,
    loss: Loss | None,
) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Tensor] | None]]:
    """Yield the weights, and for each batch their gradients if the criterion needs them."""
    held = dict(model.named_parameters(remove_duplicate=False))
    used = sorted({member.tensor for chosen in members.values() for member in chosen})
    if not criterion.needs_grads:
        yield {name: value.detach() for name, value in held.items()}, None
        return
    if batches is None or loss is None:
        raise SlivoError(f"criterion {criterion.name!r} needs gradients: give batches=… and loss=…")
    check_batches(batches)
    if not callable(loss):
        raise SlivoError(
            f"loss is {said(loss)}; give a function, loss(model, batch), that returns a tensor of one number"
        )
    # A copy, because parameters may be frozen and gradients may be in use.
    with torch.inference_mode(False):
        twin = duplicate(model).requires_grad_(True)
    weights = dict(twin.named_parameters(remove_duplicate=False))
    with evaluating(twin):
        for batch in batches:
            grads = _gradients(loss, twin, batch, [weights[name] for name in used])
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
    """Lay out the entries of all members as one matrix of shape (positions, entries), float32 at least.

    Of complex entries the real and the imaginary parts are entries of their own.
    """
    rows = []
    for member in members:
        tensor = tensors[member.tensor].movedim(member.dim, 0)
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        tensor = tensor.float() if tensor.dtype.itemsize < 4 else tensor
        rows.append(tensor[torch.from_numpy(member.index)].flatten(1))
    return torch.cat(rows, dim=1)


def _gradients(loss: Loss, model: nn.Module, batch: Any, weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return the loss's gradients, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.enable_grad():
        # What was made in inference mode takes part in no gradient; a copy of it does.
        batch = pytree.tree_map_only(Tensor, lambda each: each.clone() if each.is_inference() else each, batch)
        value = loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            given = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise SlivoError(f"the loss is of {given}; loss(model, batch) must return a tensor of one number")
        found = torch.autograd.grad(value, weights, allow_unused=True) if value.requires_grad else ()
    if all(grad is None for grad in found):
        raise SlivoError(
            "the loss does not depend on the model's weights; compute it with the model that loss is given"
        )
    return found


def _score(criterion: Criterion, matrices: Sequence[Tensor], axis: str) -> Tensor:
    score = criterion.score(*matrices)
    if not isinstance(score, Tensor) or score.shape != matrices[0].shape[:1]:
        given = f"shape {list(score.shape)}" if isinstance(score, Tensor) else f"type {type(score).__name__}"
        raise SlivoError(
            f"criterion {criterion.name!r} gives axis {axis!r} scores of {given}; it must return a tensor of shape "
            f"{list(matrices[0].shape[:1])}, a score for each position"
        )
    return score.double()


def _infinite(
    criterion: Criterion,
    axis: str,
    chosen: Sequence[Member],
    weights: Mapping[str, Tensor],
    grads: Mapping[str, Tensor] | None,
) -> str:
    """Say where scores that are no finite numbers come from."""
    start = f"criterion {criterion.name!r} gives axis {axis!r} scores that are no finite numbers: "
    for tensors, what in ((weights, ""), (grads or {}, "the gradient of ")):
        for name in dict.fromkeys(member.tensor for member in chosen):
            if name in tensors and not bool(tensors[name].isfinite().all()):
                return f"{start}{what}{name} holds NaN or infinite values; repair the model, or exclude the axis"
    return f"{start}its weights are finite, but too large for it; give scores that stay finite, or exclude the axis"


def _finished(score: Tensor, criterion: Criterion) -> NDArray[np.float64]:
    values: NDArray[np.float64] = score.detach().cpu().numpy()
    mean = float(values.mean())
    return values / mean if criterion.relative and mean > 0 else values
