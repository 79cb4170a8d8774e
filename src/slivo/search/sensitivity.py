"""Sensitivity: how much a network suffers when one axis alone is cut, measured once and kept on the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slivo.errors import SlivoError
from slivo.graph import Graph
from slivo.graph.capture import evaluating
from slivo.measure.quality import distribution
from slivo.prune import Plan, criteria, cut, importance
from slivo.prune.ranks import Group
from slivo.recipe import folder as files
from slivo.search.widths import name_of
from slivo.tasks import Task, forward, loader

FILE = "sensitivity.json"
SHARES = (0.75, 0.5)
"""What is left of a group while its damage is measured."""

_SAMPLES = 512
_BATCH = 128

Damages = dict[str, dict[str, dict[str, float]]]
"""By group and by share that is left: ``divergence`` of the output, and ``drop`` of the task's metric."""


def sensitivity(
    model: nn.Module,
    task: Task,
    graph: Graph,
    groups: Sequence[Group],
    *,
    file: Path,
    samples: int = _SAMPLES,
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Damages:
    """Measure for each group of axes what cutting it alone does to the network.

    What is measured goes to the file at once; a second call, after a kill or by another worker, reads it and measures
    only what is missing. The cuts are made one after the other; what they leave is run by threads meanwhile.

    Args:
        model: The trained network; left untouched.
        task: Its validation data are measured on.
        graph: Of the network, from `slivo.trace`.
        groups: From `slivo.search.widths.groups_of`. The positions of the least norm go first.
        file: Where what was measured is kept; written anew for another network or other samples.
        samples: How many of the validation data are used.
        threads: How many cut networks are run at once.
        progress: Hears how many measurements of how many are done.

    Returns:
        For each group and share: the Kullback-Leibler divergence of the network's distribution from that of the whole
        network, mean over samples, in nats (for networks that give out no logits: the squared distance of the outputs,
        relative to their variance), and by how much the task's metric falls.
    """
    batches = _batches(task, samples)
    key = _key(model, groups, len(batches), samples)
    found = _read(file, key)
    left = [(group, share) for group in groups for share in SHARES if f"{share:g}" not in found.get(name_of(group), {})]
    total = len(groups) * len(SHARES)
    heard = progress or (lambda *_: None)
    heard(total - len(left), total)
    if not left:
        return found
    axes = [axis for group in groups for axis in group.axes]
    scores = importance(model, graph, axes, criteria.resolve("l2"))
    whole, quality = _outputs(model, task, batches)
    waiting: list[tuple[Group, float, Future[dict[str, float]]]] = []

    def collect() -> None:
        group, share, future = waiting.pop(0)
        found.setdefault(name_of(group), {})[f"{share:g}"] = future.result()
        files.write_json(file, {"key": key, "damages": found})
        heard(sum(map(len, found.values())), total)

    with ThreadPoolExecutor(threads) as pool:
        for group, share in left:
            small = cut(model, task.example_inputs, _plan(group, share, scores), graph=graph)
            waiting.append((group, share, pool.submit(_damage, small, task, batches, whole, quality)))
            if len(waiting) > threads:
                collect()
        while waiting:
            collect()
    return found


def damages(found: Damages) -> dict[str, float]:
    """Return one number for each group: the mean divergence over what was left of it.

    Example:
        >>> damages({"conv out": {"0.75": {"divergence": 0.1, "drop": 0.0}, "0.5": {"divergence": 0.3, "drop": 0.1}}})
        {'conv out': 0.2}
    """
    return {name: sum(each["divergence"] for each in of.values()) / len(of) for name, of in found.items()}


def _plan(group: Group, share: float, scores: Mapping[str, Any]) -> Plan:
    width = max(1, round(share * group.size / group.multiple) * group.multiple)
    kept = {
        axis.name: sorted(scores[axis.name].argsort(kind="stable")[axis.size - min(width, axis.size) :].tolist())
        for axis in group.axes
    }
    return Plan.of(group.axes, kept)


def _batches(task: Task, samples: int) -> list[Any]:
    size = min(_BATCH, samples)
    found = []
    for index, batch in enumerate(loader(task, "val", batch_size=size)):
        if index * size >= samples:
            break
        found.append(batch)
    return found


def _outputs(model: nn.Module, task: Task, batches: Sequence[Any]) -> tuple[list[Tensor], float]:
    """Return what can be compared of the outputs, and the task's metric."""
    metrics, found = task.metrics(), []
    with evaluating(model), torch.inference_mode():
        for batch in batches:
            output = forward(task, model, batch)
            task.update(metrics, output, batch)
            found.append(_comparable(output))
    return found, float(metrics.compute()[task.primary])


def _comparable(output: Any) -> Tensor:
    try:
        return distribution(output)
    except SlivoError:
        return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)).float()


def _damage(
    model: nn.Module, task: Task, batches: Sequence[Any], whole: Sequence[Tensor], quality: float
) -> dict[str, float]:
    outputs, left = _outputs(model, task, batches)
    total, count = 0.0, 0
    for ours, theirs in zip(outputs, whole, strict=True):
        total += _distance(ours, theirs) * len(theirs)
        count += len(theirs)
    return {"divergence": max(0.0, total / count), "drop": quality - left}


def _distance(ours: Tensor, theirs: Tensor) -> float:
    chances = theirs.exp()
    if theirs.dim() > 1 and torch.allclose(chances.sum(-1), torch.ones(()), atol=1e-3):
        return float((chances * (theirs - ours)).sum(-1).mean())
    return float((ours - theirs).square().mean() / theirs.var().clamp_min(1e-12))


def _key(model: nn.Module, groups: Sequence[Group], batches: int, samples: int) -> str:
    """Return what tells networks and ways of measuring from one another."""
    told = [[name_of(group), group.size, group.multiple] for group in groups]
    return hashlib.sha256(json.dumps([seal(model), told, SHARES, batches, samples]).encode()).hexdigest()


def seal(model: nn.Module) -> str:
    """Return what tells a network's weights from others."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _read(file: Path, key: str) -> Damages:
    if not file.is_file():
        return {}
    try:
        data = files.read_json(file)
    except SlivoError:  # damaged; it is measured anew
        return {}
    found: Damages = data.get("damages", {}) if data.get("key") == key else {}
    return found
