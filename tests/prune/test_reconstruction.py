"""Criteria of reconstruction, of masking and of movement, against slow references in float64 by other routes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import slivo
from slivo.errors import ShapeError, SlivoError
from slivo.prune import Plan, criteria, cut, importance
from slivo.prune.criteria import criterion
from slivo.prune.effects import Movement
from slivo.train import OptimizerSpec, fit
from train import killed


class Images(nn.Module):
    """One axis that is read by two layers, one of them a convolution of nine columns a position."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.other = nn.Conv2d(2, 5, 3), nn.Conv2d(5, 3, 2), nn.Linear(5, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.one(x).mean((2, 3)), self.other(x.mean((2, 3)))


def images():
    torch.manual_seed(0)
    return Images().double(), torch.randn(4, 2, 6, 6, dtype=torch.float64)


def read(model, x):
    """What each of the two layers reads, columns by position, and its weights, (columns, outputs)."""
    x = F.relu(model.stem(x))
    patches = F.unfold(x, 2).mT.flatten(0, 1)
    return [
        (patches, model.one.weight.flatten(1).T, np.arange(20).reshape(5, 4)),
        (x.mean((2, 3)), model.other.weight.T, np.arange(5).reshape(5, 1)),
    ]


def scores(model, x, which, **options):
    graph = slivo.trace(model, x[:2])
    (axis,) = graph.prunable
    return importance(model, graph, [axis], which, **options)[axis.name]


def greedy(error, count):
    """Errors when positions go one by one, each time the one with which the error is least."""
    gone, found = [], np.zeros(count)
    for _ in range(count):
        errors = {each: error([*gone, each]) for each in range(count) if each not in gone}
        best = min(errors, key=errors.__getitem__)
        gone.append(best)
        found[best] = errors[best]
    return found, gone


def test_reconstruction_is_greedy_least_squares():
    """Each of the fifteen fits solved anew, on the data itself with damping as more data."""
    model, x = images()
    layers = [(read_, weights.detach(), places) for read_, weights, places in read(model, x)]

    def error(gone):
        total = 0.0
        for columns, weights, places in layers:
            level = 0.01 * columns.square().sum(0).mean()
            whole = torch.cat([columns, level.sqrt() * torch.eye(columns.shape[1], dtype=columns.dtype)]).detach()
            stay = [column for position in range(5) if position not in gone for column in places[position]]
            target = whole @ weights
            fitted = whole[:, stay] @ torch.linalg.lstsq(whole[:, stay], target).solution if stay else 0
            total += (target - fitted).square().sum().item()
        return total

    expected, _ = greedy(error, 5)
    found = scores(model, x, criteria.reconstruction, batches=[x[:1], x[1:]])
    assert np.allclose(found, expected / expected.mean(), rtol=1e-8)


def test_thinet_is_greedy_without_a_fit():
    model, x = images()
    layers = [(read_.detach(), weights.detach(), places) for read_, weights, places in read(model, x)]

    def error(gone):
        return sum(
            (columns[:, places[gone].flatten()] @ weights[places[gone].flatten()]).square().sum().item()
            for columns, weights, places in layers
        )

    expected, order = greedy(error, 5)
    found = scores(model, x, criteria.thinet, batches=[x[:1], x[1:]])
    assert np.argsort(found).tolist() == order
    assert all(one < other for one, other in pairwise(found[order]))
    rising = np.maximum.accumulate(expected[order])
    assert np.allclose(found[order], rising / rising.mean(), rtol=1e-8)


def loss(model, batch):
    one, other = model(batch)
    return one.square().mean() + other.tanh().mean()


@criterion(on="read", relative=False)
def _gain(readers, slopes):
    return criteria.gain.score(readers, slopes)


@criterion(on="read", relative=False)
def _inverse_covariance(readers, slopes):
    return criteria.inverse_covariance.score(readers, slopes)


def test_gain_is_what_only_the_position_explains_of_the_gradient():
    """The explained part by projection, with and without each position; the other form, entry by entry."""
    model, x = images()
    value = loss(model, x)
    expected, literal = np.zeros(5), np.zeros(5)
    for columns, weight, places in read(model, x):
        layer = model.one if len(weight) == 20 else model.other
        (slope,) = torch.autograd.grad(value, [layer.weight], retain_graph=True)
        slope = slope.flatten(1).T
        level = 0.01 * columns.square().sum(0).mean()
        whole = torch.cat([columns, level.sqrt() * torch.eye(columns.shape[1], dtype=columns.dtype)]).detach()

        def explained(stay, slope=slope, whole=whole):
            # gᵀX C⁻¹ Xᵀg is the squared norm of the shortest vector whose products with the columns are Xᵀg.
            shortest = torch.linalg.lstsq(whole[:, stay].T, slope[stay], driver="gelsd").solution
            return shortest.square().sum().item()

        every = places.flatten().tolist()
        inverse = torch.linalg.inv(whole.T @ whole)
        for position in range(5):
            stay = [column for column in every if column not in places[position]]
            expected[position] += explained(every) - explained(stay)
            for column in places[position]:
                literal[position] += sum(
                    inverse[column, other].item() * slope[other].square().sum().item() for other in every
                )
    found = scores(model, x, _gain, batches=[x], loss=loss)
    assert np.allclose(found, expected, rtol=1e-8)
    assert np.allclose(scores(model, x, _inverse_covariance, batches=[x], loss=loss), literal, rtol=1e-8)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 4)).double()


