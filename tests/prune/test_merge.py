"""Merging: twins are joined without a trace, wherever they are; by hand; and what is wrong is said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import slivo
from slivo.errors import SlivoError, TargetError
from slivo.prune import cut, merge
from slivo.prune.merge import Distance, _clusters, _tree
from slivo.prune.plans import Plan
from slivo.prune.width import select


class Residual(nn.Module):
    """Convolutions with batch norms, a residual stream, a depthwise convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.inner = nn.Sequential(
            nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.GELU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 6, 1),
        )  # fmt: skip
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.inner(x)).mean((2, 3)))


def attention() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))


MODELS = {
    "perceptron": (perceptron, torch.randn(6, 4, dtype=torch.float64), ("*",)),
    "residual": (Residual, torch.randn(4, 3, 8, 8, dtype=torch.float64), ("*",)),
    "attention": (attention, {"input_ids": torch.randint(20, (3, 7))}, ("*intermediate*", "*heads*")),
}


def run(model: nn.Module, x: object) -> Tensor:
    with torch.no_grad():
        out = model.eval()(**x) if isinstance(x, dict) else model.eval()(x)
    return out if isinstance(out, Tensor) else out[0]


def double(model: nn.Module, x: object, only: tuple[str, ...], factors: bool = False) -> None:
    """Make each second position of an axis a twin of the one before it, in place."""
    graph = slivo.trace(model, x)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for axis in select(graph, only=only):
            for member in axis.members:
                tensor = tensors[member.tensor]
                if tensor.is_floating_point() and not member.reads:
                    rows, size = tensor.movedim(member.dim, 0), axis.size // 2
                    index = torch.from_numpy(member.index)
                    generator = torch.Generator().manual_seed(0)  # the same factors for weight and bias
                    factor = torch.rand(size, dtype=torch.float64, generator=generator) + 0.5
                    factor = factor if factors else torch.ones_like(factor)
                    rows[index[1::2]] = rows[index[::2][:size]] * factor.reshape(size, *[1] * rows.dim())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_twins_become_one_and_nothing_changes(name: str, distance: Distance) -> None:
    torch.manual_seed(0)
    make, x, only = MODELS[name]
    model = make().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias)
            module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    double(model, x, only)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected, found = run(model, x), merge(model, x, threshold=1e-9, distance=distance, only=only)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    torch.testing.assert_close(run(found, x), expected, rtol=1e-9, atol=1e-9)
    graph, small = slivo.trace(model, x), slivo.trace(found, x)
    assert small.macs < 0.75 * graph.macs


def test_units_of_one_direction_become_one_behind_a_rectifier() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3)).double(), MODELS["perceptron"][1]
    double(model, x, ("*",), factors=True)
    found = merge(model, x, threshold=1e-9, distance="cosine")
    assert found[0].out_features == 5  # type: ignore[index]
    torch.testing.assert_close(run(found, x), run(model, x))
    assert merge(model, x, threshold=1e-9)[0].out_features == 10  # type: ignore[index]


def test_by_hand() -> None:
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [4.0], [2.0]]))
        model[2].weight.copy_(torch.tensor([[10.0, 20.0, 30.0]]))
    found = merge(model, torch.ones(2, 1), keep=slivo.Budget(params=0.7))
    assert found[0].weight.flatten().tolist() == [1.5, 4.0]  # type: ignore[index,operator]
    assert found[2].weight.flatten().tolist() == [40.0, 20.0]  # type: ignore[index,operator]


def test_merging_changes_less_than_cutting_the_same() -> None:
    gaps = []
    for seed in range(20):
        torch.manual_seed(seed)
        model, x = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3)), torch.randn(128, 6)
        with torch.no_grad():  # units in ten families
            model[0].weight.copy_(torch.randn(10, 6).repeat(7, 1)[:64] + 0.1 * torch.randn(64, 6))
        merged = merge(model, x, keep=slivo.Budget(params=0.3))
        plain = slivo.prune(model, x, keep=slivo.Budget(params=0.3))
        gaps.append([float((run(each, x) - run(model, x)).norm()) for each in (merged, plain)])
    assert sum(one < other for one, other in gaps) == 20


def test_a_cluster_is_average_linkage() -> None:
    axis = slivo.trace(nn.Sequential(nn.Linear(1, 5, bias=False), nn.Linear(5, 2)), torch.ones(2, 1)).prunable[0]
    weights = {"0.weight": torch.tensor([[0.0], [10.0], [1.0], [12.0], [5.0]]), "1.weight": torch.randn(2, 5)}
    tree = _tree(axis, weights, "euclidean")
    assert _clusters(tree, 5, 3) == [[0, 2], [1, 3], [4]]
    # From 5 to {0, 1} it is 4.5 on average, to {10, 12} it is 6.
    assert _clusters(tree, 5, 2) == [[0, 2, 4], [1, 3]]
    assert _clusters(tree, 5, 5) == [[0], [1], [2], [3], [4]]


def test_a_file_brings_it_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = merge(perceptron(), torch.randn(2, 4), keep=slivo.Budget(params=0.5))
    slivo.save(small, tmp_path / "small")
    again = slivo.load(tmp_path / "small", factory=perceptron)
    assert all(torch.equal(one, other) for one, other in zip(small.parameters(), again.parameters(), strict=True))


def test_nothing_alike_stays_whole() -> None:
    model, x = perceptron(), torch.randn(2, 4)
    same = merge(model, x, threshold=0.0)
    assert slivo.edits.record(same) == ()  # type: ignore[attr-defined]
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), same.parameters(), strict=True))


def test_sizes_are_multiples_and_dead_units_are_twins() -> None:
    model, x = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2)), torch.randn(3, 4)
    with torch.no_grad():
        model[0].weight[3:].zero_()
        model[0].bias[3:].zero_()
    for distance in ("euclidean", "cosine"):
        assert merge(model, x, threshold=0.0, distance=distance)[0].out_features == 4  # type: ignore[arg-type,index]
        assert merge(model, x, threshold=0.0, distance=distance, round_to=8)[0].out_features == 8  # type: ignore[arg-type,index]


def test_a_merge_replays_as_a_cut() -> None:
    """What is left of each axis is a cut like any other."""
    model, x = perceptron(), torch.randn(2, 4)
    small = merge(model, x, keep=slivo.Budget(params=0.5), only="0")
    kept = slivo.edits.record(small)[0].axes  # type: ignore[attr-defined]
    graph = slivo.trace(model, x)
    plain = cut(model, x, Plan.of([graph[name] for name in kept], kept))
    assert [each.shape for each in plain.parameters()] == [each.shape for each in small.parameters()]


def test_what_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = perceptron(), torch.randn(2, 4)
    for options in ({}, {"keep": slivo.Budget(params=0.5), "threshold": 0.1}):
        with pytest.raises(SlivoError, match="merging has one measure"):
            merge(model, x, **options)  # type: ignore[arg-type]
    with pytest.raises(SlivoError, match="threshold is -1; a distance of 0 or more"):
        merge(model, x, threshold=-1)
    with pytest.raises(SlivoError, match="distance is 'l1'; there are euclidean, cosine"):
        merge(model, x, threshold=0, distance="l1")  # type: ignore[arg-type]
    with pytest.raises(TargetError):
        merge(model, x, keep=slivo.Budget(params=0.001))
    monkeypatch.setitem(sys.modules, "scipy.cluster.hierarchy", None)
    with pytest.raises(SlivoError, match=r"needed for merging: pip install 'slivo\[merge\]'"):
        merge(model, x, threshold=0)
