"""The oracles on networks that nobody thought of."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.permutation import error, outputs, permuted
from torch import nn
from torch.nn import functional as F

import slivo

STEPS = (
    "conv",
    "depthwise",
    "grouped",
    "norm",
    "group_norm",
    "relu",
    "cat",
    "add",
    "split",
    "scale",
    "pool",
    "shuffle",
)


class Random(nn.Module):
    """A convolutional network that takes the given steps; tensors it has made can be used again later."""

    def __init__(self, steps: list[tuple[str, int]]):
        super().__init__()
        self.steps = steps
        self.parts = nn.ModuleList()
        width, widths = 4, [4]
        for kind, number in steps:
            after = 4 * (1 + number % 3)
            part: nn.Module = nn.Identity()
            if kind == "conv":
                part, width = nn.Conv2d(width, after, 3, padding=1), after
            elif kind == "depthwise":
                part = nn.Conv2d(width, width, 3, padding=1, groups=width)
            elif kind == "grouped":
                part, width = nn.Conv2d(width, after, 1, groups=2), after
            elif kind == "norm":
                part = nn.BatchNorm2d(width)
            elif kind == "group_norm":
                part = nn.GroupNorm(2, width)
            elif kind == "cat":
                width += widths[number % len(widths)]
            elif kind == "add":
                part = nn.Conv2d(width, widths[number % len(widths)], 1)
                width = widths[number % len(widths)]
            elif kind == "split":
                width //= 2
            elif kind == "scale":
                part = nn.Linear(width, width)
            self.parts.append(part)
            width = width if width % 4 == 0 else width * 2 if kind == "split" else width
            widths.append(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        made = [x]
        for (kind, number), part in zip(self.steps, self.parts, strict=True):
            other = made[number % len(made)]
            if kind == "relu":
                x = F.relu(x)
            elif kind == "cat":
                x = torch.cat([x, other], dim=1)
            elif kind == "add":
                x = part(x) + other
            elif kind == "split":
                left, right = x.chunk(2, dim=1)
                x = left * right if (x.shape[1] // 2) % 4 == 0 else torch.cat([right, left], dim=1)
            elif kind == "scale":
                x = x * torch.sigmoid(part(x.mean((2, 3))))[:, :, None, None]
            elif kind == "pool":
                x = x + F.avg_pool2d(x, 3, 1, 1)
            elif kind == "shuffle":
                batch, channels, high, wide = x.shape
                x = x.reshape(batch, 2, channels // 2, high, wide).transpose(1, 2).flatten(1, 2)
            else:
                x = part(x)
            made.append(x)
        return self.head(x.mean((2, 3)))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 11)), min_size=1, max_size=7))
def test_random_networks(steps):
    torch.manual_seed(0)
    model = Random([("conv", 1), *steps, ("conv", 2)]).double().eval()
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    graph, expected = slivo.trace(model, x), outputs(model, x)
    assert not graph.unknown_ops
    for axis in graph.prunable:
        assert error(outputs(permuted(model, axis), x), expected) < 1e-9, axis
    if graph.prunable and any(axis.size > 2 for axis in graph.prunable):
        small = slivo.prune(model, x, keep=slivo.Budget(params=0.97), min_width=1)
        assert outputs(small, x)[0].shape == expected[0].shape
        assert slivo.trace(small, x).params <= 0.97 * graph.params
