"""Graphs that take a module's place run on the sizes that its code runs on, and refuse what they would get wrong."""

from __future__ import annotations

import logging

import pytest
import torch
from oracles.dead import cut, dead
from oracles.permutation import error, outputs
from torch import fx, nn
from zoo import ZOO, build

import slivo
from slivo.errors import ShapeError
from slivo.graph.capture import capture
from slivo.graph.program import Program, describe_inputs, recapture
from slivo.graph.samples import is_factor
from slivo.graph.sizes import number


@pytest.fixture(autouse=True)
def _no_warnings(caplog):
    caplog.set_level(logging.ERROR, "slivo")


def resized(x):
    """Inputs as those given, of other sizes: of the batch, and of lengths or of images."""

    def like(*shape):
        torch.manual_seed(1)
        if x.is_floating_point():
            return torch.randn(*shape, dtype=x.dtype)
        return torch.randint(int(x.max()) + 1, shape)

    shape = x.shape
    yield like(1, *shape[1:])
    yield like(5, *shape[1:])
    for length in (1, 4, 8) if x.dim() < 4 else ():
        yield like(shape[0], length, *shape[2:])
        yield like(3, *shape[1:-1], length)
    for high, wide in ((4, 4), (8, 12), (7, 16)) if x.dim() == 4 else ():
        yield like(3, shape[1], high, wide)


def differences(graph, model, x, *more):
    """Compare a graph with what it stands for on other sizes; returns the errors of those sizes that it takes."""
    found = []
    for other in (*resized(x), *more):
        try:
            expected = outputs(model, other)
        except (RuntimeError, IndexError, ValueError):
            continue  # the code itself does not run
        try:
            found.append(error(outputs(graph, other), expected))
        except ShapeError:
            continue
    return found


@pytest.mark.parametrize("name", sorted(name for name in ZOO if torch.is_tensor(ZOO[name][1]())))
def test_no_graph_is_wrong_for_sizes_that_it_takes(name):
    model, x = build(name)
    graph = capture(model, x, dynamic=True).graph
    assert max([0, *differences(graph, model, x)]) < 1e-10


class Image(nn.Module):
    """Windows of four by four, by numbers in forward, that attend to themselves, and a mean."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 5, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        batch, _, high, wide = x.shape
        y = self.mix(x).view(batch, 16, high // 4, 4, wide // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 16)
        y = (y @ y.mT / 16).tanh() @ y
        y = y.view(batch, high // 4, wide // 4, 4, 4, 16).permute(0, 5, 1, 3, 2, 4)
        return self.last(x + y.reshape(batch, 16, high, wide)).mean((2, 3))


REPLACED = {
    "FlatHeads": ((1, 5, 6), (3, 1, 6), (4, 9, 6)),
    "Experts": ((1, 5, 6), (3, 1, 6), (4, 9, 6)),
    "HardCoded": ((1, 3, 4, 4), (5, 3, 8, 2)),
    "Image": ((1, 3, 8, 8), (3, 3, 16, 8), (2, 3, 4, 4)),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", sorted(REPLACED))
def test_a_cut_of_what_is_dead_changes_nothing_for_any_size(name, batch):
    model, x = (Image().double().eval(), torch.randn(2, 3, 8, 8).double()) if name == "Image" else build(name)
    model, kept = dead(model, slivo.trace(model, x))
    small = cut(model, x[:batch], kept)
    assert any(isinstance(module, fx.GraphModule) for module in small.modules())
    for shape in REPLACED[name]:
        other = torch.randn(*shape).double()
        assert error(outputs(small, other), outputs(model, other)) < 1e-10
    assert max(differences(small, model, x)) < 1e-10


def test_parts_compute_with_the_sizes_of_their_inputs():
    """The code of these blocks, written for the sizes that stay, gives the same for other lengths."""
    model, x = build("Coupled")
    small = slivo.prune(model, x, keep=slivo.Budget(params=0.6), scope="uniform").eval()
    heads, width = next(
        node.args[1][3:] for node in small.blocks[0].graph.nodes if "reshape" in node.name and len(node.args[1]) == 5
    )

    def block(graph, x):
        batch, length, _ = x.shape
        x = nn.functional.linear(x, graph.qkv.weight, graph.qkv.bias)
        q, k, v = x.view(batch, length, 3, heads, width).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(batch, length, heads * width)
        return nn.functional.linear(y, graph.out.weight, graph.out.bias)

    for shape in ((1, 5, 6), (3, 8, 6), (2, 1, 6)):
        with torch.no_grad():
            y = small.embed(torch.randn(*shape).double())
            for graph in small.blocks:
                assert error([graph(y, flag=True)], [block(graph, y)]) < 1e-12


def test_artifacts_run_on_other_sizes(tmp_path):
    for name in ("FlatHeads", "Experts", "Coupled"):
        model, x = build(name)
        small = slivo.prune(model, x, keep=slivo.Budget(params=0.6), scope="uniform").eval()
        slivo.save(small, tmp_path / name)
        loaded = slivo.load(tmp_path / name, factory=lambda name=name: build(name)[0]).eval()
        other = torch.randn(3, 8, 6).double()
        assert error(outputs(loaded, other), outputs(small, other)) == 0


class Ways(nn.Module):
    """Adds one for long inputs, and up in steps of a loop as long as the image is wide."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Linear(8, 2)

    def forward(self, x):
        y = self.first(x).view(x.shape[0], 8, *x.shape[2:])
        y = y + 1 if x.shape[2] > 4 else y
        return self.last(sum(y[..., step].mean(-1) for step in range(x.shape[3])))


