"""Thirty-one small networks, each with one thing that tools for structured pruning stumble over."""

# The forward methods of networks need no docstring each.
# ruff: noqa: D101, D102

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

INSTALL = "needs PyTorch alone"

IMAGE = (2, 3, 16, 16)
SEQUENCE = (2, 6, 16)


def networks() -> dict[str, Any]:
    return {
        name: lambda make=make, shape=shape: (make(), shape() if callable(shape) else torch.randn(shape))
        for name, (make, shape) in CASES.items()
    }


class Between(nn.Module):
    """A stem, something in the middle that is looked at, and a head on the mean over space."""

    def __init__(self, middle: Callable[[Tensor], Tensor], after: int, width: int = 16):
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(3, width, 3, padding=1), middle, nn.Linear(after, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.middle(F.relu(self.stem(x)))).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, layer: nn.RNNBase, after: int):
        super().__init__()
        self.embed, self.layer, self.head = nn.Linear(16, 16), layer, nn.Linear(after, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x))[0][:, -1])


class ChunkGlu(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(16, 64), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.head(value * torch.sigmoid(gate))


class C2f(nn.Module):
    """Halves of a convolution's output, of which one goes on through more of them; all are concatenated (YOLOv8)."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(16, 32, 1), nn.Conv2d(64, 24, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(F.relu(block(parts[-1])))
        return self.last(torch.cat(parts, 1))


class Slice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, :8])


class ChannelShuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.Conv2d(16, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = self.conv(x).view(batch, 4, channels // 4, height, width)
        return self.last(x.transpose(1, 2).reshape(batch, channels, height, width))


class HardView(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.Linear(12 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).view(-1, 12 * 8 * 8))


class BareConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 16, 3, 3) / 12)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1)


class BareMatmul(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.weight, self.head = nn.Linear(16, 24), nn.Parameter(torch.randn(24, 32)), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.relu(self.first(x)) @ self.weight))


class BareEinsum(BareMatmul):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(torch.einsum("btc,cd->btd", F.relu(self.first(x)), self.weight)))


class Normed(nn.Module):
    def __init__(self, norm: nn.Module):
        super().__init__()
        self.first, self.norm, self.second, self.head = nn.Linear(16, 24), norm, nn.Linear(24, 24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(x + self.second(F.silu(self.norm(x))))


class RawRmsNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 24, 3, padding=1)
        self.register_buffer("scale", torch.rand(1, 24, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.scale


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(16, 12), nn.Linear(16, 14)
        self.both, self.head = nn.Bilinear(12, 14, 20), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.both(F.relu(self.left(x)), F.relu(self.right(x)))))


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.memory = nn.Linear(16, 32), nn.Linear(12, 24)
        self.attention, self.head = nn.MultiheadAttention(32, 4, kdim=24, vdim=24, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        memory = self.memory(memory)
        return self.head(self.attention(self.query(x), memory, memory)[0])


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(16, 16), nn.Linear(16, 10)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attention(x, x, x)[0])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(words))))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.conv(x)))


class PaddedBlock(nn.Module):
    """The block of the classic CIFAR ResNet: its shortcut subsamples and pads with zeros for the new channels."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.stride, self.more = stride, (after - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        skip = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(skip, (0, 0, 0, 0, self.more, self.more), "constant", 0))


def resnet56() -> nn.Module:
    widths = [16, *[16] * 9, *[32] * 9, *[64] * 9]
    blocks = [PaddedBlock(a, b, 1 if a == b else 2) for a, b in pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def frozen() -> nn.Module:
    return plain().requires_grad_(False)


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip


def flattened() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 12, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 7 * 7, 10))


def volumes() -> nn.Module:
    convs = (nn.Conv3d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 24, 3), nn.ReLU())
    return nn.Sequential(*convs, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(24, 10))


def pixel_shuffle() -> nn.Module:
    return nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(8, 12, 3, padding=1))


def weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Conv2d(16, 24, 3, padding=1)), nn.ReLU(), nn.Conv2d(24, 12, 1))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.Sequential(nn.Linear(16, 16), layer, nn.Linear(16, 10))


def words() -> Tensor:
    return torch.randint(40, (2, 7))


CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "gru": (lambda: Recurrent(nn.GRU(16, 24, batch_first=True), 24), SEQUENCE),
    "rnn": (lambda: Recurrent(nn.RNN(16, 24, batch_first=True), 24), SEQUENCE),
    "lstm": (lambda: Recurrent(nn.LSTM(16, 24, batch_first=True), 24), SEQUENCE),
    "lstm-two-layers": (lambda: Recurrent(nn.LSTM(16, 24, num_layers=2, batch_first=True), 24), SEQUENCE),
    "lstm-bidirectional": (lambda: Recurrent(nn.LSTM(16, 24, batch_first=True, bidirectional=True), 48), SEQUENCE),
    "chunk-glu": (ChunkGlu, SEQUENCE),
    "c2f-chunk-cat": (lambda: Between(C2f(), 24), IMAGE),
    "slice": (lambda: Between(Slice(), 12), IMAGE),
    "channel-shuffle": (lambda: Between(ChannelShuffle(), 12), IMAGE),
    "pixel-shuffle": (lambda: Between(pixel_shuffle(), 12), IMAGE),
    "hard-coded-view": (HardView, IMAGE),
    "flatten-linear": (flattened, IMAGE),
    "parameter-conv2d": (lambda: Between(BareConv(), 24), IMAGE),
    "parameter-matmul": (BareMatmul, SEQUENCE),
    "parameter-einsum": (BareEinsum, SEQUENCE),
    "weight-norm": (lambda: Between(weight_norm(), 12), IMAGE),
    "rms-norm-module": (lambda: Normed(nn.RMSNorm(24)), SEQUENCE),
    "rms-norm-parameter": (lambda: Normed(RawRmsNorm(24)), SEQUENCE),
    "buffer-scale": (lambda: Between(Buffered(), 24), IMAGE),
    "bilinear": (Bilinear, (4, 16)),
    "grouped-transposed-conv": (lambda: Between(nn.ConvTranspose2d(16, 24, 2, stride=2, groups=2), 24), IMAGE),
    "grouped-conv": (lambda: Between(nn.Conv2d(16, 24, 3, padding=1, groups=2), 24), IMAGE),
    "conv3d": (volumes, (2, 3, 6, 8, 8)),
    "cross-attention-kdim": (CrossAttention, lambda: (torch.randn(2, 5, 16), torch.randn(2, 7, 12))),
    "self-attention": (SelfAttention, SEQUENCE),
    "transformer-encoder-layer": (encoder, SEQUENCE),
    "all-frozen": (frozen, IMAGE),
    "tied-embedding": (Tied, words),
    "output-layer": (plain, IMAGE),
    "conv-called-twice": (lambda: Between(Twice(), 16), IMAGE),
    "resnet56-padded-shortcut": (resnet56, (2, 3, 32, 32)),
}
