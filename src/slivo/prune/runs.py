"""Runs of a model on batches, for criteria that need more than the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slivo.errors import SlivoError
from slivo.graph import Member
from slivo.graph.inputs import fresh
from slivo.measure.quality import distribution
from slivo.measure.readers import Watch, grams, levels, means, squares

Loss = Callable[[nn.Module, Any], Tensor]
"""``loss(model, batch)``: a scalar, the mean over the batch's samples."""

Found = Mapping[str, Mapping[str, Tensor]]
"""What a criterion is given: by name of its parameter, then of the weight."""

_STATISTICS = {"inputs": squares, "levels": levels, "readers": grams}

_RATE = 0.01  # of the steps by which movement is seen: small enough to stay near the network that is pruned

_DRAWS = 8  # of each batch: a draw costs a backward pass, and a score of one draw has a spread of 140 %


def gradients(loss: Loss, model: nn.Module, batch: Any, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the loss's gradients, whatever mode the caller is in; of weights that it does not use, zeros."""
    with torch.inference_mode(False), torch.enable_grad():
        value = loss(model, usable(batch))
        if not isinstance(value, Tensor) or value.numel() != 1:
            given = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise SlivoError(f"the loss is of {given}; loss(model, batch) must return a tensor of one number")
        found = torch.autograd.grad(value, list(weights.values()), allow_unused=True) if value.requires_grad else ()
    if all(grad is None for grad in found):
        raise SlivoError(
            "the loss does not depend on the model's weights; compute it with the model that loss is given"
        )
    return _whole(weights, found)


def activations(
    model: nn.Module, weights: Mapping[str, Tensor], batches: Iterable[Any], loss: Loss | None, *, kind: str
) -> Iterator[Found]:
    """Yield once what all batches together say of the activations that weights multiply, as `Criterion` names it."""
    watch = Watch(weights, _STATISTICS[kind], spread=kind != "readers")
    count = 0
    for batch in batches:
        count += 1
        with torch.inference_mode(False), torch.enable_grad(), watch:  # kernels of inference alone hide products
            _forward(model, batch, loss)
    if count:
        yield {kind: watch.found}


def slopes(model: nn.Module, weights: Mapping[str, Tensor], batches: Iterable[Any], loss: Loss) -> Iterator[Found]:
    """Yield once the products of all that weights multiply, and the loss's gradients, summed over the batches."""
    watch, sums = Watch(weights, grams, spread=False), dict[str, Tensor]()
    for batch in batches:

        def watched(model: nn.Module, batch: Any) -> Tensor:
            with watch:  # the forward pass alone: the backward pass multiplies with weights too
                return loss(model, batch)

        for name, grad in gradients(watched, model, batch, weights).items():
            sums[name] = sums[name] + grad if name in sums else grad
    if sums:
        yield {"readers": watch.found, "slopes": sums}


def moved(model: nn.Module, weights: Mapping[str, Tensor], batches: Iterable[Any], loss: Loss) -> Iterator[Found]:
    """Yield once the sums of −w·g over a training of the model, in place, by a plain step on each batch."""
    every, sums = dict(model.named_parameters()), dict[str, Tensor]()
    for batch in batches:
        found = gradients(loss, model, batch, {**weights, **every})
        for name, weight in weights.items():
            step = -weight.detach() * found[name]
            sums[name] = sums[name] + step if name in sums else step
        with torch.no_grad():
            for name, parameter in every.items():
                parameter.sub_(found[name], alpha=_RATE)
    if sums:
        yield {"moved": sums}


def masked(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    members: Mapping[str, Sequence[Member]],
    batches: Iterable[Any],
    loss: Loss | None,
) -> Iterator[Found]:
    """Yield for each batch the output's distribution, and for each axis those with one position masked at a time."""
    for batch in batches:
        with torch.inference_mode(False), torch.no_grad():
            whole = distribution(_forward(model, batch, loss), torch.float64)
        # Of each axis one after the other, because all at once might not fit.
        without: dict[str, Any] = {
            name: _without(model, weights, chosen, batch, loss) for name, chosen in members.items()
        }
        yield {"whole": {"whole": whole}, "without": without}


def _without(
    model: nn.Module, weights: Mapping[str, Tensor], chosen: Sequence[Member], batch: Any, loss: Loss | None
) -> Iterator[Tensor]:
    """Yield the output's distribution with each position of an axis masked; the model is as before in between."""
    for position in range(len(chosen[0].index)):
        kept = [(weights[member.tensor], weights[member.tensor].detach().clone()) for member in chosen]
        with torch.inference_mode(False), torch.no_grad():
            try:
                for member in chosen:
                    index = torch.from_numpy(member.index[position]).to(weights[member.tensor].device)
                    weights[member.tensor].index_fill_(member.dim, index, 0)
                masked = distribution(_forward(model, batch, loss), torch.float64)
            finally:
                for weight, value in kept:
                    weight.copy_(value)
        yield masked


def units(model: nn.Module, weights: Mapping[str, Tensor], batches: Iterable[Any]) -> Iterator[Found]:
    """Yield once the mean activation of every unit on each sample, and the labels.

    Samples run one by one: which rows of a matrix product are of which sample is for the network's code to know.
    """
    found: dict[str, list[Tensor]] = {}
    labels = []
    for batch in batches:
        inputs, given = _labelled(batch)
        labels.append(given)
        for sample in range(len(given)):
            watch = Watch(weights, means, spread=True)
            with torch.inference_mode(False), torch.enable_grad(), watch:
                _forward(model, _one(inputs, sample, len(given)), None)
            for name, value in watch.found.items():
                found.setdefault(name, []).append(value)
    if labels:
        yield {
            "units": {name: torch.stack(values) for name, values in found.items()},
            "labels": {"labels": torch.cat(labels)},
        }


def drawn(
    model: nn.Module, weights: Mapping[str, Tensor], batches: Iterable[Any], loss: Loss | None
) -> Iterator[Found]:
    """Yield gradients of the log-likelihood of outputs drawn from the model, several for each batch.

    The gradient of a draw has mean zero and draws of different samples are independent, so that the square of the
    batch's sum has the mean of the sum of squares: no gradient of a single sample is needed.
    """
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        with torch.inference_mode(False), torch.enable_grad():
            log = distribution(_forward(model, batch, loss))
            chances = log.detach().exp().double().cpu().flatten(0, -2)
            for _ in range(_DRAWS):
                labels = torch.multinomial(chances, 1, generator=generator).to(log.device)
                value = log.flatten(0, -2).gather(1, labels).sum() / len(log) ** 0.5
                found = torch.autograd.grad(value, list(weights.values()), allow_unused=True, retain_graph=True)
                yield {"drawn": _whole(weights, found)}


def usable(batch: Any) -> Any:
    """Return a batch that takes part in gradients; what was made in inference mode does not, but a copy of it does."""
    return pytree.tree_map_only(Tensor, lambda each: each.clone() if each.is_inference() else each, batch)


def _forward(model: nn.Module, batch: Any, loss: Loss | None) -> Any:
    """Run the model on a batch by the loss, or without one on the batch as its arguments; return its output."""
    if loss is None:
        args, kwargs = fresh(usable(batch))
        return model(*args, **kwargs)
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        loss(model, usable(batch))
    finally:
        handle.remove()
    if not outputs:
        raise SlivoError("the loss does not call the model that it is given; compute it with that model")
    return outputs[-1]


def _labelled(batch: Any) -> tuple[Any, Tensor]:
    """Part a batch into inputs and labels."""
    if isinstance(batch, Sequence) and len(batch) == 2:
        labels = batch[1]
        if isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point() and len(labels):
            return batch[0], labels
    raise SlivoError("the criterion needs labels; give batches of (inputs, labels), labels a class for each sample")


def _one(inputs: Any, sample: int, count: int) -> Any:
    return pytree.tree_map_only(
        Tensor, lambda each: each[sample : sample + 1] if each.dim() and len(each) == count else each, inputs
    )


def _whole(weights: Mapping[str, Tensor], found: Sequence[Tensor | None]) -> Mapping[str, Tensor]:
    return {
        name: torch.zeros_like(weight) if grad is None else grad
        for (name, weight), grad in zip(weights.items(), found, strict=True)
    }