def test_sizes_for_which_the_code_takes_another_way_are_refused():
    x = torch.randn(2, 3, 6, 5)
    small = slivo.prune(Ways(), x, keep=slivo.Budget(macs=0.6))
    assert isinstance(small, fx.GraphModule)
    assert small(torch.randn(1, 3, 9, 5)).shape == (1, 2)
    with pytest.raises(ShapeError, match=r"x.shape\[2\] > 4.*Prune with example inputs"):
        small(torch.randn(2, 3, 4, 5))
    with pytest.raises(ShapeError, match=r"dimension 3 of the input x is 7, but .* for 5 alone"):
        small(torch.randn(2, 3, 6, 7))
    again = slivo.prune(small, x, keep=slivo.Budget(macs=0.6))
    with pytest.raises(ShapeError, match=r"x.shape\[2\] > 4"):
        again(torch.randn(2, 3, 4, 5))


class Keyed(nn.Module):
    """Looks lengths up in a table, as code does whose results are cached, which symbols cannot."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.table = nn.Linear(6, 8), nn.Linear(8, 2), {5: 1.0, 7: 2.0}

    def forward(self, x):
        return self.last(self.first(x).view(*x.shape[:2], 8) * self.table[x.shape[1]])


def test_what_cannot_be_followed_for_all_dimensions_is_for_the_batch():
    x = torch.randn(2, 5, 6)
    small = slivo.prune(Keyed(), x, keep=slivo.Budget(macs=0.6))
    assert isinstance(small, fx.GraphModule)
    assert small(torch.randn(3, 5, 6)).shape == (3, 5, 2)
    with pytest.raises(ShapeError, match="dimension 1 of the input x is 7"):
        small(torch.randn(2, 7, 6))


def test_factors_are_those_of_all_sizes_not_of_the_example():
    model, x = build("FlatHeads")
    values = [node.meta.get("val") for node in capture(model, x, dynamic=True).graph.graph.nodes]
    sizes = [size for value in values if torch.is_tensor(value) for size in value.shape]
    rows = next(size for size in sizes if isinstance(size, torch.SymInt) and number(size) == 8)
    assert is_factor(4, rows)
    assert not is_factor(8, rows)


def test_a_program_for_the_sizes_of_the_example_refuses_others():
    model, x = build("Mlp")
    graph = recapture(model, Program(describe_inputs(x), (), dynamic=False)).graph
    assert error(outputs(graph, x), outputs(model, x)) == 0
    with pytest.raises(ShapeError, match="dimension 0 of the input"):
        graph(x[:2])
