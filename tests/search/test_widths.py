"""Widths: they keep to the budget, spare what is sensitive, and a recipe that says them leaves exactly them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import toys
from torch import nn

import slivo
from slivo.errors import TargetError
from slivo.graph import trace
from slivo.measure import cost
from slivo.prune import Budget, plan, prune
from slivo.recipe.schema import Prune
from slivo.search.widths import Shape, groups_of, name_of, sizes, written
from slivo.zoo import small_cnn

X = {"mlp": torch.randn(2, 12), "cnn": torch.randn(2, 1, 8, 8)}


def network(name: str) -> nn.Module:
    return toys.net(24) if name == "mlp" else small_cnn(width=16)


def even(names: list[str]) -> Mapping[str, float]:
    return dict.fromkeys(names, 1.0)


SHAPES = [Shape(), Shape(0.5, 0.0), Shape(0.2, 0.5, (0.5, 2.0))]


@pytest.mark.parametrize("name", X)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("macs", "round_to"), [(0.7, 1), (0.4, 4)])
def test_a_recipe_that_says_widths_leaves_exactly_them_by_any_criterion(
    name: str, shape: Shape, macs: float, round_to: int
) -> None:
    model = network(name)
    graph, whole = trace(model, X[name]), cost(model, X[name])
    groups = groups_of(graph, Prune(round_to=round_to))
    damages = {name_of(group): 0.1 * number for number, group in enumerate(groups)}
    found = sizes(graph, groups, damages, shape, {"macs": int(macs * graph.macs)})
    left = graph.count(found)[0]
    assert left <= macs * graph.macs
    for group in groups:
        width = found[name_of(group)]
        assert group.least <= width <= group.size
        assert width == group.size or width % round_to == 0 or width == group.least
    said = written(found, left, whole.macs)
    for criterion in ("l2", "random"):
        small = prune(
            model, X[name], keep=Budget(macs=int(said["keep"]["macs"] * whole.macs)), criterion=criterion,
            scope=said["scope"], min_width=said["min_width"], round_to=said["round_to"],
        )  # fmt: skip
        kept = {axis: len(stays) for edit in slivo.edits.record(small) for axis, stays in edit.axes.items()}
        assert {axis: kept.get(axis, graph[axis].size) for axis in found} == found


def test_a_shape_of_nothing_keeps_the_same_share_of_all() -> None:
    model = network("cnn")
    graph = trace(model, X["cnn"])
    groups = groups_of(graph, Prune())
    found = sizes(graph, groups, even([name_of(g) for g in groups]), Shape(), {"macs": int(0.5 * graph.macs)})
    shares = [found[name_of(group)] / group.size for group in groups]
    assert max(shares) - min(shares) <= 1 / min(group.size for group in groups)  # widths are whole


def test_what_is_sensitive_is_spared_and_what_is_dear_is_cut() -> None:
    model = network("cnn")
    graph = trace(model, X["cnn"])
    groups = groups_of(graph, Prune())
    names, limits = [name_of(group) for group in groups], {"macs": int(0.4 * graph.macs)}
    before = sizes(graph, groups, even(names), Shape(), limits)
    after = sizes(graph, groups, even(names) | {names[1]: 50.0}, Shape(sensitivity=0.5), limits)
    assert after[names[1]] > before[names[1]]
    assert all(after[name] <= before[name] for name in names if name != names[1])
    dear = max(groups, key=lambda group: sum(axis.macs for axis in group.axes))
    assert sizes(graph, groups, even(names), Shape(cost=0.5), limits)[name_of(dear)] <= before[name_of(dear)]
    late = sizes(graph, groups, even(names), Shape(tilt=(1.0, 2.0)), limits)
    assert late[names[-1]] >= before[names[-1]]


def test_damages_of_nothing_do_not_matter_and_budgets_out_of_reach_are_refused() -> None:
    model = network("mlp")
    graph = trace(model, X["mlp"])
    groups = groups_of(graph, Prune())
    names = [name_of(group) for group in groups]
    limits = {"macs": int(0.5 * graph.macs)}
    none = sizes(graph, groups, dict.fromkeys(names, 0.0), Shape(0.5), limits)
    assert none == sizes(graph, groups, even(names), Shape(), limits)
    whole = sizes(graph, groups, even(names), Shape(), {"macs": graph.macs})
    assert whole == {name: graph[name].size for name in names}
    with pytest.raises(TargetError, match=r"the least widths leave .* more than the target allows"):
        sizes(graph, groups, even(names), Shape(), {"macs": 1})


def test_the_plan_of_a_schedule_ends_at_the_widths() -> None:
    model = network("mlp")
    graph = trace(model, X["mlp"])
    groups = groups_of(graph, Prune())
    found = sizes(graph, groups, even([name_of(g) for g in groups]), Shape(), {"params": int(0.5 * graph.params)})
    assert graph.count(found)[1] <= 0.5 * graph.params
    said = written(found, graph.count(found)[0], graph.macs)
    once = plan(model, X["mlp"], keep=Budget(macs=0.8), scope="uniform", min_width=said["min_width"])
    assert all(len(once.keep[name]) >= width for name, width in found.items())
