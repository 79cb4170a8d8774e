"""Importance: a criterion applied to every axis of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from slivo.errors import SlivoError
from slivo.graph import Axis, Graph, Member
from slivo.graph.capture import evaluating
from slivo.graph.checks import check_values
from slivo.graph.copies import duplicate
from slivo.measure import readers
from slivo.options import check_batches, said
from slivo.prune import runs
from slivo.prune.criterion import Criterion
from slivo.prune.runs import Found, Loss


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
        batches: What ``loss`` is called with; without a loss, inputs as in `slivo.graph.inputs.as_args`, and pairs
            ``(inputs, labels)`` for criteria of the label. Not used by criteria of the weights alone.
        loss: ``loss(model, batch)``, a scalar; the model is in evaluation mode. Needed by criteria of the gradient.

    Returns:
        For each axis, by name, float64 scores of shape (axis size,). A relative criterion's are divided by their
        mean on the axis.

    Raises:
        SlivoError: If the criterion needs batches or a loss that are not given, the loss is not computed from the
            model, a score is not a finite number, or nothing on an axis is of the kind that the criterion goes by;
            names the tensor or axis that is at fault.
    """
    check_values(model)
    scales = _scales(graph) if criterion.on == "scale" else frozenset[str]()
    members = {axis.name: _chosen(axis, graph, criterion, scales) for axis in axes}
    scores: dict[str, Tensor] = {}
    passes = 0
    used = sorted({member.tensor for chosen in members.values() for member in chosen})
    for found in runs_of(model, used, criterion, batches, loss, members):
        passes += 1
        for name, chosen in members.items():
            seen = _seen(chosen, found, criterion, name)
            score = _score(criterion, [_argument(each, name, seen, found) for each in criterion.given], graph[name])
            if not bool(score.isfinite().all()):
                raise SlivoError(_infinite(criterion, name, seen, found))
            scores[name] = scores[name] + score if name in scores else score
    if not passes:
        raise SlivoError(f"criterion {criterion.name!r} was given no batches; give at least one")
    return {name: _finished(score / passes, criterion) for name, score in scores.items()}


def runs_of(
    model: nn.Module,
    used: Sequence[str],
    criterion: Criterion,
    batches: Iterable[Any] | None,
    loss: Loss | None,
    members: Mapping[str, Sequence[Member]] | None = None,
) -> Iterator[Found]:
    """Yield what a criterion is given of some weights: once, or for each batch.

    Arguments and errors are those of `importance`; ``used`` names the weights, ``members`` says of each axis where
    it lies, for criteria that mask one position at a time.

    Returns:
        By name of the criterion's parameter and then of the weight.
    """
    held = dict(model.named_parameters(remove_duplicate=False))
    if not criterion.needs_batches:
        yield {"weights": {name: value.detach() for name, value in held.items()}, **(criterion.taken or {})}
        return
    if batches is None or (loss is None and criterion.needs_grads):
        raise SlivoError(
            f"criterion {criterion.name!r} needs gradients: give batches=… and loss=…"
            if criterion.needs_grads
            else f"criterion {criterion.name!r} needs {criterion.needs}: give batches=…"
        )
    check_batches(batches)
    if loss is not None and not callable(loss):
        raise SlivoError(
            f"loss is {said(loss)}; give a function, loss(model, batch), that returns a tensor of one number"
        )
    # A copy, because parameters may be frozen and gradients may be in use.
    with torch.inference_mode(False):
        twin = readers.lay_out_(duplicate(model).requires_grad_(True))
    every = dict(twin.named_parameters(remove_duplicate=False))
    weights = {name: every[name] for name in used}
    with evaluating(twin):
        for found in _runs(twin, weights, members or {}, criterion, batches, loss):
            yield {"weights": {name: value.detach() for name, value in weights.items()}, **found}


def _runs(
    twin: nn.Module,
    weights: Mapping[str, Tensor],
    members: Mapping[str, Sequence[Member]],
    criterion: Criterion,
    batches: Iterable[Any],
    loss: Loss | None,
) -> Iterator[Found]:
    """Run the batches, and yield what the criterion is given besides the weights."""
    given = {*criterion.given}
    if "units" in given:
        yield from runs.units(twin, weights, batches)
    elif "without" in given:
        yield from runs.masked(twin, weights, members, batches, loss)
    elif loss is not None and "slopes" in given:
        yield from runs.slopes(twin, weights, batches, loss)
    elif loss is not None and "moved" in given:
        yield from runs.moved(twin, weights, batches, loss)
    elif kinds := given & {"inputs", "levels", "readers"}:
        yield from runs.activations(twin, weights, batches, loss, kind=kinds.pop())
    elif "drawn" in given:
        yield from runs.drawn(twin, weights, batches, loss)
    elif loss is not None:
        for batch in batches:
            yield {"grads": runs.gradients(loss, twin, batch, weights)}


def _scales(graph: Graph) -> frozenset[str]:
    """Names of the parameters that scale what a norm gives out."""
    tensors, found = graph.inference.capture.tensors, set[str]()
    for node in graph.inference.capture.graph.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.name.endswith("_norm"):
            continue
        names = [argument.name for argument in schema.arguments]
        scale = dict(zip(names, node.args, strict=False)).get("weight", node.kwargs.get("weight"))
        if isinstance(scale, fx.Node) and scale.name in tensors:
            found.add(tensors[scale.name])
    return frozenset(found)


