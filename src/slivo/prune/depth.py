"""Depth pruning: drop the blocks that change least what passes through them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slivo import edits
from slivo.edits.drop import Drop
from slivo.errors import ShapeError, SlivoError, TargetError
from slivo.graph.blocks import Block, blocks
from slivo.graph.capture import check_call, check_runs, trying
from slivo.graph.checks import check_values
from slivo.graph.inputs import ExampleInputs, fresh
from slivo.graph.program import tensors_of
from slivo.measure import cost
from slivo.measure.budget import COUNTED, Budget, check_budget
from slivo.options import check_batches, listed


def drop(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    keep: Budget,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    batches: Iterable[ExampleInputs] | None = None,
) -> nn.Module:
    """Return a shallower model: the blocks of least influence are taken out until the budget is met.

    Args:
        model: The trained model; left untouched.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        keep: What may stay, in MACs, parameters or bytes.
        only: Globs over block paths; if given, only those are dropped.
        exclude: Globs over block paths that stay.
        batches: What the model is called with to measure influence; the example inputs if None. Some hundred samples
            of real data are better.

    Returns:
        A new model that carries the edit (`slivo.edits.record`).

    Raises:
        CaptureError: If the model does not run on the inputs or cannot be captured.
        TargetError: If the budget cannot be met by dropping blocks; says what the least possible is.
        SlivoError: If there is no block to drop, or a glob matches none.

    Example:
        >>> from slivo.zoo import small_cnn
        >>> net, images = small_cnn(width=8), torch.randn(4, 1, 8, 8)
        >>> small = drop(net, images, keep=Budget(macs=0.8))
        >>> sum(type(stage[3]).__name__ == "Skip" for stage in (small.stage1, small.stage2, small.stage3))
        1
    """
    check_budget(keep)
    if keep.timed:
        raise TargetError("blocks are dropped to a budget of macs, params or bytes; for latency prune widths")
    if batches is not None:
        check_batches(batches)
    check_call(model, example_inputs)
    check_runs(model, example_inputs)
    check_values(model)
    found = _selected(blocks(model, example_inputs), listed(only, "only"), listed(exclude, "exclude"))
    worth = influence(model, found, [example_inputs] if batches is None else batches)
    order = sorted(found, key=lambda block: worth[block.module])
    whole = _costs(model, example_inputs)
    limits = keep.limits(whole)
    low, high = 0, len(order)
    least = _costs(_without(model, order), example_inputs)
    if any(least[name] > limit for name, limit in limits.items()):
        told = ", ".join(
            f"{least[name]:,} {COUNTED[name]} ({least[name] / max(1, whole[name]):.1%})"
            for name in COUNTED
            if name in limits
        )
        raise TargetError(
            f"the budget cannot be met by dropping blocks: without all {len(order)} the model has {told}. Allow more, "
            "or prune widths as well"
        )
    while low < high:
        middle = (low + high) // 2
        left = _costs(_without(model, order[:middle]), example_inputs)
        if all(left[name] <= limit for name, limit in limits.items()):
            high = middle
        else:
            low = middle + 1
    dropped = _without(model, order[:low])
    _check(model, dropped, example_inputs)
    return dropped


def influence(model: nn.Module, found: Sequence[Block], batches: Iterable[ExampleInputs]) -> dict[str, float]:
    """Return how much each block changes the residual stream, by its module.

    Args:
        model: Run in evaluation mode; left as it was.
        found: Blocks of the model.
        batches: What it is called with; the first dimension is the batch.

    Returns:
        ``1 − cos(x, y)``, the mean over samples of the angle's cosine between what enters and what leaves, each sample
        taken as one vector: 0 for a block that does nothing, up to 2.

    Source: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
    arXiv:2403.03853, eq. 1, where the vectors are those of tokens.

    Example:
        >>> net = nn.Sequential(nn.Identity())
        >>> influence(net, [Block("0", 0)], [torch.ones(2, 3)])
        {'0': 0.0}
    """
    sums: dict[str, list[Tensor]] = {block.module: [] for block in found}
    entered: dict[str, list[Tensor]] = {block.module: [] for block in found}

    def enter(block: Block, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        stream = args[block.argument] if isinstance(block.argument, int) else kwargs[block.argument]
        entered[block.module].append(_vectors(stream))

    def leave(block: Block, output: Any) -> None:
        stream = output if block.outputs is None else output[block.index]
        cosine = F.cosine_similarity(entered[block.module].pop(), _vectors(stream))
        sums[block.module].append(1 - cosine)

    handles: list[RemovableHandle] = []
    for block in found:
        module = model.get_submodule(block.module)
        handles += [
            module.register_forward_pre_hook(
                lambda _, args, kwargs, block=block: enter(block, args, kwargs), with_kwargs=True
            ),
            module.register_forward_hook(lambda _, __, output, block=block: leave(block, output)),
        ]
    try:
        for batch in batches:
            check_runs(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not all(sums.values()):
        raise SlivoError("there are no batches to measure the influence of blocks on; give one at least")
    means = {name: float(torch.cat(values).mean()) for name, values in sums.items()}
    for name, mean in means.items():
        if not isfinite(mean):
            raise SlivoError(f"what passes through {name} is no finite number: {_infinite(model)}")
    return {name: max(0.0, mean) for name, mean in means.items()}


def _vectors(stream: Tensor) -> Tensor:
    """Return each sample as one vector; a copy, because a block may add to its input in place."""
    stream = stream.unsqueeze(0) if stream.dim() < 2 else stream
    return stream.flatten(1).to(torch.float64, copy=True)


def _infinite(model: nn.Module) -> str:
    """Say which weight is at fault."""
    for name, tensor in model.named_parameters():
        if not bool(tensor.isfinite().all()):
            return f"{name} holds NaN or infinite values; repair or retrain the model"
    return "the batches hold NaN or infinite values, or the activations overflow; give others, or use a wider dtype"


def _selected(found: Sequence[Block], only: Sequence[str], exclude: Sequence[str]) -> list[Block]:
    names = [block.module for block in found]
    for glob in (*only, *exclude):
        if not any(fnmatchcase(name, glob) for name in names):
            raise SlivoError(f"{glob!r} matches no block; there are {', '.join(names[:8]) or 'none'}")
    left = [
        block
        for block in found
        if (not only or any(fnmatchcase(block.module, glob) for glob in only))
        and not any(fnmatchcase(block.module, glob) for glob in exclude)
    ]
    if not left:
        raise SlivoError(
            "the model has no block that can be dropped: none of its entries of Sequential or ModuleList adds to what "
            "passes through it, or all are excluded; prune widths instead"
        )
    return left


def _costs(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, int]:
    found = cost(model, example_inputs)
    return {"macs": found.macs, "params": found.params, "bytes": found.size_bytes}


def _without(model: nn.Module, dropped: Sequence[Block]) -> nn.Module:
    return edits.apply(model, Drop(tuple(dropped)))


def _check(model: nn.Module, dropped: nn.Module, example_inputs: ExampleInputs) -> None:
    """Run both, and compare what they give out."""
    before, after = (_shapes(net, example_inputs) for net in (model, dropped))
    if before != after:
        raise ShapeError(f"without its blocks the model gives out {after}, not {before}; exclude the last ones")


def _shapes(model: nn.Module, example_inputs: ExampleInputs) -> list[tuple[int, ...]]:
    args, kwargs = fresh(example_inputs)
    with trying(model):
        return [tuple(each.shape) for each in tensors_of(model(*args, **kwargs))]
