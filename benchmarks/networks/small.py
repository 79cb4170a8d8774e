"""Small networks of kinds that no zoo of images or texts has: recurrent, generative, recommending."""

# The forward methods of networks need no docstring each.
# ruff: noqa: D102

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INSTALL = "needs PyTorch alone"


def networks() -> dict[str, Any]:
    return {
        "lstm-lm": lambda: (LanguageModel(nn.LSTM(32, 48, num_layers=2, batch_first=True), 48), tokens()),
        "lstm-lm-tied": lambda: (
            LanguageModel(nn.LSTM(32, 32, num_layers=2, batch_first=True), 32, tied=True), tokens(),
        ),
        "gru-lm": lambda: (LanguageModel(nn.GRU(32, 48, num_layers=2, batch_first=True), 48), tokens()),
        "gru-lm-bidirectional": lambda: (
            LanguageModel(nn.GRU(32, 24, batch_first=True, bidirectional=True), 48), tokens(),
        ),
        "rnn-lm": lambda: (LanguageModel(nn.RNN(32, 48, batch_first=True), 48), tokens()),
        "transformer-encoder": lambda: (Encoder(), tokens()),
        "transformer-encoder-decoder": lambda: (EncoderDecoder(), (torch.randn(2, 9, 12), torch.randn(2, 7, 12))),
        "unet": lambda: (UNet(), torch.randn(2, 3, 32, 32)),
        "dcgan-generator": lambda: (generator(), torch.randn(2, 64, 1, 1)),
        "dcgan-discriminator": lambda: (discriminator(), torch.randn(2, 3, 64, 64)),
        "ncf": lambda: (CollaborativeFilter(), (torch.randint(50, (4,)), torch.randint(70, (4,)))),
        "dlrm": lambda: (Dlrm(), (torch.randn(4, 13), torch.randint(20, (4, 5)))),
    }  # fmt: skip


def tokens() -> Tensor:
    return torch.randint(60, (2, 9))


class LanguageModel(nn.Module):
    """Embedding, recurrent layer and a head, which may be tied with the embedding."""

    def __init__(self, layer: nn.RNNBase, width: int, tied: bool = False):
        super().__init__()
        self.embed, self.layer, self.drop = nn.Embedding(60, 32), layer, nn.Dropout(0.1)
        self.head = nn.Linear(width, 60)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.drop(self.layer(self.embed(words))[0]))


class Encoder(nn.Module):
    """`nn.TransformerEncoder` as a classifier of texts."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(60, 32), nn.Parameter(torch.randn(9, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(32), enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(words) + self.position).mean(1))


class EncoderDecoder(nn.Module):
    """`nn.Transformer` between two linear layers."""

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Linear(12, 32), nn.Linear(12, 32)
        self.layers = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
        self.head = nn.Linear(32, 12)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.layers(self.source(source), self.target(target)))


class UNet(nn.Module):
    """Three levels, each concatenated to what comes up from below."""

    def __init__(self, widths: tuple[int, ...] = (16, 24, 32)):
        super().__init__()
        before = (3, *widths[:-1])
        self.down = nn.ModuleList(double_conv(a, b) for a, b in zip(before, widths, strict=True))
        pairs = list(pairwise(widths))[::-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairs)
        self.join = nn.ModuleList(double_conv(2 * a, a) for a, _ in pairs)
        self.head = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for number, block in enumerate(self.down):
            x = block(x if number == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, skips[-2::-1], strict=True):
            x = join(torch.cat([skip, up(x)], 1))
        return self.head(x)


def double_conv(before: int, after: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True),
        nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True),
    )  # fmt: skip


def generator() -> nn.Module:
    widths = (64, 64, 48, 32, 16)
    layers: list[nn.Module] = []
    for number, (a, b) in enumerate(pairwise(widths)):
        start = (1, 0) if number == 0 else (2, 1)
        layers += [nn.ConvTranspose2d(a, b, 4, *start, bias=False), nn.BatchNorm2d(b), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False), nn.Tanh())


def discriminator() -> nn.Module:
    widths = (3, 16, 32, 48, 64)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers, nn.Conv2d(64, 1, 4, bias=False), nn.Sigmoid(), nn.Flatten(0))


class CollaborativeFilter(nn.Module):
    """Neural collaborative filtering: a product of embeddings beside a perceptron on others (arXiv:1708.05031)."""

    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(50, 16), nn.Embedding(70, 16)
        self.deep_users, self.deep_items = nn.Embedding(50, 24), nn.Embedding(70, 24)
        self.mlp = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.head = nn.Linear(32, 1)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        product = self.users(users) * self.items(items)
        deep = self.mlp(torch.cat([self.deep_users(users), self.deep_items(items)], -1))
        return torch.sigmoid(self.head(torch.cat([product, deep], -1))).squeeze(-1)


class Dlrm(nn.Module):
    """Perceptrons below and above, and the products of all pairs of features between them (arXiv:1906.00091)."""

    def __init__(self, tables: int = 5, width: int = 16):
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(20, width, mode="sum") for _ in range(tables))
        self.below = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, width), nn.ReLU())
        pairs = (tables + 1) * tables // 2
        self.above = nn.Sequential(nn.Linear(width + pairs, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.below(dense)
        rows = torch.stack([x, *(table(sparse[:, i : i + 1]) for i, table in enumerate(self.tables))], 1)
        left, right = torch.tril_indices(rows.shape[1], rows.shape[1], offset=-1)
        products = (rows @ rows.transpose(1, 2))[:, left, right]
        return self.above(torch.cat([x, products], 1)).squeeze(-1)
