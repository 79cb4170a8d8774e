"""One-shot: zero a share of each layer's weights at once, block by block, by what a few samples make the layer read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from slivo import edits
from slivo.edits.mask import Pattern
from slivo.errors import SlivoError
from slivo.graph import Call
from slivo.graph.capture import check_runs, trying
from slivo.graph.checks import check_values
from slivo.graph.copies import duplicate
from slivo.measure.blockwise import Replay, part_of, repeated, run_order, run_through
from slivo.measure.readers import Watch, grams, key, squares
from slivo.options import calls_of, few, listed, matches, said, wanted
from slivo.prune import layerwise
from slivo.prune.layerwise import Zeros
from slivo.train.progress import Report

_log = logging.getLogger("slivo")

Method = Literal["sparsegpt", "wanda", "magnitude"]


@dataclass(frozen=True)
class _Rule:
    """How weights are zeroed: the method, how many, and the method's options."""

    method: Method
    zeros: Zeros
    pattern: str
    damping: float
    columns: int

    def statistic(self, activations: Tensor) -> Tensor:
        """Return what the method needs to know of activations: all products, or squares alone."""
        return grams(activations) if self.method == "sparsegpt" else squares(activations)

    def solve(self, weight: Tensor, seen: Tensor) -> Tensor:
        """Return the sparse matrix, shape (outputs, inputs)."""
        if self.method == "sparsegpt":
            return layerwise.sparsegpt(weight, seen, self.zeros, damping=self.damping, columns=self.columns)
        if self.method == "wanda":
            return layerwise.wanda(weight, seen, self.zeros)
        return layerwise.magnitude(weight, self.zeros)


@dataclass
class _Done:
    """What has become of the weights.

    Args:
        patterns: Of each that was pruned, its pattern.
        dense: Names of those that no product was seen of.
    """

    patterns: dict[str, str] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)


def one_shot(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: Method = "sparsegpt",
    sparsity: float | None = None,
    pattern: str = "unstructured",
    blocks: Sequence[str] | str = (),
    only: Sequence[str] | str = (),
    exclude: Sequence[str] | str = (),
    damping: float = 0.01,
    columns: int = 128,
    hold: torch.device | str | None = None,
    report: Report | None = None,
) -> nn.Module:
    """Return a model in whose blocks a share of the weights is zero, without training and without labels.

    Blocks are taken one after the other; what each reads is measured behind the pruned ones. Only one block's
    measurements are held at a time, and of each sample what the last pruned block gave out. Where a model has no
    blocks, each layer is one.

    Args:
        model: The trained model, on any device; it is left untouched.
        batches: Inputs as for `prune`, each a tensor, a tuple of positional or a mapping of keyword arguments, where
            the model is. A hundred sequences or a few hundred images, unlabelled; all are held in memory.
        method: ``sparsegpt`` sets the weights that stay so that they make up for the others; ``wanda`` drops those of
            least weight times activation; ``magnitude`` the least, and is what the others must beat.
        sparsity: Share of zeros in each weight, 0 to 1; half if None. N:M says it itself.
        pattern: ``unstructured``, or N:M: of each M consecutive inputs at most N have weights. ``2:4`` is what the
            sparse kernels of some accelerators take.
        blocks: Globs over module paths. If empty, the entries of lists of modules of one class; weights outside, as
            those of embeddings and heads, stay as they are.
        only: Globs over names of weights and modules; if given, no others are pruned.
        exclude: Globs over names of weights and modules that stay dense.
        damping: Of `sparsegpt`: what is added to the diagonal of XᵀX, as a share of its mean. More of it suits few
            samples.
        columns: Of `sparsegpt`: how many columns choose their zeros together. Fewer follow the corrections closer;
            the columns of one choice share their zeros freely.
        hold: Device for what is kept of the samples between blocks; ``"cpu"`` frees an accelerator's memory. If None,
            where the model computes it.
        report: Told after each block: its path, how many are done, of how many, and its ``sparsity``.

    Returns:
        A new model of the same structure that carries a `slivo.edits.Mask`.

    Raises:
        SlivoError: If an option is out of its range, a glob matches nothing, nothing is left to prune, or activations
            are no finite numbers.
        CaptureError: If the model does not run on the first batch.
        ShapeError: If a weight's inputs cannot be parted into groups of M; names it.

    Source: Frantar, Alistarh 2023, "SparseGPT", arXiv:2301.00774; Sun, Liu, Bair, Kolter 2023, "A Simple and Effective
    Pruning Approach for Large Language Models" (Wanda), arXiv:2306.11695. Layers: `slivo.prune.layerwise`.

    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        >>> net = nn.Sequential(block(), block(), nn.Linear(8, 2))
        >>> sparse = one_shot(net, [torch.randn(32, 8)], pattern="2:4", exclude="2")
        >>> [float((weight == 0).float().mean()) for name, weight in sparse.named_parameters() if "weight" in name]
        [0.5, 0.5, 0.0]
    """
    rule = _rule(method, sparsity, pattern, damping, columns)
    calls = calls_of(batches)
    check_runs(model, calls[0])
    check_values(model)
    with torch.inference_mode(False):
        new = duplicate(model)
        with trying(new):
            done = _prune_(new, calls, rule, _chosen(new, blocks, only, exclude), hold, report)
        if done.dense:
            _log.warning(
                "%s stay dense: no matrix product or convolution with them was seen, or they are not contiguous",
                few(done.dense),
            )
        return edits.replay(new, (edits.Mask(done.patterns),))


