"""A smaller vocabulary gives the logits of the tokens that it keeps, by their new ids."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from zoo import build

import slivo
from slivo.errors import ShapeError, SlivoError
from slivo.prune import keep_tokens


class Model(nn.Module):
    """Tokens, positions and a head, which may share the tokens' weight."""

    def __init__(self, *, tied: bool, padding: int | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, 8, padding_idx=padding)
        self.positions = nn.Embedding(64, 8)
        self.head = nn.Linear(8, 40)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = self.head((self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))) * weight[..., None])
        return out.view(-1, self.head.out_features)


KEPT = [0, 3, 17, 39]
IDS = torch.tensor([[17, 3, 5, 39], [0, 1, 2, 3]])
WEIGHT = torch.tensor([[1, 2, 3, 4], [1, 1, 0, 1]])  # integers that are no tokens


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_kept_tokens(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model(tied=tied).double().eval()
    small = keep_tokens(model, (IDS, WEIGHT), [39, 0, 17, 3])
    old, new = torch.tensor([KEPT]), torch.tensor([[0, 1, 2, 3]])
    weight = torch.tensor([[1, 2, 3, 4]])
    # Matrix products of other sizes are summed in another order.
    torch.testing.assert_close(small(new, weight), model(old, weight)[:, KEPT], rtol=1e-12, atol=1e-12)
    assert small.tokens.num_embeddings == 4
    assert small.positions.num_embeddings == 64
    assert small.head.out_features == 4
    assert (small.head.weight is small.tokens.weight) == tied
    again = slivo.load(slivo.save(small, tmp_path / "net"), factory=lambda: Model(tied=tied).double())
    assert torch.equal(again(new, weight), small(new, weight))
    thin = slivo.prune(small, (new, weight), keep=slivo.Budget(params=0.6))
    assert thin(new, weight).shape == (4, 4)


def test_an_embedding_without_a_head_is_a_vocabulary_too() -> None:
    model = nn.Sequential(nn.Embedding(30, 4), nn.Flatten(), nn.Linear(12, 2))
    small = keep_tokens(model, torch.tensor([[1, 2, 29]]), [2, 29, 1])
    assert torch.equal(small(torch.tensor([[0, 1, 2]])), model(torch.tensor([[1, 2, 29]])))


def test_a_recurrent_language_model() -> None:
    model, ids = build("LanguageModel")
    small = keep_tokens(model, ids, [1, 4, 9])
    kept = torch.tensor([[1, 4, 9, 4]])
    expected = model(kept)[..., [1, 4, 9]]
    assert torch.allclose(small(torch.tensor([[0, 1, 2, 1]])), expected, rtol=0, atol=1e-15)


def test_padding_is_renumbered_and_cannot_go() -> None:
    model = Model(tied=False, padding=17)
    small = keep_tokens(model, (IDS, WEIGHT), KEPT)
    assert small.tokens.padding_idx == 2
    with pytest.raises(SlivoError, match="token 17 is the padding of tokens; it must be among those to keep"):
        keep_tokens(model, (IDS, WEIGHT), [0, 1])


def test_what_is_no_vocabulary_is_refused() -> None:
    with pytest.raises(ShapeError, match="has no vocabulary"):
        keep_tokens(nn.Linear(3, 3), torch.zeros(2, 3), [0, 1])
    for tokens in ([0, 40], [1, 1], []):
        with pytest.raises(ShapeError, match="has positions 0 to 39; keep at least 1 of them"):
            keep_tokens(Model(tied=True), (IDS, WEIGHT), tokens)


def test_axes_can_be_named() -> None:
    model = Model(tied=False)
    small = keep_tokens(model, (IDS, WEIGHT), list(range(4)), axes=["positions.weight[0]"])
    assert small.positions.num_embeddings == 4
    assert torch.equal(small(IDS, WEIGHT), model(IDS, WEIGHT))
