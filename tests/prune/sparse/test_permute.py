"""Permutations for N:M: the network computes what it did, and no weight of the pattern keeps less."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from oracles.permutation import error, outputs
from torch import nn
from zoo import build

import slivo
from slivo import edits
from slivo.edits import Cut
from slivo.edits.follow import follow
from slivo.edits.mask import Pattern
from slivo.errors import RecipeError, SlivoError
from slivo.prune import permute, sparsify
from slivo.prune.sparse.masks import masked
from slivo.prune.sparse.permute import retained, search

NETWORKS = ["Mlp", "PlainCnn", "ResNet", "Mobile", "Dense", "Transformer", "TorchEncoder", "UNet", "Windows", "Shuffle"]


def fitting(model, pattern="2:4"):
    """Names of the weights whose inputs divide into groups."""
    parsed, names = Pattern.parse(pattern), []
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and weight.shape[1] % parsed.tile[-1] == 0:
            names.append(f"{path}.weight")
    return names


def kept(model, names):
    """Sum of absolute values that the pattern leaves."""
    return sum(float(each.detach().abs().sum()) for each in masked(sparsify(model, pattern="1:2", only=names)).values())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_stays_and_no_less_is_kept(name):
    model, inputs = build(name)
    names = fitting(model, "1:2")
    found = permute(model, inputs, pattern="1:2", only=names, escapes=1)
    assert error(outputs(found, inputs), outputs(model, inputs)) < 1e-12
    assert kept(found, names) >= kept(model, names) * (1 - 1e-12)
    assert all(isinstance(edit, Cut) for edit in edits.record(found))
    # All entries are still there, whatever their order.
    for (name, one), other in zip(model.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(one.flatten().sort().values, other.flatten().sort().values), name


@pytest.mark.parametrize("name", ["Mlp", "ResNet", "Transformer"])
def test_more_is_kept_where_there_is_something_to_permute(name):
    model, inputs = build(name)
    names = fitting(model, "1:2")
    assert kept(permute(model, inputs, pattern="1:2", only=names), names) > kept(model, names) * 1.005


def test_artifacts_and_optimizers_follow(tmp_path):
    torch.manual_seed(0)

    def make():
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))

    model, x = make(), torch.randn(3, 4)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    model(x).sum().backward()
    adam.step()
    found = permute(model, x, exclude=["0"])
    order = edits.record(found)[0].axes["0 out"]
    assert torch.equal(found[0].weight, model[0].weight[order])
    assert order != sorted(order)
    moments = follow(adam, model, found).state[found[0].weight]["exp_avg"]
    assert torch.equal(moments, adam.state[model[0].weight]["exp_avg"][order])
    sparse = sparsify(found, pattern="2:4").eval()
    again = follow(adam, model, sparse).state[sparse[0].weight]["exp_avg"]
    assert torch.equal(again, moments)  # what an optimizer remembers of zeros, HoldMasks and hold make harmless
    again = slivo.load(slivo.save(sparse, tmp_path / "net"), factory=make)
    assert torch.equal(again(x), sparse(x))
    assert edits.record(again) == edits.record(sparse)


def partitions(items, group):
    if not items:
        yield []
        return
    for rest in itertools.combinations(items[1:], group - 1):
        left = [each for each in items[1:] if each not in rest]
        for others in partitions(left, group):
            yield [items[0], *rest, *others]


@pytest.mark.parametrize(("keep", "group", "columns"), [(2, 4, 8), (1, 2, 8), (1, 3, 9), (2, 3, 9), (3, 4, 8)])
def test_the_search_comes_near_the_best_of_all_orders(keep, group, columns):
    found, best, given = [], [], []
    for seed in range(6):
        scores = torch.rand(5, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

        def left(order, scores=scores):
            return retained(scores[:, np.asarray(order)].reshape(-1, group), keep)

        order = search(scores, keep, group, escapes=16).tolist()
        assert sorted(order) == list(range(columns))
        found.append(left(order))
        best.append(max(map(left, partitions(list(range(columns)), group))))
        given.append(left(range(columns)))
        assert given[-1] <= found[-1] <= best[-1] + 1e-12
    # Of what there is to gain over the given order, nearly all.
    assert sum(found) - sum(given) > 0.9 * (sum(best) - sum(given))


def test_what_is_best_already_stays():
    scores = torch.tensor([[4.0, 1.0, 4.0, 1.0]])
    assert search(scores, 1, 2, escapes=3).tolist() == [0, 1, 2, 3]
    assert search(torch.ones(2, 2), 1, 2, escapes=3).tolist() == [0, 1]


def test_columns_of_flattened_maps_are_left_where_no_order_of_channels_is_one_of_columns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 4)).double()
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    found = permute(model, x, pattern="2:4", only=["2"])
    assert edits.record(found) == ()
    assert found is not model
    # Groups that straddle channels do depend on their order, and the search does not see it.
    assert edits.record(permute(model, x, pattern="4:8", only=["2"])) == ()


def test_bad_options_are_told():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(1, 4)
    with pytest.raises(RecipeError, match="only the groups of N:M patterns depend on an order"):
        permute(model, x, pattern="4x4")
    with pytest.raises(SlivoError, match="escapes is -1"):
        permute(model, x, escapes=-1)