def _rule(method: Method, sparsity: float | None, pattern: str, damping: float, columns: int) -> _Rule:
    if method not in get_args(Method):
        raise SlivoError(f"method is {said(method)}; one of {', '.join(get_args(Method))}")
    if sparsity is not None and (isinstance(sparsity, bool) or not isinstance(sparsity, float | int)):
        raise SlivoError(f"sparsity is {said(sparsity)}; a share of zeros between 0 and 1")
    parsed = Pattern.parse(pattern)
    if (parsed.tile and parsed.most is None) or "@" in pattern:
        raise SlivoError(f"pattern is {pattern!r}; 'unstructured', or N:M as '2:4'")
    group = parsed.tile[-1] if parsed.tile else None
    zeros = Zeros(0.5 if sparsity is None else float(sparsity))
    if group is not None and parsed.most is not None:
        zeros = Zeros(1 - parsed.most / group, group)
        if sparsity is not None and sparsity != zeros.share:
            raise SlivoError(
                f"sparsity is {sparsity} and the pattern {pattern!r} means {zeros.share:g}; leave sparsity out"
            )
    if not 0 < zeros.share < 1:
        raise SlivoError(f"sparsity is {said(sparsity)}; a share of zeros between 0 and 1, as 0.5")
    layerwise.check_options(damping, columns, zeros)
    return _Rule(method, zeros, pattern, float(damping), columns)


def _chosen(
    model: nn.Module, blocks: Sequence[str] | str, only: Sequence[str] | str, exclude: Sequence[str] | str
) -> dict[str, str]:
    """Return the weights to prune, by name, each with the part that it is of."""
    blocks, only, exclude = listed(blocks, "blocks"), listed(only, "only"), listed(exclude, "exclude")
    paths = [path for path, _ in model.named_modules() if path]
    parts = repeated(model)
    if blocks:
        _check_globs(blocks, paths, "module")
        parts = []
        for path in paths:  # a glob's star stands for dots, too: of modules within each other the outermost is meant
            if any(fnmatchcase(path, glob) for glob in blocks) and part_of(path, parts) is None:
                parts.append(path)
    tables = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    weights = {
        name: part_of(name, parts) if parts else name.rpartition(".")[0]
        for name, weight in model.named_parameters()
        if weight.dim() > 1 and weight.is_floating_point() and id(weight) not in tables
    }
    there = {name: part for name, part in weights.items() if part is not None}
    _check_globs((*only, *exclude), list(there), "weight in the blocks" if parts else "weight")
    left = {name: part for name, part in there.items() if wanted(name, only, exclude)}
    if not left:
        raise SlivoError(
            "nothing is left to prune: there is no weight of two dimensions or more that only and exclude leave in "
            f"{few(parts) if parts else 'the model'}"
        )
    return left


