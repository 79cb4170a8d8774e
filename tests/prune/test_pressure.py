"""What is under pressure becomes zero, and what is zero goes without a trace."""

from __future__ import annotations

import glob
import logging
import math
import re

import pytest
import torch
from oracles.permutation import error, outputs
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from zoo import build

import slivo
from slivo.errors import ShapeError, SlivoError
from slivo.graph import as_args
from slivo.graph.program import tensors_of
from slivo.prune import Plan, cut, plan, pressure
from slivo.prune.groups import held, products, rows_of
from slivo.prune.invariance import counted
from slivo.train import Hook, OptimizerSpec, fit
from train import killed


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()


X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).double()
AIM = X.sum(1, keepdim=True).tanh()


def planned(model, inputs, graph, **options):
    """A plan that cuts only axes of which zeros do not count."""
    return plan(model, inputs, graph=graph, exclude=[glob.escape(name) for name in counted(graph)], **options)


def train(model, inputs, steps, *pressures, lr=0.01, kind=torch.optim.SGD, aim=1.0):
    """A loop of one's own."""
    optimizer = kind(model.parameters(), lr=lr, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    args, kwargs = as_args(inputs)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        sum((each - aim).square().mean() for each in tensors_of(model(*args, **kwargs))).backward()
        for each in pressures:
            each.before_step(model)
        optimizer.step()
        for each in pressures:
            each.after_step(model, lr)
    return model.eval()


NETWORKS = [
    *((name, torch.optim.SGD) for name in ("PlainCnn", "ResNet", "Transformer", "Mobile", "lstm", "ComplexRotary")),
    *((name, torch.optim.Adam) for name in ("PlainCnn", "TorchEncoder")),
]


@pytest.mark.parametrize(("name", "kind"), NETWORKS)
def test_hspg_makes_zeros_whose_cut_changes_nothing(name, kind, caplog):
    """In float64, after training that goes on once all are zero."""
    caplog.set_level(logging.ERROR, "slivo")
    model, inputs = build(name)
    graph = slivo.trace(model, inputs)
    goal = planned(model, inputs, graph, keep=slivo.Budget(params=0.7))
    assert pressure.left(model, graph, goal) > 0.1
    hook = pressure.hspg(graph, goal, steps=6)
    train(model, inputs, 5, hook, kind=kind)
    assert pressure.left(model, graph, goal) > 0
    train(model, inputs, 1, hook, kind=kind)
    assert pressure.left(model, graph, goal) == 0
    before = outputs(model, inputs)
    train(model, inputs, 3, hook, kind=kind)
    assert pressure.left(model, graph, goal) == 0
    after = outputs(model, inputs)
    assert error(after, before) > 1e-6
    less = cut(model, inputs, goal, graph=graph).eval()
    assert error(outputs(less, inputs), after) < 1e-10
    assert slivo.trace(less, inputs).params <= 0.7 * graph.params


def test_hspg_by_hand():
    """One group of the weights (3, 4): pulled to what is to be left, or zeroed where it left the half-space."""
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    graph = slivo.trace(net, torch.randn(2, 1).double())
    goal = Plan({"0 out": 2}, {"0 out": (1,)})
    for moved, expected in (((3.0, 8.0), (0.36, 4.48)), ((1.0, 1.0), (1.0, 1.0)), ((-3.0, 2.0), (0.0, 0.0))):
        hook = pressure.hspg(graph, goal, steps=2)
        with torch.no_grad():
            net[0].weight.copy_(torch.tensor([[3.0], [7.0]]))
            net[1].weight.copy_(torch.tensor([[4.0, 7.0]]))
        hook.before_step(net)
        with torch.no_grad():
            net[0].weight[0], net[1].weight[0, 0] = moved
        hook.after_step(net, lr=0.1)
        # ⟨(3, 8), (3, 4)⟩ / 25 = 1.64, of which a half may stay: 1.14 · (3, 4) less is (-0.42, 3.44).
        pull = max(0.0, (3 * moved[0] + 4 * moved[1]) / 25 - 0.5)
        expected = (moved[0] - 3 * pull, moved[1] - 4 * pull) if moved[0] > 0 else expected
        assert (net[0].weight[0].item(), net[1].weight[0, 0].item()) == pytest.approx(expected)
        assert net[0].weight[1] == 7
        assert net[1].weight[0, 1] == 7


def test_a_larger_epsilon_zeroes_earlier():
    model, graph = small(), slivo.trace(small(), X)
    goal = plan(model, X, keep=slivo.Budget(params=0.5), graph=graph)
    train(model, X, 3, pressure.hspg(graph, goal, steps=6, epsilon=0.9))
    assert pressure.left(model, graph, goal) == 0


def test_greg_shrinks_what_goes_and_what_stays_takes_over():
    model, graph = small(), slivo.trace(small(), X)
    goal = plan(model, X, keep=slivo.Budget(params=0.5), graph=graph)
    train(model, X, 200, pressure.greg(graph, goal, ceiling=20.0, steps=100), lr=0.05, aim=AIM)
    assert 0 < pressure.left(model, graph, goal) < 1e-3
    assert model(X).sub(AIM).square().mean() < 0.05
    assert error(outputs(cut(model, X, goal).eval(), X), outputs(model, X)) < 1e-3


def test_greg_grows_to_its_ceiling():
    model, graph = small(), slivo.trace(small(), X)
    hook = pressure.greg(graph, Plan({"0 out": 6}, {"0 out": (1, 2, 3, 4, 5)}), ceiling=2.0, steps=4)
    weight = model[0].weight.detach().clone()
    for number in range(1, 7):
        hook.after_step(model, lr=0.1)
        weight[0] /= 1 + 0.1 * 2 * min(1, number / 4)
        assert torch.allclose(model[0].weight, weight)


def lasso(rows, tensors, values, threshold):
    """What the group lasso's proximal step minimizes, for each position."""
    far = {name: tensors[name] - values[name] for name in tensors}
    return products(rows, far, far) / 2 + threshold * products(rows, tensors, tensors).sqrt()


def test_the_step_of_the_group_lasso_is_the_best_there_is():
    model, graph = small(), slivo.trace(small(), X)
    rows = rows_of(graph, graph["0 out"])
    values = {name: value.clone() for name, value in held(model, [rows]).items()}
    count = 3 + 1 + 2 + 2  # weights, bias, scale and shift of the norm, what reads it
    assert sum(each.numbers for each in rows) == count
    strength = 0.9 / math.sqrt(count)
    pressure.group_lasso(graph, 10 * strength).after_step(model, lr=0.1)
    found = held(model, [rows])
    best = lasso(rows, found, values, 0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        other = {
            name: value + 0.01 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
            for name, value in found.items()
        }
        assert (lasso(rows, other, values, 0.9) > best).all()


def test_the_group_lasso_empties_positions_whose_cut_changes_nothing():
    model, graph = small(), slivo.trace(small(), X)
    train(model, X, 300, pressure.group_lasso(graph, 0.05), lr=0.05, aim=AIM)
    rows = rows_of(graph, graph["0 out"])
    alive = products(rows, held(model, [rows]), held(model, [rows])) > 0
    assert 0 < alive.sum() < 6
    kept = tuple(torch.nonzero(alive).flatten().tolist())
    less = cut(model, X, Plan({"0 out": 6}, {"0 out": kept})).eval()
    assert error(outputs(less, X), outputs(model, X)) < 1e-10
    assert model(X).sub(AIM).square().mean() < 0.1


def test_single_weights_and_scales():
    model = small()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for hook, changed in (
        (pressure.l1(2.0), {"0.weight": lambda w: w.sign() * (w.abs() - 0.2).clamp(min=0)}),
        (pressure.l2(2.0), {"0.weight": lambda w: w / 1.2}),
        (pressure.slimming(2.0), {"1.weight": lambda w: w - 0.2}),
    ):
        model.load_state_dict(start)
        model[3].weight.requires_grad_(False)
        hook.after_step(model, lr=0.1)
        for name, value in model.state_dict().items():
            expected = changed.get(name, lambda w: w)(start[name])
            if not (name == "3.weight" and "1.weight" not in changed):
                assert torch.allclose(value, expected), name
    assert torch.equal(model[3].weight, start["3.weight"])


def test_slimming_empties_scales():
    model = small()
    train(model, X, 200, pressure.slimming(1.0), lr=0.05, aim=AIM)
    assert (model[1].weight == 0).any()
    assert model(X).sub(AIM).square().mean() < 0.1


MAKE = {
    "l1": lambda graph, goal: pressure.l1(0.01),
    "group_lasso": lambda graph, goal: pressure.group_lasso(graph, 0.01),
    "greg": lambda graph, goal: pressure.greg(graph, goal),
    "hspg": lambda graph, goal: pressure.hspg(graph, goal),
    "hspg in steps": lambda graph, goal: pressure.hspg(graph, goal, steps=5),
}


class BrokenOffError(Exception):
    pass


class Stops(Hook):
    def __init__(self):
        self.armed = False

    def on_gradients(self, state):
        if self.armed and state.epoch == 3 and state.step % 3 == 1:
            raise BrokenOffError


@pytest.mark.parametrize("name", MAKE)
def test_resumed_is_bit_identical(tmp_path, name):
    """Only what the checkpoint holds goes on: the hooks are made anew."""
    inputs = torch.randn(2, 1, 6, 6)
    graph = slivo.trace(killed.model(), inputs)
    goal = plan(killed.model(), inputs, keep=slivo.Budget(params=0.6), graph=graph)
    whole, resumed, stops = killed.model(), killed.model(), Stops()
    killed.train(whole, None, hooks=[MAKE[name](graph, goal), Stops()])
    stops.armed = True
    with pytest.raises(BrokenOffError):
        killed.train(resumed, tmp_path / "state", hooks=[MAKE[name](graph, goal), stops])
    resumed, plain = killed.model(), killed.model()
    killed.train(resumed, tmp_path / "state", hooks=[MAKE[name](graph, goal), Stops()])
    killed.train(plain, None, hooks=[Hook(), Stops()])
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(whole.parameters(), plain.parameters(), strict=True))


def test_fit_knows_how_long_a_share_is():
    model, graph = small().float(), slivo.trace(small(), X)
    goal = plan(model, X.float(), keep=slivo.Budget(params=0.5), graph=graph)
    seen = []

    class Watch(Hook):
        def on_step_end(self, state):
            seen.append(pressure.left(state.model, graph, goal))

    fit(
        model,
        DataLoader(TensorDataset(X.float()), batch_size=4),
        lambda net, batch: {"far": (net(batch[0]) - 1).square().mean()},
        epochs=5,
        optimizer=OptimizerSpec(lr=0.05),
        hooks=[pressure.hspg(graph, goal, steps=0.5), Watch()],
    )
    assert [each == 0 for each in seen] == [number >= 5 for number in range(1, 11)]
    assert error(outputs(cut(model, X.float(), goal).eval(), X.float()), outputs(model, X.float())) < 1e-5


def test_bad_input_is_told():
    model, graph = small(), slivo.trace(small(), X)
    goal = plan(model, X, keep=slivo.Budget(params=0.5), graph=graph)
    for told, make in (
        ("strength is 0; a positive number", lambda: pressure.l1(0)),
        ("strength is nan", lambda: pressure.l2(math.nan)),
        ("strength is True", lambda: pressure.slimming(True)),
        ("strength is 'much'", lambda: pressure.group_lasso(graph, "much")),
        ("ceiling is -1", lambda: pressure.greg(graph, goal, ceiling=-1)),
        ("steps is 1.5; a share of", lambda: pressure.greg(graph, goal, steps=1.5)),
        ("steps is -1; a share of the training", lambda: pressure.greg(graph, goal, steps=-1)),
        ("steps is 'all'", lambda: pressure.greg(graph, goal, steps="all")),
        ("epsilon is 1.0; from 0", lambda: pressure.hspg(graph, goal, epsilon=1.0)),
        ("the plan is of type dict", lambda: pressure.hspg(graph, {})),
        ("no batch norm", lambda: pressure.slimming(1.0).after_step(nn.Linear(2, 2), 0.1)),
        ("steps is 0.5, a share .* give a number", lambda: pressure.greg(graph, goal).after_step(model, 0.1)),
    ):
        with pytest.raises(SlivoError, match=told):
            make()
    for told, other in (("lacks '0.weight'", nn.Linear(2, 2)), ("not 6, in '0.weight'", cut(model, X, goal))):
        with pytest.raises(ShapeError, match=re.escape(told)):
            pressure.group_lasso(graph, 1.0).after_step(other, 0.1)


def test_axes_whose_zeros_count_are_refused_by_name():
    model, inputs = build("Transformer")
    graph = slivo.trace(model, inputs)
    everything = plan(model, inputs, keep=slivo.Budget(params=0.5), graph=graph, scope="uniform")
    with pytest.raises(SlivoError, match=r"'embed \+2 out' count in layer_norm in norm1, .* exclude="):
        pressure.hspg(graph, everything)
