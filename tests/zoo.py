"""Small networks for the oracles, one row each: what makes it, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {}


def row(*shape: int, inputs: Callable[[], Any] | None = None):
    """Enter a model class into the zoo, with random inputs of a shape or a function that makes them."""

    def enter(make):
        ZOO[make.__name__] = (make, inputs or (lambda: torch.randn(*shape)))
        return make

    return enter


def build(name: str) -> tuple[nn.Module, Any]:
    """Return a model of the zoo with random weights, batch statistics included, and inputs, all in float64."""
    torch.manual_seed(0)
    make, inputs = ZOO[name]
    model = make().double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5)  # biases of zero would hide a wrong slice
    return model, double(inputs())


def double(inputs: Any) -> Any:
    """Return inputs with their floating-point tensors in float64."""
    if isinstance(inputs, Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    if isinstance(inputs, dict):
        return {key: double(value) for key, value in inputs.items()}
    return tuple(map(double, inputs)) if isinstance(inputs, tuple | list) else inputs


@row(3, 6)
class Mlp(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8, bias=False), nn.Tanh(), nn.Linear(8, 3))


@row(2, 3, 8, 8)
class PlainCnn(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, bias=False),
            nn.ReLU6(),
            nn.Flatten(),
            nn.Linear(48, 5),
        )


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.skip = nn.Conv2d(before, after, 1, stride) if before != after else nn.Identity()

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.skip(x))


@row(2, 3, 8, 8)
class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.Sequential(Block(8, 8), Block(8, 12, 2), Block(12, 12))
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


@row(2, 3, 8, 8)
class PaddedShortcut(nn.Module):
    """The classic CIFAR shortcut: subsampling, and zeros for the channels that come new."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv = nn.Conv2d(6, 12, 3, 2, 1)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3)))
        return self.head(x.mean((2, 3)))


@row(2, 3, 8, 8)
class Mobile(nn.Module):
    """Inverted residual with a depthwise convolution and squeeze-and-excitation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.expand = nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm = nn.GroupNorm(4, 16)
        self.squeeze = nn.Conv2d(16, 4, 1)
        self.excite = nn.Conv2d(4, 16, 1)
        self.project = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        y = F.hardswish(self.norm(self.depthwise(F.silu(self.expand(x)))))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.head(F.adaptive_avg_pool2d(x + self.project(y), 1).flatten(1))


@row(2, 3, 8, 8)
class Shuffle(nn.Module):
    """Channel split, grouped convolution, concatenation and channel shuffle."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.last = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        left, right = self.stem(x).chunk(2, dim=1)
        x = torch.cat([left, F.relu(self.grouped(right))], dim=1)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return self.head(F.relu(self.last(x)).mean((2, 3)))


@row(2, 3, 8, 8)
class Dense(nn.Module):
    """Dense concatenation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.norm = nn.BatchNorm2d(18)
        self.head = nn.Linear(18, 3)

    def forward(self, x):
        features = [self.stem(x)]
        for conv in self.convs:
            features.append(F.relu(conv(torch.cat(features, 1))))
        return self.head(self.norm(torch.cat(features, 1)).mean((2, 3)))


@row(2, 3, 8, 8)
class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1 = nn.Conv2d(3, 6, 3, padding=1)
        self.down2 = nn.Conv2d(6, 10, 3, padding=1)
        self.up = nn.ConvTranspose2d(10, 6, 2, stride=2)
        self.out = nn.Conv2d(12, 2, 1)

    def forward(self, x):
        one = F.relu(self.down1(x))
        two = F.relu(self.down2(F.max_pool2d(one, 2)))
        return self.out(torch.cat([one, self.up(two)], 1))


@row(2, 3, 6, 6)
class SuperResolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 12, 3, padding=1)
        self.last = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.last(F.prelu(F.pixel_shuffle(self.second(F.relu(self.first(x))), 2), torch.tensor([0.2]).double()))


@row(2, 4, 12)
class Conv1d(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv1d(4, 8, 3), nn.GELU(), nn.Conv1d(8, 16, 3), nn.GLU(dim=1), nn.AdaptiveAvgPool1d(2), nn.Flatten(),
            nn.Linear(16, 3),
        )  # fmt: skip


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads = heads
        self.head_dim = width // heads

    def forward(self, x):
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.out(x.transpose(1, 2).reshape(batch, length, self.heads * self.head_dim))


@row(inputs=lambda: torch.randint(11, (2, 5)))
class Transformer(nn.Module):
    """Pre-norm blocks, learned positions, embedding tied with the head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.position = nn.Parameter(torch.randn(1, 5, 12))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(12), nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention = Attention(12, 3)
        self.mlp = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.position[:, : tokens.shape[1]]
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm3(x))


