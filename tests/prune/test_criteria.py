"""Criteria against hand-worked cases and slow references in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import slivo
from slivo.errors import RecipeError, SlivoError
from slivo.measure.readers import Reader
from slivo.prune import criteria, importance

W = torch.tensor([[1.0, -2.0], [0.5, 0.5], [-3.0, 0.0]])
G = torch.tensor([[2.0, 1.0], [-1.0, 4.0], [0.0, 5.0]])

# What criteria are given; three positions each.
GIVEN = {
    "weights": W,
    "grads": G,
    "drawn": G,
    "inputs": torch.tensor([[4.0, 1.0], [0.0, 9.0], [1.0, 0.0]]),
    "levels": torch.tensor([[4.0, 1.0], [0.0, 9.0], [1.0, 0.0]]),
    # Activations that have nothing to do with one another, whose squares have the mean 4.
    "readers": (Reader(W[:, None, :], torch.diag(torch.tensor([1.0, 3.0, 8.0])), torch.arange(3)[:, None]),),
    "units": torch.tensor([[0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]),
    "labels": torch.tensor([5, 5, 7, 7]),
    "slopes": (G[:, None, :],),
    "moved": -W * G,
    "whole": torch.tensor([[0.5, 0.5], [1.0, 0.0]]).clamp(min=1e-30).log(),
    "without": [
        torch.tensor(chances).clamp(min=1e-30).log()
        for chances in ([[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [0.5, 0.5]], [[0.25, 0.75], [0.25, 0.75]])
    ],
}

# A criterion without a row here fails the test below.
BY_HAND = {
    "l1": [3.0, 1.0, 3.0],
    "l2": [5.0, 0.5, 9.0],
    "fpgm": [
        np.sqrt(0.25 + 6.25) + np.sqrt(16 + 4),
        np.sqrt(0.25 + 6.25) + np.sqrt(12.25 + 0.25),
        np.sqrt(16 + 4) + np.sqrt(12.25 + 0.25),
    ],
    "taylor": [0.0, 2.25, 0.0],
    "snip": [4.0, 2.5, 0.0],
    "gradient": [5.0, 17.0, 25.0],
    "fisher": [4.0, 0.5 * (0.25 + 4.0), 0.0],
    "random": None,
    "bn_scale": [1.5, 0.5, 1.5],
    "lamp": [5 / 14, 0.5 / 14.5, 1.0],
    "wanda": [4.0, 1.5, 3.0],
    "activation": [1.5, 1.5, 0.5],
    "activation_mean": [1.5, 1.5, 0.5],
    "obs": [1.04 * 5, 3.04 * 0.5, 8.04 * 9],
    "information": [np.log(2), 0.0, np.log(2) / 4 + np.log(2 / 3) / 4 + np.log(4 / 3) / 2],
    "kl": [0.0, 1.125, 0.0],
    "entropy": [1.0, 1.0, 1.0],  # each in a bin of its own; worked out further in the doctest
    # Nothing to do with one another: each for itself, and the errors add up.
    "thinet": [5.0 + 1.5, 1.5, 5.0 + 1.5 + 72.0],
    "reconstruction": [1.04 * 5 + 3.04 * 0.5, 3.04 * 0.5, 1.04 * 5 + 3.04 * 0.5 + 8.04 * 9],
    "gain": [5 / 1.04, 17 / 3.04, 25 / 8.04],
    "inverse_covariance": [5 / 1.04, 17 / 3.04, 25 / 8.04],
    "masking": [0.0, np.log(2) / 2, (np.log(4 / 3) / 2 + np.log(4)) / 2],
    "movement": [0.0, -1.5, 0.0],
}


@pytest.mark.parametrize("name", criteria.names())
def test_by_hand(name):
    found = criteria.resolve(name)
    score = found.score(*(GIVEN[each] for each in found.given))
    assert score.shape == (3,)
    if BY_HAND[name] is not None:
        assert np.allclose(score.numpy(), BY_HAND[name], atol=1e-7)


@pytest.mark.parametrize("name", criteria.names())
def test_names_and_documentation(name):
    found = criteria.resolve(name)
    assert found.name == name
    assert found.summary.endswith(".")
    assert "Returns:" in (found.score.__doc__ or "")


def test_unknown_names_list_those_that_there_are():
    with pytest.raises(RecipeError, match=r"'magnitude'; there are .*l1, l2"):
        criteria.resolve("magnitude")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def loss(model, batch):
    return model(batch).square().mean()


def normed() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh()),
        *(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh()),
        nn.Linear(4, 2),
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.double()


def supervised(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("name", criteria.names())
def test_scores_follow_their_positions(name):
    """Permuting an axis permutes its scores: nothing depends on the order."""
    if name == "random":
        torch.manual_seed(0)
        assert len(set(criteria.random.score(W).tolist())) == 3
        return
    model, x = normed(), torch.randn(6, 3).double()
    batch = (x, torch.arange(6) % 2)
    order = torch.tensor([3, 1, 4, 0, 2])
    other = normed()
    with torch.no_grad():
        for tensor, value in (*model[0].named_parameters("0"), *model[1].named_parameters("1")):
            other.get_parameter(tensor).copy_(value[order])
        other[3].weight.copy_(model[3].weight[:, order])
    found = []
    for each in (model, other):
        graph = slivo.trace(each, x)
        scores = importance(each, graph, graph.prunable, criteria.resolve(name), batches=[batch], loss=supervised)
        found.append(scores["0 out"])
    assert np.allclose(found[0][order.numpy()], found[1])


def test_taylor_is_activation_times_gradient():
    """(Σ over readers of w·g)² is the squared sum over the batch of activation · gradient, by an independent route."""
    model, batch = net(), torch.randn(6, 3).double()
    graph = slivo.trace(model, batch)
    found = importance(model, graph, graph.prunable, criteria.taylor, batches=[batch], loss=loss)["0 out"]
    activation = model[1](model[0](batch)).detach().requires_grad_(True)
    model[4](model[3](model[2](activation))).square().mean().backward()
    assert np.allclose(found, (activation * activation.grad).sum(0).square().detach().numpy())


def test_gradient_scores_are_averaged_over_batches():
    model, batches = net(), [torch.randn(6, 3).double() for _ in range(3)]
    graph = slivo.trace(model, batches[0])

    def score(given):
        return importance(model, graph, graph.prunable, criteria.fisher, batches=given, loss=loss)["2 out"]

    assert np.allclose(score(batches), np.mean([score([batch]) for batch in batches], axis=0))


def test_relative_scores_have_mean_one():
    model = net()
    graph = slivo.trace(model, torch.randn(2, 3).double())
    for scores in importance(model, graph, graph.prunable, criteria.l2).values():
        assert np.isclose(scores.mean(), 1)


def test_the_model_and_its_gradients_are_left_alone():
    model, batch = net(), torch.randn(6, 3).double()
    model[0].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = slivo.trace(model, batch)
    importance(model, graph, graph.prunable, criteria.taylor, batches=[batch], loss=loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model[0].weight.requires_grad
    assert model.training


def test_what_is_missing_is_named():
    model, x = net(), torch.randn(2, 3).double()
    budget = slivo.Budget(macs=0.5)
    with pytest.raises(SlivoError, match="'taylor' needs gradients: give batches=… and loss=…"):
        slivo.prune(model, x, keep=budget, criterion="taylor")
    with pytest.raises(SlivoError, match="no batches; give at least one"):
        slivo.prune(model, x, keep=budget, criterion="taylor", batches=[], loss=loss)


def test_weights_that_are_not_numbers_are_told():
    model, x = net(), torch.randn(2, 3).double()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(SlivoError, match=r"axis '0 out'.*NaN or infinite"):
        slivo.prune(model, x, keep=slivo.Budget(macs=0.5))