def _check_globs(globs: Iterable[str], names: Sequence[str], what: str) -> None:
    for glob in globs:
        if not matches(glob, names):
            raise SlivoError(f"{glob!r} matches no {what}; there are {few(names) or 'none'}")


def _prune_(
    model: nn.Module,
    calls: Sequence[Call],
    rule: _Rule,
    chosen: Mapping[str, str],
    hold: torch.device | str | None,
    report: Report | None,
) -> _Done:
    """Prune a model's weights in place, part by part in the order in which they run."""
    every = dict(model.named_parameters())
    order = run_order(model, {name: every[name] for name in chosen}, chosen, calls[0])
    if not order:
        raise SlivoError(
            f"no matrix product or convolution with {few(list(chosen))} was seen on the first batch; remove "
            "parametrizations and merge adapters first, and make weights contiguous"
        )
    replay = Replay(model, run_through(model, order, calls[0]), calls, hold)
    done = _Done()
    for index, part in enumerate(order):
        weights = {name: every[name] for name, holder in chosen.items() if holder == part}
        watch = Watch(weights, rule.statistic, spread=False, stacks=True)
        replay.watch(index, watch)
        for name, weight in weights.items():
            uses = [use for use in product(range(3), (False, True)) if key(name, use[0], stack=use[1]) in watch.found]
            if len(uses) != 1:  # not seen, or tied with its own transpose
                done.dense.append(name)
                continue
            (dim, stack), *_ = uses
            done.patterns[name] = _written(rule, name, weight, dim)
            _set_(weight, rule, watch.found.pop(key(name, dim, stack=stack)), name, dim, stack=stack)
        if report is not None:
            zeros = sum(int((weight == 0).sum()) for weight in weights.values())
            share = zeros / sum(weight.numel() for weight in weights.values())
            report(part, index + 1, len(order), {"sparsity": share})
    done.dense += [name for name, part in chosen.items() if part not in order]
    return done


def _written(rule: _Rule, name: str, weight: Tensor, dim: int) -> str:
    """Return a weight's pattern, as the edit says it."""
    written = rule.pattern if rule.zeros.group is None or dim == 1 else f"{rule.pattern}@{dim}"
    Pattern.parse(written).check(name, weight.shape)
    return written


def _set_(weight: Tensor, rule: _Rule, seen: Tensor, name: str, dim: int, *, stack: bool) -> None:
    """Prune one weight in place: a matrix, a convolution's, or a stack of matrices."""
    if not bool(seen.isfinite().all()):
        raise SlivoError(
            f"what {name} reads is NaN or infinite on some sample; repair the model, or give other batches"
        )
    with torch.no_grad():
        turned = dim == 0 or (stack and dim == 1)
        if turned:
            matrices = (weight if stack else weight.reshape(1, len(weight), -1)).mT
        else:
            matrices = weight.reshape(len(seen), -1, seen.shape[1])
        shape = matrices.shape
        if rule.method == "magnitude":  # of the whole weight, whatever its groups
            matrices, seen = matrices.reshape(1, -1, seen.shape[1]), seen[:1]
        # Channels are consecutive, at each place of a kernel.
        order = torch.arange(seen.shape[1], device=seen.device).reshape(weight.shape[dim], -1).T.flatten()
        moved = len(order) > weight.shape[dim]
        new = torch.empty_like(matrices)
        for matrix, each, out in zip(matrices, seen, new, strict=True):
            for along in range(each.dim()) if moved else ():
                each = each.index_select(along, order)
            out[:, order] = rule.solve(matrix[:, order], each)
        weight.copy_((new.reshape(shape).mT if turned else new).reshape(weight.shape))