X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).double()


def test_masking_is_the_divergence_of_cut_networks():
    """The network with the unit really cut out; with batches of a loss, and without."""
    model = net()
    graph = slivo.trace(model, X)
    before = model(X).detach().softmax(-1)
    expected = []
    for position in range(5):
        kept = tuple(each for each in range(5) if each != position)
        small = cut(model, X, Plan({"0 out": 5}, {"0 out": kept}))
        after = small(X).detach().softmax(-1)
        expected.append((before * (before / after).log()).sum(-1).mean().item())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = importance(model, graph, graph.prunable, criteria.masking, batches=[X])["0 out"]
    assert np.allclose(found, expected, rtol=1e-9)
    halves = importance(
        model, graph, graph.prunable, criteria.masking, batches=[X[:3], X[3:]], loss=lambda m, b: m(b).sum()
    )["0 out"]
    assert np.allclose(halves, expected, rtol=1e-9)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_masking_agrees_with_its_estimate_where_positions_matter_little():
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
    graph = slivo.trace(model, X)
    exact = importance(model, graph, graph.prunable, criteria.masking, batches=[X])["0 out"]
    estimate = importance(model, graph, graph.prunable, criteria.kl, batches=[X] * 100)["0 out"]
    # 800 draws, each with a spread of 140 % at most: 5 %, and four times that.
    assert np.allclose(exact, estimate, rtol=0.2)


def test_movement_is_what_a_training_adds_up():
    """Steps of 0.01 by hand, one for each batch."""
    model, batches = net(), [X[:3], X[3:], X]

    def square(model, batch):
        return model(batch).square().mean()

    graph = slivo.trace(model, X)
    start = model[0].weight.detach().clone()
    found = importance(model, graph, graph.prunable, criteria.movement, batches=batches, loss=square)["0 out"]
    assert torch.equal(model[0].weight, start)
    total, watched = torch.zeros(5, dtype=torch.float64), Movement()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    unpruned = net()
    for batch in batches:
        optimizer.zero_grad()
        square(model, batch).backward()
        watched.add(model)
        total -= (model[2].weight * model[2].weight.grad).sum(0).detach()
        optimizer.step()
    assert np.allclose(found, total)
    same = importance(unpruned, graph, graph.prunable, watched.criterion(unpruned))["0 out"]
    assert np.allclose(same, total)


def test_a_training_is_watched_and_goes_on_after_a_break(tmp_path):
    whole, parts = Movement(), Movement()
    model = killed.model()
    killed.train(model, None, hooks=[whole])

    class BrokenOffError(Exception):
        pass

    def stop(row):
        if row["epoch"] == 2:
            raise BrokenOffError

    with pytest.raises(BrokenOffError):
        killed.train(killed.model(), tmp_path / "state", hooks=[Movement()], on_epoch=stop)
    killed.train(killed.model(), tmp_path / "state", hooks=[parts])
    assert all(torch.equal(total, parts.sums[name]) for name, total in whole.sums.items())
    images = torch.randn(2, 1, 6, 6)
    small = slivo.prune(model, images, keep=slivo.Budget(params=0.7), criterion=whole.criterion(model))
    assert slivo.trace(small, images).params <= 0.7 * slivo.trace(model, images).params
    with pytest.raises(ShapeError, match="was watched"):
        whole.criterion(small)


def test_weights_that_do_not_train_do_not_move():
    model, hook = net().float(), Movement()
    model[2].requires_grad_(False)
    fit(
        model,
        DataLoader(TensorDataset(X.float()), batch_size=3),
        lambda net, batch: {"size": net(batch[0]).square().mean()},
        epochs=1,
        optimizer=OptimizerSpec(lr=0.1),
        hooks=[hook],
    )
    assert not hook.criterion(model).taken["moved"]["2.weight"].any()
    assert hook.criterion(model).taken["moved"]["0.weight"].any()


def test_what_is_missing_is_told():
    model = net()
    for which, told, options in (
        ("movement", "needs gradients: give batches=… and loss=", {"batches": [X]}),
        ("gain", "needs gradients: give batches=… and loss=", {}),
        ("masking", "needs batches: give batches=", {}),
        ("masking", "no batches", {"batches": []}),
        ("movement", "no batches", {"batches": [], "loss": lambda m, b: m(b).sum()}),
        ("gain", "no batches", {"batches": [], "loss": lambda m, b: m(b).sum()}),
        ("gain", "2.weight holds NaN", {"batches": [X * torch.nan], "loss": lambda m, b: m(b).sum()}),
    ):
        with pytest.raises(SlivoError, match=told):
            scores(model, X, criteria.resolve(which), **options)