@row(2, 5, 8)
class TorchEncoder(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 12), nn.TransformerEncoderLayer(12, 3, 16, batch_first=True), nn.Linear(12, 4))


@row(inputs=lambda: {"users": torch.randint(7, (4,)), "items": torch.randint(9, (4,)), "dense": torch.randn(4, 3)})
class Recommender(nn.Module):
    """Keyword inputs, a dictionary as output, bare parameters and a matrix product."""

    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(7, 6), nn.Embedding(9, 6)
        self.weight = nn.Parameter(torch.randn(3, 6))
        self.bias = nn.Parameter(torch.randn(6))
        self.mlp = nn.Sequential(nn.Linear(18, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, *, users, items, dense):
        u, i, d = self.users(users), self.items(items), dense @ self.weight + self.bias
        return {"score": (u * i * d).sum(-1), "deep": self.mlp(torch.cat([u, i, d], dim=-1)).squeeze(-1)}


@row(2, 3, 4, 4)
class HardCoded(nn.Module):
    """A number in forward that no attribute holds."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6 * 16, 3)

    def forward(self, x):
        return self.head(F.relu(self.conv(x)).view(x.size(0), 6 * 16))


@row(2, 5, 6)
class Token(nn.Module):
    """A parameter that broadcasts over the batch, and heads by a number in forward."""

    def __init__(self):
        super().__init__()
        self.token, self.embed = nn.Parameter(torch.randn(1, 1, 12)), nn.Linear(6, 12)
        self.query, self.head = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], dim=1)
        heads = self.query(x).unflatten(-1, (4, 3)).transpose(1, 2)
        x = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        return self.head(x[:, 0])


@row(2, 6)
class SharedTwice(nn.Module):
    """One module called twice, so what it reads and what it writes are one axis."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(torch.relu(self.again(torch.relu(self.again(torch.relu(self.first(x)))))))


@row(2, 3, 8, 8)
class Auxiliary(nn.Module):
    """A second classifier that runs in training only."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.aux = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.hardswish(self.stem(x), inplace=True)
        out = self.head(x.mean((2, 3)))
        return (out, self.aux(x)) if self.training else out


class Sequence(nn.Module):
    """A recurrent layer between two linears; what it gives out and, if asked for, its last state are read."""

    def __init__(self, layer: nn.RNNBase, width: int, state: bool = False):
        super().__init__()
        self.embed, self.layer, self.state = nn.Linear(4, 5), layer, state
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        out, last = self.layer(self.embed(x))
        last = last[0] if isinstance(last, tuple) else last
        return self.head(out) + (self.head(last[-1])[:, None] if self.state else 0)


@row(2, 6, 4)
def lstm():
    return Sequence(nn.LSTM(5, 8, batch_first=True), 8, state=True)


@row(2, 6, 4)
def stacked_lstm():
    return Sequence(nn.LSTM(5, 8, num_layers=2, batch_first=True, bidirectional=True), 16)


@row(2, 6, 4)
def stateful_lstm():
    return Sequence(nn.LSTM(5, 8, num_layers=2, batch_first=True), 8, state=True)


@row(6, 2, 4)
def projected_lstm():
    return Sequence(nn.LSTM(5, 8, num_layers=2, proj_size=6, bias=False), 6)


@row(6, 2, 4)
def bidirectional_projected_lstm():
    return Sequence(nn.LSTM(5, 12, proj_size=4, bidirectional=True), 8)


@row(6, 2, 4)
def gru():
    return Sequence(nn.GRU(5, 8, num_layers=2), 8)


@row(2, 6, 4)
def bidirectional_gru():
    return Sequence(nn.GRU(5, 8, bidirectional=True, batch_first=True, bias=False), 16)


@row(2, 6, 4)
def rnn():
    return Sequence(nn.RNN(5, 8, nonlinearity="relu", batch_first=True), 8, state=True)


@row(6, 4)
def unbatched_rnn():
    return Sequence(nn.RNN(5, 8, num_layers=2, bidirectional=True), 16)


@row(2, 6, 4)
class Cells(nn.Module):
    """Cells in a loop of Python, each with a state of its own."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(4, 8), nn.GRUCell(8, 6), nn.RNNCell(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        one = two = three = None
        for step in x.unbind(1):
            one = self.lstm(step, one)
            two = self.gru(one[0], two)
            three = self.rnn(two, three)
        return self.head(three)


@row(inputs=lambda: torch.randint(11, (2, 5)))
class LanguageModel(nn.Module):
    """Embedding, dropout and a stacked LSTM whose output is as wide as the embedding, tied with the head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.LSTM(8, 8, num_layers=2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.layers(self.embed(tokens))[0])


@row(2, 4, 10)
class NormalizedWeights(nn.Module):
    """Convolutions whose weights are directions times lengths, or divided by their largest singular value."""

    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 8, 3), dim=2)
        self.second = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 6, 3))
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3))

    def forward(self, x):
        return self.head(F.relu(self.second(F.relu(self.first(x)))).mean(-1))


@row(2, 3, 8, 8)
class Windows(nn.Module):
    """Unfolds, mixes the channels of each window, and folds again."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.head = nn.Conv2d(3, 6, 1), nn.Linear(6 * 4, 5 * 4), nn.Linear(5, 2)

    def forward(self, x):
        x = F.unfold(F.relu(self.stem(x)), 2, stride=2)
        x = F.fold(self.mix(x.mT).mT, (8, 8), 2, stride=2)
        return self.head(F.relu(x).mean((2, 3)))


@row(2, 5, 8)
class ComplexRotary(nn.Module):
    """Rotary positions as products of complex numbers, and grouped queries."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out, self.width = nn.Linear(16, 3), 4

    def forward(self, x):
        batch, length, _ = x.shape
        angles = torch.outer(torch.arange(length), torch.tensor([1.0, 0.1])).to(x.dtype)
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]

        def rotate(y):
            y = torch.view_as_complex(y.reshape(batch, length, -1, 2, 2)) * turn
            return torch.view_as_real(y).flatten(3).transpose(1, 2)

        query, key = rotate(self.query(x)), rotate(self.key(x))
        value = self.value(x).view(batch, length, -1, self.width).transpose(1, 2)
        x = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return self.out(x.transpose(1, 2).flatten(2))


@row(2, 5, 8)
class HalvesRotary(nn.Module):
    """Rotary positions by halves, as in most language models, and one number for the width of all heads."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 32), nn.Linear(8, 16), nn.Linear(8, 16)
        self.out, self.head_dim = nn.Linear(32, 3), 8

    def forward(self, x):
        shape = (*x.shape[:2], -1, self.head_dim)
        query, key, value = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        angles = torch.arange(x.shape[1]).to(x.dtype)[:, None] * 0.3

        def rotate(y):
            half = y.shape[-1] // 2
            turned = torch.cat((-y[..., half:], y[..., :half]), dim=-1)
            return y * angles.cos() + turned * angles.sin()

        x = F.scaled_dot_product_attention(rotate(query), rotate(key), value, enable_gqa=True)
        return self.out(x.transpose(1, 2).flatten(2))


class Affine(nn.Module):
    """A linear that lays its output out by an attribute, as those of the first GPTs."""

    def __init__(self, after: int, before: int):
        super().__init__()
        self.width = after
        self.weight, self.bias = nn.Parameter(torch.randn(before, after)), nn.Parameter(torch.randn(after))

    def forward(self, x):
        shape = (*x.shape[:-1], self.width)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)


class AffineAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = Affine(24, 8), Affine(8, 8)
        self.part, self.heads, self.lengths = 8, 2, (5, 8)

    def forward(self, x):
        parts = [y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.inner(x).split(self.part, -1)]
        x = F.scaled_dot_product_attention(*parts).transpose(1, 2)
        return self.outer(x.reshape(-1, self.lengths[0], self.part))


@row(2, 5, 6)
class AmbiguousAttributes(nn.Module):
    """Attributes whose value occurs several times in the code, for dimensions that are cut differently."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(AffineAttention() for _ in range(2))
        self.embed, self.head, self.sizes = nn.Linear(6, 8), nn.Linear(8, 3), (8, 5)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x.reshape(-1, self.sizes[0])).view(*x.shape[:2], 3)


@row(2, 3, 8, 8)
class SizesReadOff(nn.Module):
    """Code that lays out one tensor by a size that it has read off another: both are cut to one size."""

    def __init__(self):
        super().__init__()
        self.stem, self.reduce = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 2, 2)
        self.head, self.other = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        batch, channels, high, wide = x.shape
        x = x.flatten(2).transpose(1, 2)
        y = self.reduce(x.transpose(1, 2).reshape(batch, channels, high, wide)).reshape(batch, channels, -1)
        return self.head(x.mean(1)) + self.other(y.mean(-1))


class CoupledAttention(nn.Module):
    """Attention whose code takes the width of a head from the width of its input."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads
        self.register_buffer("scale", torch.ones(1))
        self.unused = nn.Parameter(torch.ones(width))

    def forward(self, x, flag: bool = True):
        batch, length, width = x.shape
        x = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        places = torch.arange(length, device=x.device)
        before = places[:, None] >= places + torch.tensor([0])  # a number made here, on no device in particular
        x = F.scaled_dot_product_attention(x[0] * self.scale, x[1], x[2], attn_mask=before).transpose(1, 2)
        return self.out(x.reshape(batch, length, width) if flag else x)


