"""Surgeon: each removal costs what least squares says it costs, and what others can stand in for goes first."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import slivo
from slivo import edits
from slivo.errors import SlivoError, TargetError
from slivo.measure.readers import Reader
from slivo.prune import Budget, cut, refit, surgeon
from slivo.prune.surgeon import Judged, losses


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def judged(positions: int, columns: int, outputs: int) -> Judged:
    """Return a weight that reads mixed inputs, laid out as a convolution's kernel is."""
    rows = noise(200, positions * columns) @ noise(positions * columns, positions * columns)
    places = torch.arange(positions * columns).reshape(positions, columns)
    return Judged(Reader(noise(positions, columns, outputs), rows.mT @ rows, places), noise(outputs).square())


def least(each: Judged, gone: list[int]) -> float:
    """Return, by least squares over the inputs, half the weighted error when positions are gone."""
    reader = each.reader
    weights = torch.zeros(len(reader.gram), reader.weights.shape[-1], dtype=torch.float64)
    weights[reader.places] = reader.weights
    inputs = torch.linalg.cholesky(reader.gram).mT  # any rows with these second moments
    stay = [place for position, row in enumerate(reader.places.tolist()) for place in row if position not in gone]
    if not stay:
        return float((inputs @ weights).square().sum(0) @ each.gradients) / 2
    fitted = torch.linalg.lstsq(inputs[:, stay], inputs @ weights).solution
    return float((inputs[:, stay] @ fitted - inputs @ weights).square().sum(0) @ each.gradients) / 2


@pytest.mark.parametrize(("positions", "columns"), [(5, 1), (4, 3)])
def test_each_removal_costs_what_least_squares_says(positions: int, columns: int) -> None:
    torch.manual_seed(positions)
    readers = [judged(positions, columns, 3), judged(positions, columns, 2)]
    found = losses(readers, 1e-12)
    gone: list[int] = []
    for _ in range(positions):
        before = sum(least(each, gone) for each in readers)
        left = [position for position in range(positions) if position not in gone]
        costs = {one: sum(least(each, [*gone, one]) for each in readers) - before for one in left}
        first = min(costs, key=lambda one: costs[one])
        assert np.isclose(found[first], max([costs[first], *(found[each] for each in gone)]), rtol=1e-6)
        gone.append(first)


class Branches(nn.Module):
    """A stem that a grouped convolution, a transposed one and a linear layer read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 4, 3, padding=1, groups=2)
        self.flat = nn.Linear(8, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = self.grouped((self.deep(x) + self.up(x)).relu())
        return self.head(y.mean((2, 3)) + self.flat(x.mean((2, 3))).relu())


def test_what_others_say_goes_first_and_refit_loses_nothing() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    ).double()
    with torch.no_grad():
        net[0].weight[3:], net[0].bias[3:] = 2 * net[0].weight[:3], 2 * net[0].bias[:3]
    x = noise(64, 3, 6, 6)
    plan = surgeon(net, x[:2], keep=Budget(macs=0.55), batches=[x[:32], x[32:]], only=["0"], damping=1e-9)
    assert sorted(position % 3 for position in plan.keep["0 out"]) == [0, 1, 2]
    small = refit(cut(net, x[:2], plan), net, [x], ridge=1e-11)
    assert torch.allclose(small(x), net(x), rtol=0, atol=1e-7)


@pytest.mark.parametrize("budget", [Budget(macs=0.6), Budget(params=0.6), Budget(macs=0.7, params=0.7)])
def test_the_budget_holds_and_the_model_stays(budget: Budget) -> None:
    torch.manual_seed(2)
    net, x = Branches().eval(), torch.randn(16, 3, 8, 8)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    plan = surgeon(net, x[:2], keep=budget, batches=[x])
    small = cut(net, x[:2], plan)
    graph, after = slivo.trace(net, x[:2]), slivo.trace(small, x[:2])
    limits = budget.limits({"macs": graph.macs, "params": graph.params})
    assert all(getattr(after, name) <= limit for name, limit in limits.items())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not edits.record(net)


def test_memory_layout_changes_nothing() -> None:
    torch.manual_seed(3)
    net, x = Branches().eval(), torch.randn(16, 3, 8, 8)
    plans = []
    for layout, frozen in itertools.product((torch.contiguous_format, torch.channels_last), (False, True)):
        laid = net.to(memory_format=layout).requires_grad_(not frozen)
        plans.append(surgeon(laid, x[:2], keep=Budget(macs=0.6), batches=[x]))
    assert plans.count(plans[0]) == len(plans)


def test_an_output_that_nothing_hangs_on_does_not_count() -> None:
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    with torch.no_grad():  # what the first half says is said loudly, but to outputs that the answer does not hear
        net[0].weight.copy_(torch.eye(6))
        net[1].weight[:3, :3], net[1].weight[3:, 3:] = 0, 0
        net[1].weight[3:, :3], net[2].weight[:, 3:] = 100, 0
    plan = surgeon(net, torch.randn(2, 6), keep=Budget(macs=0.6), batches=[torch.randn(256, 6)], only=["0"])
    assert plan.keep["0 out"] == (3, 4, 5)


class Attention(nn.Module):
    """Queries and keys that only attention reads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)).mean(1)


def test_axes_that_nothing_linear_reads_are_left_whole(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(5)
    net, x = Attention(), torch.randn(8, 5, 6)
    with caplog.at_level(logging.INFO, logger="slivo"):
        plan = surgeon(net, x[:2], keep=Budget(params=0.8), batches=[x])
    assert "left whole" in caplog.text
    assert set(plan.cuts) == {"v out"}
    with pytest.raises(SlivoError, match="reads any of the axes"):
        surgeon(net, x[:2], keep=Budget(params=0.8), batches=[x], only=["q"])


def test_bad_input_is_told() -> None:
    net, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), torch.randn(8, 4)
    with pytest.raises(SlivoError, match="there are no batches"):
        surgeon(net, x, keep=Budget(macs=0.5), batches=[])
    with pytest.raises(SlivoError, match="give a list of batches"):
        surgeon(net, x, keep=Budget(macs=0.5), batches=x)
    with pytest.raises(TargetError, match="no Budget"):
        surgeon(net, x, keep=0.5, batches=[x])  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="surgeon plans for"):
        surgeon(net, x, keep=Budget(latency=0.5), batches=[x])
    with pytest.raises(SlivoError, match="gives out no logits"):
        surgeon(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3), nn.Flatten(0)), x, keep=Budget(macs=0.5), batches=[x])


def test_dead_inputs_do_no_harm() -> None:
    net, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(8, 4)
    with torch.no_grad():
        net[0].weight.zero_(), net[0].bias.fill_(-1)
    plan = surgeon(net, x, keep=Budget(macs=0.5), batches=[x])
    assert len(plan.keep["0 out"]) == 3
