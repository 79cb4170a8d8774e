"""Cluster: round the weights of a model to few values of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from slivo import edits
from slivo.edits.share import Share, Shared
from slivo.errors import SlivoError
from slivo.graph.capture import evaluating
from slivo.graph.checks import check_model, check_values
from slivo.options import check_batches, listed, matches, said, wanted
from slivo.share.codebook import check, kmeans, nearest, powers_of_two

Codebook = Literal["kmeans", "powers-of-two"]
Loss = Callable[[nn.Module, Any], Tensor]


def share(
    model: nn.Module,
    clusters: int | Mapping[str, int] = 16,
    *,
    codebook: Codebook = "kmeans",
    init: str = "linear",
    groups: int = 1,
    vectors: bool = False,
    only: Sequence[str] | str = (),
    exclude: Sequence[str] | str = (),
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> nn.Module:
    """Return a model whose weights take few different values, so that a file can hold their numbers in a few bits each.

    Weights that are exactly zero stay so, and are not counted: prune first (`slivo.sparsify`), share then, store with
    `slivo.pack`. In memory nothing is saved.

    Args:
        model: The trained model; it is left untouched.
        clusters: Different values of each weight besides zero; 16 make codes of 4 bits, or of less once they are
            coded by how often they occur. Or one number for each glob over names of parameters and modules, the first
            that matches; weights that none matches stay as they are.
        codebook: ``kmeans`` finds values of least squared error; ``powers-of-two`` takes ±2ᵉ, so that integer hardware
            shifts where it would multiply.
        init: Where k-means begins: ``linear``, ``density`` or ``quantile`` (`slivo.share.kmeans`).
        groups: How many equal parts of each weight's outputs have values of their own. More of them are closer to the
            weights, and cost a codebook each.
        vectors: Whether parameters of one dimension are shared, too: biases, and scales of norms. They are few, but
            where nearly all weights are zero they are what is left.
        only: Globs over names of parameters and modules; if given, no others are shared.
        exclude: Likewise; these stay as they are.
        batches: With ``loss``, what weights are weighed by: k-means then counts each with the square of its gradient,
            summed over batches, in place of its second derivative. Small batches tell more.
        loss: ``loss(model, batch)``, a scalar.

    Returns:
        A new model that carries a `slivo.edits.Share`. Train its values with `slivo.share.TrainValues` or
        `slivo.share.tied`: other training parts what is shared.

    Raises:
        SlivoError: If an option is out of its range, a glob matches nothing, nothing is left, batches come without a
            loss, or weights are not finite.
        ShapeError: If a weight cannot be parted into the groups; names it.

    Source: Han, Mao, Dally 2015, "Deep Compression", arXiv:1510.00149, section 3; weighed by gradients, Choi, El-Khamy,
    Lee 2016, arXiv:1612.01543.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> small = share(net, 4)
        >>> [len(small[at].weight.unique()) for at in (0, 2)]
        [4, 4]
    """
    check_model(model)
    check_values(model)
    chosen = _chosen(model, clusters, 1 if vectors else 2, listed(only, "only"), listed(exclude, "exclude"))
    for count in chosen.values():
        check(count, init)
    if codebook not in get_args(Codebook):
        raise SlivoError(f"codebook is {said(codebook)}; there are {', '.join(get_args(Codebook))}")
    trained = codebook == "kmeans"
    edit = Share({name: Shared(count, groups, trained) for name, count in chosen.items()})
    new = edits.apply(model, edit)
    parameters = dict(new.named_parameters(remove_duplicate=False))
    counted = _importance(new, {name: parameters[name] for name in chosen}, batches, loss)
    with torch.no_grad():
        for name, count in chosen.items():
            parts = counted[name].chunk(groups) if name in counted else [None] * groups
            for weight, each in zip(parameters[name].chunk(groups), parts, strict=True):
                if not bool(weight.isfinite().all()):
                    raise SlivoError(
                        f"{name} is NaN or infinite somewhere, and has no values to share; repair it first"
                    )
                _round_(weight, count, each, init if trained else None)
    return new


def shared(model: nn.Module) -> dict[str, Shared]:
    """Return how the weights of a model are shared that its record names, as far as they are still there.

    Example:
        >>> list(shared(share(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 2, exclude="1")))
        ['0.weight']
    """
    there = dict(model.named_parameters(remove_duplicate=False))
    said = {name: one for edit in edits.record(model) if isinstance(edit, Share) for name, one in edit.weights.items()}
    return {name: one for name, one in said.items() if name in there}


def _chosen(
    model: nn.Module, clusters: int | Mapping[str, int], least: int, only: Sequence[str], exclude: Sequence[str]
) -> dict[str, int]:
    """Return the weights to share, of so many dimensions at least, by name, and the number of values of each."""
    by_glob = clusters if isinstance(clusters, Mapping) else {"*": clusters}
    weights = [name for name, each in model.named_parameters() if each.dim() >= least and each.is_floating_point()]
    for glob in (*by_glob, *only, *exclude):
        if not isinstance(glob, str) or not (matches(glob, weights) or glob == "*"):
            raise SlivoError(f"{said(glob)} matches no weight; there are {', '.join(weights[:4]) or 'none'} …")
    found: dict[str, int] = {}
    for name in weights:
        if not wanted(name, only, exclude):
            continue
        count = next((count for glob, count in by_glob.items() if matches(glob, [name])), None)
        if count is not None:
            found[name] = count
    if not found:
        raise SlivoError(
            "nothing is left to share: no weight is chosen that has two dimensions, or one with vectors=True"
        )
    return found


def _importance(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Iterable[Any] | None, loss: Loss | None
) -> dict[str, Tensor]:
    """Return the squares of each weight's gradients, summed over batches; nothing without batches."""
    if batches is None and loss is None:
        return {}
    if batches is None or loss is None:
        raise SlivoError("weights are weighed by batches and a loss; give both, or neither")
    check_batches(batches)
    asked = {name: weight for name, weight in weights.items() if weight.requires_grad}
    found = {name: torch.zeros_like(weight) for name, weight in asked.items()}
    if not asked:
        return {}
    with evaluating(model), torch.enable_grad():
        for batch in batches:
            gradients = torch.autograd.grad(loss(model, batch), list(asked.values()), allow_unused=True)
            for name, gradient in zip(asked, gradients, strict=True):
                if gradient is not None:
                    found[name] += gradient.square()
    return found


def _round_(weight: Tensor, count: int, counted: Tensor | None, init: str | None) -> None:
    """Round what is not zero of a weight, in place: to centers of k-means, or to powers of two if there is no init."""
    there = weight != 0
    values = weight[there]
    if not len(values):
        return
    if init is None:
        centers = powers_of_two(values, count)
        centers = torch.cat([centers, centers.new_zeros(1)]).sort().values
    else:
        centers = kmeans(values, count, init=init, weights=None if counted is None else counted[there])
    weight[there] = centers.to(weight)[nearest(values, centers)]