@row(2, 5, 6)
class Coupled(nn.Module):
    """Two blocks of attention that only their own graphs can stand for once they are cut."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList(CoupledAttention(16, 4) for _ in range(2))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(F.relu(x), flag=True)
        return self.head(x)


class KeepingBlock(CoupledAttention):
    """Keeps what it computed in the last run, and uses a module that stands elsewhere."""

    def __init__(self, width: int, heads: int, conv: nn.Conv1d):
        super().__init__(width, heads)
        self.register_buffer("places", torch.zeros(1), persistent=False)
        self.conv, self.gate, self.back = conv, nn.Linear(width, 24), nn.Linear(12, width)

    def forward(self, x, flag: bool = True):
        if len(self.places) != x.shape[1]:
            self.places = torch.arange(x.shape[1], dtype=x.dtype)
        x = x + self.back(F.glu(self.gate(x)).reshape(*x.shape[:2], 12))
        return super().forward(x + 0.1 * self.conv(x.mT).mT * self.places[:, None], flag)


@row(2, 5, 6)
class Keeping(nn.Module):
    """Two blocks that graphs take the place of, with a buffer of another shape once they ran and one module in both."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.conv = nn.Conv1d(16, 16, 3, padding=1, groups=16)
        self.blocks = nn.ModuleList(KeepingBlock(16, 4, self.conv) for _ in range(2))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(F.relu(x), flag=True)
        return self.head(x)


class Split(nn.Module):
    """Half of the channels, by an attribute of twice their number; then two halves by a list of both."""

    def __init__(self):
        super().__init__()
        self.width, self.window, self.sizes = 12, 2, (4, 4)
        self.expand, self.reduce = nn.Conv2d(8, 12, 1), nn.Conv2d(6, 8, 1)

    def forward(self, x):
        left, right = self.expand(x).split(self.width // 2, dim=1)
        return torch.cat(self.reduce(left * right.sigmoid()).split(self.sizes, dim=1)[::-1], dim=1)


@row(2, 3, 8, 8)
class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.split, self.head = nn.Conv2d(3, 8, 1), Split(), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.split(self.stem(x)).mean((2, 3)))


@row(2, 5, 6)
class SelfAttention(nn.Module):
    """PyTorch's own attention, which looks whether its inputs are one tensor."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


@row(2, 5, 6)
class FlatHeads(nn.Module):
    """Four heads, a number in forward, laid out along with the batch, whose size is read off that again."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(6, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = (
            layer(x).view(batch, length, 4, -1).transpose(1, 2).reshape(batch * 4, length, -1)
            for layer in (self.query, self.key, self.value)
        )
        y = (q @ k.mT / 10).softmax(-1) @ v
        y = y.view(y.shape[0] // 4, 4, length, -1).transpose(1, 2)
        return self.out(y.reshape(batch, length, -1))


class SortedExperts(nn.Module):
    """Experts that work on tokens sorted by expert; then each token is put back in its place."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 12)), nn.Parameter(torch.randn(3, 12, 8))

    def forward(self, x, chosen):
        experts, order = chosen.flatten().sort()
        rows = x[order // chosen.shape[1]]
        rows = (F.relu(rows[:, None] @ self.up[experts]) @ self.down[experts])[:, 0]
        places = torch.empty_like(order)
        places[order] = torch.arange(order.shape[0])
        return rows[places].view(x.shape[0], 2, 8).sum(1)


@row(2, 5, 6)
class Experts(nn.Module):
    """Two of three experts for each token."""

    def __init__(self):
        super().__init__()
        self.embed, self.router, self.head = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        self.experts = SortedExperts()

    def forward(self, x):
        x = self.embed(x)
        tokens = x.flatten(0, 1)
        return self.head(x + self.experts(tokens, self.router(tokens).topk(2).indices).view_as(x))
