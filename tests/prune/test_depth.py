"""Blocks are found by what the graph does, dropped by what they change, and never needed by what is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slivo
import slivo.measure
from slivo import edits
from slivo.errors import SlivoError, TargetError
from slivo.graph.blocks import blocks
from slivo.prune import drop, influence


class Residual(nn.Module):
    """Adds a perceptron times a factor to what passes through; other forms of call and result on request."""

    def __init__(self, width: int, factor: float = 1.0, form: str = "tensor") -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )
        self.factor, self.form = factor, form

    def forward(self, x: Tensor, mask: Tensor | None = None, *, hidden: Tensor | None = None) -> object:
        stream = x if hidden is None else hidden
        out = stream + self.factor * self.inner(stream)
        if mask is not None:
            out = out * mask
        return (mask, out) if self.form == "pair" else F.layer_norm(out, out.shape[-1:]) if self.form == "post" else out


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module, form: str = "tensor") -> None:
        super().__init__()
        self.layers, self.form, self.head = nn.ModuleList(layers), form, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.form == "pair":
                _, x = layer(x)
            else:
                x = layer(x, hidden=x) if self.form == "keyword" else layer(x)
        out: Tensor = self.head(x)
        return out


def stack(*factors: float, form: str = "tensor") -> Stack:
    torch.manual_seed(0)
    return Stack(*(Residual(6, factor, form) for factor in factors), form=form).double()


X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def names(model: nn.Module, x: Tensor = X) -> list[str]:
    return [block.module for block in blocks(model, x)]


@pytest.mark.parametrize("form", ["tensor", "post", "pair", "keyword"])
def test_blocks_are_found_whatever_form_they_have(form: str) -> None:
    model = stack(1.0, 0.5, form=form)
    assert names(model) == ["layers.0", "layers.1"]
    small = drop(model, X, keep=slivo.Budget(macs=0.9), exclude=["layers.0"])
    expected = model.layers[0](X)
    stream = expected[1] if form == "pair" else expected
    assert torch.equal(small(X), model.head(stream))


def test_a_block_that_changes_nothing_goes_first_and_goes_without_a_trace() -> None:
    model = stack(1.0, 0.0, 0.5)
    measured = influence(model, blocks(model, X), [X, X[:2]])
    assert measured["layers.1"] < 1e-12
    assert min(measured["layers.0"], measured["layers.2"]) > 1e-3
    small = drop(model, X, keep=slivo.Budget(macs=0.8))
    assert torch.equal(small(X), model(X))
    assert [type(layer).__name__ for layer in small.layers] == ["Residual", "Skip", "Residual"]
    assert "argument=0" in repr(small)
    assert slivo.measure.cost(small, X).macs <= 0.8 * slivo.measure.cost(model, X).macs
    assert edits.record(model) == ()


def test_what_adds_nothing_or_is_needed_elsewhere_is_no_block() -> None:
    plain = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 6)).double()
    assert names(plain) == []

    class Shared(nn.Module):
        """One block called twice in a row, and one whose other input is computed for it alone."""

        def __init__(self) -> None:
            super().__init__()
            self.twice = nn.ModuleList([Residual(6)])
            self.side = nn.Linear(6, 6)
            self.adds = nn.ModuleList([Sum()])

        def forward(self, x: Tensor) -> object:
            return self.adds[0](self.twice[0](self.twice[0](x)), self.side(x))

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            out: Tensor = x + self.inner(y)
            return out

    shared = Shared().double()
    assert names(shared) == ["twice.0"]  # both calls as one
    small = drop(shared, X, keep=slivo.Budget(macs=0.7))
    assert torch.equal(small(X), shared.adds[0](X, shared.side(X)))


def test_of_nested_blocks_the_innermost_is_meant() -> None:
    model = nn.Sequential(nn.Sequential(Residual(6), Residual(6)), nn.Linear(6, 2)).double()
    assert names(model) == ["0.0", "0.1"]


def test_a_shallower_model_is_saved_pruned_further_and_quantized(tmp_path: Path) -> None:
    model = stack(1.0, 0.1, 0.5).float()
    x = X.float()
    small = drop(model, x, keep=slivo.Budget(params=0.8))
    thin = slivo.prune(small, x, keep=slivo.Budget(macs=0.6))
    coded = slivo.quantize(thin, batches=[x])
    assert [edit.kind for edit in edits.record(coded)] == ["drop", "cut", "quantize"]
    again = slivo.load(slivo.save(coded, tmp_path / "net"), factory=lambda: stack(1.0, 0.1, 0.5).float())
    assert torch.equal(again(x), coded(x))
    again = slivo.load(slivo.save(small, tmp_path / "small"), factory=lambda: stack(1.0, 0.1, 0.5).float())
    assert torch.equal(again(x), small.eval()(x))


def test_what_cannot_be_is_said() -> None:
    model = stack(1.0, 0.5)
    with pytest.raises(TargetError, match=r"without all 2 the model has 18 MACs \(5.9%\)"):
        drop(model, X, keep=slivo.Budget(macs=0.01))
    with pytest.raises(SlivoError, match=r"'layer.\*' matches no block; there are layers.0, layers.1"):
        drop(model, X, keep=slivo.Budget(macs=0.5), only=["layer.*"])
    with pytest.raises(SlivoError, match="no block that can be dropped"):
        drop(model, X, keep=slivo.Budget(macs=0.5), exclude=["layers.*"])
    with pytest.raises(SlivoError, match="no batches to measure"):
        drop(model, X, keep=slivo.Budget(macs=0.5), batches=[])


def test_training_mode_and_gradients_are_as_they_were() -> None:
    model = stack(1.0, 0.5).train()
    small = drop(model, X, keep=slivo.Budget(macs=0.7))
    assert model.training
    small(X).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
