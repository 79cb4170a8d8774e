"""Sparsity: single weights, or tiles of them, set to exact zeros."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, get_args

import torch
from torch import Tensor, nn

from slivo import edits
from slivo.edits.mask import Mask, Pattern
from slivo.errors import RecipeError, SlivoError
from slivo.graph import ExampleInputs
from slivo.graph.checks import check_model, check_values
from slivo.options import said
from slivo.prune import criteria
from slivo.prune.runs import Loss
from slivo.prune.sparse.choice import Scope, choose, score, sites


def sparsify(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    criterion: str | criteria.Criterion = "l1",
    scope: Scope = "global",
    min_keep: float = 0.01,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> nn.Module:
    """Return a model whose least important weights are exact zeros; shapes stay as they are.

    Zeros among dense numbers make a network easier to store, not faster: dense kernels multiply by them. What runs
    faster, `slivo.prune` makes.

    Args:
        model: The trained model; it is left untouched.
        example_inputs: For N:M patterns and the scope ``row``, which ask along which dimension each weight reads its
            inputs: if given, the model is traced to find it. Without, that is dimension 1, and of transposed
            convolutions 0.
        sparsity: Share of the entries that are zero after, 0 to below 1, to the nearest entry (or tile). N:M patterns
            have their own: 1 − N/M.
        pattern: ``unstructured``; ``N:M``, such as ``2:4``, at most N of M consecutive inputs not zero; or blocks of
            outputs times inputs, such as ``4x4``. A weight must divide into whole groups or blocks.
        criterion: Name of a criterion (`slivo.prune.criteria.names`) or one of your own that scores positions by their
            own entries. It sees each weight, or each block, as a position.
        scope: ``global`` (all weights of the network compete, by their scores as they are), ``layer`` (those of each
            tensor) or ``row`` (those of each output of each tensor, which `wanda` is meant for). In N:M groups those
            of a group do.
        min_keep: Least share of each tensor that stays if all compete, one entry at the least: no layer closes.
        only: Globs over names of parameters and paths of modules; if given, only those are made sparse. Otherwise all
            parameters of two dimensions or more that are called a weight, or a kernel.
        exclude: Likewise; these stay dense.
        batches: For criteria that need data, as for `slivo.prune`.
        loss: For criteria of the gradient: ``loss(model, batch)``, a scalar.

    Returns:
        A new model that carries a `slivo.edits.Mask`. Weights that were zero go first; of equal scores, the first in
        memory stays. What trains it on must keep the zeros: `HoldMasks`, or `hold`.

    Raises:
        RecipeError: If the sparsity, the pattern or the scope makes no sense.
        ShapeError: If a weight does not divide into the pattern; says what to exclude.
        SlivoError: If a glob matches nothing, the criterion scores whole channels, or lacks what it needs.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> sparse = sparsify(net, sparsity=0.75)
        >>> sum(int((sparse[at].weight == 0).sum()) for at in (0, 2))
        72
        >>> sorted(sparsify(net, pattern="2:4")[0].weight[0, :4].ne(0).int().tolist())
        [0, 0, 1, 1]
    """
    check_model(model)
    check_values(model)
    share = check_sparsity(sparsity, pattern)
    check_scope(scope, min_keep)
    asked = scope == "row" or Pattern.parse(pattern).most is not None
    found = sites(model, pattern, example_inputs=example_inputs if asked else None, only=only, exclude=exclude)
    by = criteria.resolve(criterion)
    scores = score(model, found, by, batches=batches, loss=loss)
    kept = choose(found, scores, sparsity=share, scope=scope, min_keep=min_keep)
    new = edits.apply(model, Mask({name: site.written for name, site in found.items()}))
    zero_(new, kept)
    return new


def masked(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that the masks on a model's record name, as far as they are still there.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> list(masked(sparsify(net, sparsity=0.5, exclude=["1"])))
        ['0.weight']
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {name: None for edit in edits.record(model) if isinstance(edit, Mask) for name in edit.patterns}
    return {name: parameters[name] for name in names if name in parameters}


def sparsity(model: nn.Module) -> float:
    """Return the share of zeros among the weights that are masked; 0 if none is.

    Example:
        >>> sparsity(sparsify(nn.Linear(8, 8), sparsity=0.25))
        0.25
    """
    weights = masked(model).values()
    entries = sum(weight.numel() for weight in weights)
    return sum(int((weight == 0).sum()) for weight in weights) / entries if entries else 0.0


def zero_(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Set what is not kept to zero, in place."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, stays in kept.items():
            parameters[name].masked_fill_(~stays.to(parameters[name].device), 0)


def check_sparsity(share: object, pattern: str) -> float:
    """Return the share of zeros, from what was given or from the pattern.

    Raises:
        RecipeError: If it is no share, is missing, or is not the pattern's.
    """
    parsed = Pattern.parse(pattern)
    own = None if parsed.most is None else 1 - parsed.most / parsed.tile[-1]
    if share is None and own is not None:
        return own
    if share is None:
        raise RecipeError(f"pattern {pattern!r} needs a sparsity; a share of zeros from 0 to below 1")
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= float(share) < 1:
        raise RecipeError(f"sparsity is {said(share)}; a share of zeros from 0 to below 1 (0.9 keeps a tenth)")
    if own is not None and float(share) != own:
        raise RecipeError(f"sparsity is {share} and the pattern {pattern!r} has {own:g} of its own; leave it out")
    return float(share)


def check_scope(scope: object, min_keep: object) -> None:
    """Look at what competes, and the least share.

    Raises:
        RecipeError: If there is no such scope.
        SlivoError: If the least share is none.
    """
    if scope not in get_args(Scope):
        raise RecipeError(f"scope is {said(scope)}; there are {', '.join(get_args(Scope))}")
    if isinstance(min_keep, bool) or not isinstance(min_keep, Real) or not 0 <= float(min_keep) <= 1:
        raise SlivoError(f"min_keep is {said(min_keep)}; a share from 0 to 1 (0.01 keeps a hundredth of each weight)")