def _chosen(axis: Axis, graph: Graph, criterion: Criterion, scales: frozenset[str]) -> list[Member]:
    """The members whose weights the criterion sees; an axis that nothing reads is scored on all."""
    mine = [member for member in axis.members if member.tensor in graph.parameters]
    if criterion.on == "scale":
        scaling = [member for member in mine if member.tensor in scales]
        if not scaling:
            raise SlivoError(
                f"criterion {criterion.name!r} goes by the scales of norms, and no norm's lies on axis {axis.name!r}; "
                "exclude the axis, or choose another criterion"
            )
        return scaling
    reading = [member for member in mine if member.reads]
    return reading if criterion.on == "read" and reading else mine


def _seen(chosen: Sequence[Member], found: Found, criterion: Criterion, axis: str) -> Sequence[Member]:
    """The members whose activations were seen, for a criterion of those.

    No weight reads some axes, such as the width of queries. If the criterion looks at weights too, those that write the
    axis are scored, with the activations that they read along their other dimension.
    """
    kinds = {"inputs", "levels", "readers", "units"} & {*criterion.given}
    if not kinds:
        return chosen
    tensors = found[kinds.pop()]
    seen = [member for member in chosen if readers.key(member.tensor, member.dim) in tensors]
    if not seen and {"weights", "inputs"} <= {*criterion.given}:
        seen = [member for member in chosen if readers.key(member.tensor, 1 - member.dim) in tensors]
    if not seen:
        raise SlivoError(
            f"no activation was seen that a weight of axis {axis!r} multiplies (only those of linear layers and "
            "convolutions are); exclude the axis, or choose another criterion"
        )
    return seen


def _argument(what: str, axis: str, chosen: Sequence[Member], found: Found) -> Any:
    """Return what one parameter of a criterion is given for an axis."""
    tensors = found[what]
    if what in ("labels", "whole"):
        return tensors[what]
    if what == "without":
        return tensors[axis]
    if what == "slopes":
        return tuple(each.weights for each in readers.lay(chosen, tensors, found["readers"]))
    if what == "readers":
        return readers.lay(chosen, found["weights"], tensors)
    if what not in ("inputs", "levels", "units"):
        return _matrix(chosen, [tensors[member.tensor] for member in chosen])
    laid = []
    for member in chosen:
        either = [readers.key(member.tensor, dim) for dim in (member.dim, 1 - member.dim)]
        laid.append(next(tensors[key] for key in either if key in tensors))
    if what != "units":
        return _matrix(chosen, laid)
    samples = range(len(found["labels"]["labels"]))
    return torch.stack([_matrix(chosen, [each[sample] for each in laid]).mean(1) for sample in samples], dim=1)


def _matrix(members: Sequence[Member], tensors: Sequence[Tensor]) -> Tensor:
    """Lay out the entries of all members as one matrix of shape (positions, entries), float32 at least.

    Of complex entries the real and the imaginary parts are entries of their own.
    """
    rows = []
    for member, tensor in zip(members, tensors, strict=True):
        tensor = tensor.movedim(member.dim, 0)
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        tensor = tensor.float() if tensor.dtype.itemsize < 4 else tensor
        whole = np.array_equal(member.index, np.arange(len(tensor))[:, None])
        rows.append((tensor[:, None] if whole else tensor[torch.from_numpy(member.index)]).flatten(1))
    if len(rows) == 1:
        return rows[0].clone(memory_format=torch.contiguous_format)
    # Copied before, because joining what does not lie row by row takes five times as long.
    return torch.cat([each.contiguous() for each in rows], dim=1)


def _score(criterion: Criterion, given: Sequence[Any], axis: Axis) -> Tensor:
    score = criterion.score(*given)
    if not isinstance(score, Tensor) or score.shape != (axis.size,):
        given_back = f"shape {list(score.shape)}" if isinstance(score, Tensor) else f"type {type(score).__name__}"
        raise SlivoError(
            f"criterion {criterion.name!r} gives axis {axis.name!r} scores of {given_back}; it must return a tensor of "
            f"shape {[axis.size]}, a score for each position"
        )
    return score.double()


def _infinite(criterion: Criterion, axis: str, chosen: Sequence[Member], found: Found) -> str:
    """Say where scores that are no finite numbers come from."""
    start = f"criterion {criterion.name!r} gives axis {axis!r} scores that are no finite numbers: "
    for kind, what in (
        ("weights", ""),
        ("grads", "the gradient of "),
        ("slopes", "the gradient of "),
        ("moved", "the movement of "),
        ("drawn", "the gradient of "),
        ("inputs", "the activation that meets "),
        ("levels", "the activation that meets "),
        ("readers", "the activation that meets "),
    ):
        tensors = found.get(kind, {})
        for member in chosen:
            tensor = tensors.get(member.tensor, tensors.get(readers.key(member.tensor, member.dim)))
            if tensor is not None and not bool(tensor.isfinite().all()):
                return (
                    f"{start}{what}{member.tensor} holds NaN or infinite values; repair the model, or exclude the axis"
                )
    return f"{start}its weights are finite, but too large for it; give scores that stay finite, or exclude the axis"


def _finished(score: Tensor, criterion: Criterion) -> NDArray[np.float64]:
    values: NDArray[np.float64] = score.detach().cpu().numpy()
    mean = float(values.mean())
    return values / mean if criterion.relative and mean > 0 else values
