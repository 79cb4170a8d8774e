"""Sharing: what becomes of weights, which are chosen, and what a file says of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slivo
from slivo import edits
from slivo.edits import Share
from slivo.edits.share import Shared
from slivo.errors import ArtifactError, RecipeError, ShapeError, SlivoError
from slivo.share import kmeans, share, shared
from slivo.zoo import small_cnn


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def test_weights_are_rounded_to_the_nearest_of_their_values() -> None:
    model = net()
    small = share(model, 5)
    for at in (0, 2):
        centers = kmeans(model[at].weight.flatten(), 5).to(torch.float32)
        near = (model[at].weight[..., None] - centers).abs().argmin(-1)
        assert torch.equal(small[at].weight, centers[near])
        assert torch.equal(small[at].bias, model[at].bias)
    assert shared(small) == {"0.weight": Shared(5), "2.weight": Shared(5)}
    assert shared(model) == {}


@torch.no_grad()
def test_more_values_err_less_and_enough_err_nothing() -> None:
    model, x = net(), torch.randn(32, 8)
    gaps = [float((share(model, count)(x) - model(x)).norm()) for count in (2, 4, 16, 64, 512)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] == 0


def test_zeros_stay_zero_and_have_no_value() -> None:
    sparse = slivo.sparsify(net(), sparsity=0.8, scope="layer")
    small = share(sparse, 4)
    for at in (0, 2):
        assert torch.equal(small[at].weight == 0, sparse[at].weight == 0)
        assert len(small[at].weight[small[at].weight != 0].unique()) == 4
    zero = net()
    nn.init.zeros_(zero[0].weight)
    assert int(share(zero, 4)[0].weight.count_nonzero()) == 0


def test_groups_have_values_of_their_own() -> None:
    model = net()
    small = share(model, 3, groups=4, only="0")
    for part, whole in zip(small[0].weight.chunk(4), model[0].weight.chunk(4), strict=True):
        torch.testing.assert_close(part.unique().double(), kmeans(whole.flatten(), 3))
    assert len(small[0].weight.unique()) == 12
    with pytest.raises(ShapeError, match=r"2.weight has 4 rows, which 8 equal groups cannot part"):
        share(model, 3, groups=8)


def test_powers_of_two() -> None:
    small = share(net(), 6, codebook="powers-of-two")
    for at in (0, 2):
        values = small[at].weight[small[at].weight != 0].abs()
        assert torch.equal(values.log2(), values.log2().round())
        assert len(values.unique()) <= 3
    assert not shared(small)["0.weight"].trained


def test_a_mapping_says_how_many_values_each_weight_has() -> None:
    small = share(net(), {"0": 2, "*": 7})
    assert [len(small[at].weight.unique()) for at in (0, 2)] == [2, 7]
    assert list(shared(share(net(), {"2.weight": 3}))) == ["2.weight"]
    assert list(shared(share(net(), 3, exclude="2"))) == ["0.weight"]


def test_vectors_are_shared_if_asked() -> None:
    small = share(net(), {"*.bias": 3, "*": 5}, vectors=True)
    assert {name: one.values for name, one in shared(small).items()} == {
        "0.weight": 5, "0.bias": 3, "2.weight": 5, "2.bias": 3,
    }  # fmt: skip
    assert len(small[0].bias.unique()) == 3


def test_gradients_weigh() -> None:
    """What rounding costs is little where the gradient is."""
    model = net()
    x, y = torch.randn(64, 8), torch.randint(4, (64,))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    (gradient,) = torch.autograd.grad(loss(model, (x, y)), model[0].weight)
    weighed = share(model, 8, only="0", batches=[(x, y)], loss=loss)
    plain = share(model, 8, only="0")
    costs = [
        float((gradient * (each[0].weight - model[0].weight)).detach().square().sum()) for each in (weighed, plain)
    ]
    assert costs[0] < costs[1]
    centers = kmeans(model[0].weight.flatten(), 8, weights=gradient.square().flatten())
    torch.testing.assert_close(weighed[0].weight.detach().unique(), centers.float())
    model[0].weight.requires_grad_(False)
    unweighed = share(model, 8, only="0", batches=[(x, y)], loss=loss)
    assert torch.equal(unweighed[0].weight, plain[0].weight)


def test_tied_weights_are_shared_once_and_stay_tied() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["table"].weight
    small = share(model, 3)
    assert small["head"].weight is small["table"].weight  # type: ignore[index]
    assert list(shared(small)) == ["table.weight"]


def test_a_file_brings_it_back(tmp_path: Path) -> None:
    model = slivo.sparsify(small_cnn(width=4), sparsity=0.5)
    small = share(model, 4)
    slivo.save(small, tmp_path / "small")
    loaded = slivo.load(tmp_path / "small", factory=lambda: small_cnn(width=4))
    assert edits.record(loaded) == edits.record(small)
    for one, other in zip(loaded.parameters(), small.parameters(), strict=True):
        assert torch.equal(one, other)


def test_after_a_cut_what_is_left_is_shared_still() -> None:
    small = slivo.prune(share(net(), 4), torch.randn(2, 8), keep=slivo.Budget(macs=0.5))
    assert len(small[0].weight.unique()) <= 4  # type: ignore[index,operator]
    assert "0.weight" in shared(small)


def test_what_is_wrong_is_said() -> None:
    model = net()
    for options, message in (
        ({"clusters": 0}, "clusters is 0"),
        ({"init": "best"}, "init is 'best'"),
        ({"codebook": "learned"}, "codebook is 'learned'; there are kmeans, powers-of-two"),
        ({"only": "layer9"}, "'layer9' matches no weight; there are 0.weight, 2.weight"),
        ({"clusters": {"x": 3}}, "'x' matches no weight"),
        ({"exclude": ["0", "2"]}, "nothing is left to share"),
        ({"batches": [torch.randn(2, 8)]}, "weights are weighed by batches and a loss"),
        ({"clusters": 3, "codebook": "powers-of-two"}, "there cannot be 3 powers of two"),
    ):
        with pytest.raises(SlivoError, match=message):
            share(model, **options)  # type: ignore[arg-type]
    nn.init.constant_(model[0].weight, torch.nan)
    with pytest.raises(SlivoError, match=r"0\.weight"):
        share(model)


def test_the_edit_says_what_is_wrong() -> None:
    with pytest.raises(RecipeError, match="at least 1 value"):
        Shared(0)
    with pytest.raises(ArtifactError, match="malformed"):
        Share.from_json({"weights": {"a": [0]}})
    with pytest.raises(ArtifactError, match="malformed"):
        Share.from_json({"weights": {"a": [1, 2, True, 4]}})
    with pytest.raises(ShapeError, match="no parameter 'a'"):
        edits.apply(net(), Share({"a": Shared(2)}))
