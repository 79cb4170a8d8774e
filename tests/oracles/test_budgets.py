"""The oracle of budgets: on 200 random pairs of a model and a budget, what is left is as close to it as a step."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, lcm, prod
from typing import Any

import numpy as np
import pytest
import torch
from oracles.test_random_networks import STEPS, Random
from torch import nn
from zoo import ZOO, build

import slivo
from slivo.errors import TargetError
from slivo.graph import Graph, plan_slices
from slivo.measure import cost
from slivo.prune import Budget, Plan, allocate, cut, importance
from slivo.prune.criteria import resolve
from slivo.zoo import small_cnn

NETWORKS, BUDGETS = 20, 10
TARGETS = ("macs", "params", "bytes")


def network(seed: int) -> tuple[nn.Module, Any]:
    """A network that nobody thought of, a small one of the zoo of the tests, or one wide enough for small steps."""
    generator, kind = np.random.default_rng(seed), seed % 3
    torch.manual_seed(seed)
    if kind == 0:
        steps = [(str(generator.choice(STEPS)), int(generator.integers(12))) for _ in range(generator.integers(1, 8))]
        return Random([("conv", 1), *steps, ("conv", 2)]).eval(), torch.randn(2, 4, 4, 4)
    if kind == 1:
        return build(str(generator.choice(sorted(ZOO))))
    return small_cnn(width=int(generator.integers(12, 40))).eval(), torch.randn(2, 1, 8, 8)


def counted(graph: Graph, kept: Mapping[str, Any]) -> dict[str, int]:
    sizes = {name: len(each) for name, each in kept.items()}
    macs, params = graph.count(sizes)
    return {"macs": macs, "params": params, "bytes": graph.count_bytes(sizes)}


def equal(graph: Graph, name: str) -> set[str]:
    """An axis and those that keep equal sizes with it, directly or by way of others."""
    found = {name}
    for _ in graph.ties:
        found = found.union(*(tie for tie in graph.ties if tie & found))
    return found


def floors(graph: Graph, min_width: float | int, round_to: int) -> dict[str, int]:
    """The least width of each axis, said anew: of tied axes, that of the most demanding."""
    found = {}
    for axis in graph.prunable:
        tied = [graph[name] for name in equal(graph, axis.name)]
        multiple = lcm(round_to, *(each.multiple for each in tied))
        wanted = [min_width if isinstance(min_width, int) else ceil(min_width * each.size) for each in tied]
        least = max(*wanted, *(each.least for each in tied))
        found[axis.name] = min(axis.size, ceil(least / multiple) * multiple)
    return found


@pytest.mark.parametrize("seed", range(NETWORKS))
def test_budgets_are_missed_by_less_than_a_step(seed: int) -> None:
    model, x = network(seed)
    graph = slivo.trace(model, x)
    generator = np.random.default_rng(1000 + seed)
    axes = [axis for axis in graph.prunable if not any(graph[each].fixed for each in equal(graph, axis.name))]
    assert axes
    for number in range(BUDGETS):
        what = str(generator.choice(TARGETS))
        share = float(generator.uniform(0.1, 1.0))
        scope = str(generator.choice(["global", "uniform", "isomorphic"]))
        criterion = str(generator.choice(["l1", "l2", "random", "lamp", "fpgm"]))
        round_to = int(generator.choice([1, 1, 2, 4]))
        min_width = [0.1, 0.25, 1, 2][generator.integers(4)]
        whole = counted(graph, {})
        limit = int(share * whole[what])
        floor = floors(graph, min_width, round_to)
        scores = importance(model, graph, axes, resolve(criterion))
        options: Any = {"scope": scope, "min_width": min_width, "round_to": round_to}
        least = counted(graph, {axis.name: range(floor[axis.name]) for axis in axes})[what]
        if least > limit:
            with pytest.raises(TargetError, match=rf" {limit:,} asked for, {least:,} \("):
                allocate(graph, scores, Budget(**{what: share}), **options)
            continue
        kept = allocate(graph, scores, Budget(**{what: share}), **options)
        found = counted(graph, kept)
        assert found[what] <= limit
        assert all(len(each) >= floor[name] >= 1 for name, each in kept.items())
        steps = [found_after - found[what] for found_after in grown(graph, kept, round_to, what)]
        assert all(found[what] + step > limit for step in steps)
        assert found[what] >= 0.99 * limit - 1 or not steps or min(steps) > 0.01 * limit
        if number == 0:
            check_by_cutting(model, x, graph, kept, found)


def grown(graph: Graph, kept: Mapping[str, list[int]], round_to: int, what: str) -> list[int]:
    """What would be left if one step were given back, to each axis that is cut."""
    found = []
    for name in kept:
        tied = equal(graph, name)
        multiple = lcm(round_to, *(graph[each].multiple for each in tied))
        larger = min(graph[name].size, (len(kept[name]) // multiple + 1) * multiple)
        found.append(counted(graph, {**kept, **{each: range(larger) for each in tied}})[what])
    return found


def check_by_cutting(model: nn.Module, x: Any, graph: Graph, kept: Mapping[str, list[int]], found: Any) -> None:
    """What the graph counts is what is there once the model is really cut."""
    sizes = {name: {dim: len(each) for dim, each in dims.items()} for name, dims in plan_slices(graph, kept).items()}
    params = sum(
        prod(sizes.get(name, {}).get(dim, size) for dim, size in enumerate(each.shape))
        for name, each in model.named_parameters()
    )
    assert found["params"] == params
    plan = Plan({name: graph[name].size for name in kept}, {name: tuple(each) for name, each in kept.items()})
    small = cut(model, x, plan, graph=graph)
    left = cost(small, x)
    assert (left.macs, left.params) == (found["macs"], found["params"])
    if not any(isinstance(each, torch.fx.GraphModule) for each in small.modules()):
        assert left.size_bytes == found["bytes"]
