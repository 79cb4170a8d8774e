"""A cut is settled without a trace on what is known, and modules say the sizes that they have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, build

import slivo
from slivo.graph import settle
from slivo.graph.program import plan_rewrites
from slivo.prune import plan


class ChannelShuffle(nn.Module):
    """Sizes as numbers in the code: neither the module nor its parent can be cut as source."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1, groups=4)
        self.last = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x))
        batch, channels, height, width = x.shape
        x = x.view(batch, 4, channels // 4, height, width).transpose(1, 2)
        out: Tensor = self.last(x.reshape(batch, channels, height, width))
        return out


def test_a_shuffle_by_a_number_in_the_code_runs_as_its_graph() -> None:
    model, x = ChannelShuffle().eval(), torch.randn(2, 3, 4, 4)
    small = slivo.prune(model, x, keep=slivo.Budget(macs=0.5), scope="uniform")
    assert small(x).shape == (2, 5, 4, 4)
    assert small(x[:1]).shape == (1, 5, 4, 4)


class ReadEmbedding(nn.Module):
    """Reads an embedding's weight instead of looking it up."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.first, self.last = nn.Embedding(6, 8), nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x) + self.positions.weight)
        return out


def test_an_embedding_that_is_read_says_its_new_size() -> None:
    small = slivo.prune(ReadEmbedding(), torch.randn(2, 6, 5), keep=slivo.Budget(macs=0.5))
    assert small.positions.embedding_dim == small.positions.weight.shape[1] < 8


@pytest.mark.parametrize("name", ["ChannelShuffle", *sorted(ZOO)])
def test_settling_a_cut_changes_nothing_that_is_known(name: str) -> None:
    model, x = (ChannelShuffle().eval(), torch.randn(2, 3, 4, 4)) if name == "ChannelShuffle" else build(name)
    graph = slivo.trace(model, x)
    kept = plan(model, x, keep=slivo.Budget(params=0.7), graph=graph).fit(graph)
    before = plan_rewrites(graph, kept), graph.count({axis: len(each) for axis, each in kept.items()})
    settle(model, graph, x, kept)
    after = plan_rewrites(graph, kept), graph.count({axis: len(each) for axis, each in kept.items()})
    assert after == before
