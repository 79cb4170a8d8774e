"""Criteria that look at data, against slow references in float64 that go about it another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import slivo
from slivo.errors import SlivoError
from slivo.measure.readers import Watch, means, squares
from slivo.prune import criteria, importance
from slivo.prune.criteria import criterion
from slivo.prune.runs import drawn

LAYERS = {
    "linear": (nn.Linear(6, 5), (4, 6)),
    "linear on a sequence": (nn.Linear(6, 5), (2, 3, 6)),
    "conv": (nn.Conv2d(4, 6, 3, padding=1, stride=2), (2, 4, 7, 6)),
    "oblong": (nn.Conv2d(4, 6, (3, 1), padding=(2, 0), stride=(1, 2), dilation=(2, 1)), (2, 4, 7, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "sound": (nn.Conv1d(4, 6, 3, padding=2, dilation=2), (2, 4, 9)),
    "volume": (nn.Conv3d(2, 3, 2), (2, 2, 4, 3, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 5)),
    "transposed in groups": (nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_squares_are_a_gradient(name):
    """A layer is linear in its weight: with squared inputs, the gradient of its summed outputs is what is asked for."""
    layer, shape = LAYERS[name]
    layer, x = layer.double(), torch.randn(shape, dtype=torch.float64)
    with Watch(dict(layer.named_parameters()), squares, spread=True) as watch:
        layer(x)
    outputs = functional_call(layer, dict(layer.named_parameters()), x.square())
    (expected,) = torch.autograd.grad(outputs.sum(), [layer.weight])
    seen = "weight[0]" if "transposed" in name else "weight[1]"
    assert torch.allclose(watch.found[seen], expected)


def test_weights_are_seen_in_code_of_ones_own():
    """Products either way round, and the three weights that attention packs into one."""
    weight, x = nn.Parameter(torch.randn(5, 6)), torch.randn(4, 6)
    expected = x.square().sum(0).expand(5, 6)
    for call in (lambda: F.linear(x, weight), lambda: x @ weight.T, lambda: weight @ x.T):
        with Watch({"w": weight}, squares, spread=True) as watch:
            call()
        assert torch.allclose(watch.found["w[1]"], expected)
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    other = torch.randn(2, 3, 6)
    with Watch(dict(attention.named_parameters()), squares, spread=True) as watch:
        attention(x[None].expand(2, -1, -1), other, other)
    rows = [2 * x.square().sum(0), *[other.square().sum((0, 1))] * 2]
    assert torch.allclose(watch.found["in_proj_weight[1]"], torch.cat([row.expand(6, 6) for row in rows]), rtol=1e-4)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()


class Images(nn.Module):
    """A network whose axes are read by a grouped convolution, by kernels, and after flattening."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.ReLU())
        self.tail = nn.Sequential(nn.Conv2d(4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 3 * 3, 2))

    def forward(self, x):
        return self.tail(self.body(x))


def scores(model, x, which, **options):
    graph = slivo.trace(model, x)
    return importance(model, graph, graph.prunable, criteria.resolve(which), **options)


def error_of_removal(columns, weights, gone, damping):
    """Damped error of a product X·W whose rows ``gone`` are zero and whose others fit it best."""
    level = damping * columns.square().sum(0).mean()
    whole = torch.cat([columns, level.sqrt() * torch.eye(columns.shape[1], dtype=columns.dtype)])
    stay = [each for each in range(columns.shape[1]) if each not in gone]
    target = whole @ weights
    fitted = torch.linalg.lstsq(whole[:, stay], target, driver="gelsd").solution
    return (target - whole[:, stay] @ fitted).square().sum().item()


def test_obs_is_the_error_of_a_least_squares_fit():
    torch.manual_seed(0)
    model, x = Images().double(), torch.randn(3, 2, 8, 8, dtype=torch.float64)
    graph = slivo.trace(model, x)
    found = importance(model, graph, graph.prunable, criteria.obs, batches=[x[:1], x[1:]])
    body, tail = model.body, model.tail
    hidden = body[1](body[0](x)), body(x)
    flat = tail[2](tail[1](tail[0](hidden[1])))
    assert len(graph.prunable) > 2
    for axis in graph.prunable:
        expected = np.zeros(axis.size)
        for member in (member for member in axis.members if member.reads):
            weight = model.get_parameter(member.tensor)
            given = {"body.2.weight": hidden[0], "tail.0.weight": hidden[1], "tail.3.weight": flat}[member.tensor]
            groups = given.shape[1] // weight.shape[1]
            for part, own in zip(given.chunk(groups, 1), weight.chunk(groups), strict=True):
                columns = F.unfold(part, weight.shape[2:]).mT.flatten(0, 1) if weight.dim() > 2 else part
                kernel = columns.shape[1] // weight.shape[1]
                for position, index in enumerate(member.index):
                    gone = {int(each) * kernel + place for each in index for place in range(kernel)}
                    expected[position] += error_of_removal(columns, own.flatten(1).T, gone, 0.01)
        assert np.allclose(found[axis.name], expected / expected.mean(), rtol=1e-6), axis.name


def test_means_within_a_batch_and_a_norm_over_batches():
    """One loud place weighs as much as many that are a little louder, and one loud sample more than that."""
    model, x = net(), torch.randn(5, 7, 3, dtype=torch.float64)
    means = torch.stack([model[1](model[0](each)).abs().mean(0) for each in x])
    expected = means.square().sum(0).sqrt().detach()
    found = scores(model, x, "activation_mean", batches=list(x))["0 out"]
    assert np.allclose(found, (expected / expected.mean()).numpy())


def test_kl_is_what_the_output_s_distribution_loses():
    """Against all classes of all samples, and against the divergence itself for positions that shrink a little."""
    model, x = net(), torch.randn(6, 3, dtype=torch.float64)
    found = scores(model, x, "kl", batches=[x] * 150)["2 out"]
    hidden = model[:4](x).detach()
    gates = torch.ones(6, 4, dtype=torch.float64, requires_grad=True)
    log = model[4](hidden * gates).log_softmax(-1)
    fisher = torch.zeros(4, dtype=torch.float64)
    for label in range(2):
        (slope,) = torch.autograd.grad(log[:, label].sum(), gates, retain_graph=True)
        fisher += (log[:, label].detach().exp()[:, None] * slope.square()).mean(0)
    # 1,200 draws, each with a spread of 140 % at most: 4 %, and four times that for four positions.
    assert np.allclose(found, fisher.numpy() / 2, rtol=0.16)
    for position in range(4):
        less = torch.ones(4, dtype=torch.float64)
        less[position] = 1 - 1e-3
        other = model[4](hidden * less).log_softmax(-1)
        lost = (log.exp() * (log - other)).sum(-1).mean().item() / 1e-6
        assert math.isclose(lost, fisher[position].item() / 2, rel_tol=1e-2, abs_tol=1e-9)


def test_draws_are_repeatable_and_leave_the_generator_alone():
    model, x = net(), torch.randn(6, 3, dtype=torch.float64)
    before = torch.get_rng_state()
    first, second = (next(drawn(model, {"w": model[4].weight}, [x], None))["drawn"]["w"] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_information_counts():
    """Against sums over bins and labels, one at a time; more than the labels hold is never told."""
    generator = torch.Generator().manual_seed(0)
    units = torch.randn(5, 60, generator=generator)
    labels = torch.randint(3, (60,), generator=generator)
    units[0] = labels
    units[1] = 0
    found = criteria.information.score(units, labels, bins=4)
    for position, row in enumerate(units.double()):
        edges = np.quantile(row.numpy(), [0.25, 0.5, 0.75])
        binned = [sum(value >= edge for edge in edges) for value in row.tolist()]
        told = 0.0
        for left in set(binned):
            for right in range(3):
                both = sum(b == left and int(c) == right for b, c in zip(binned, labels, strict=True)) / 60
                apart = binned.count(left) / 60 * int((labels == right).sum()) / 60
                told += both * math.log(both / apart) if both else 0
        assert math.isclose(found[position].item(), told, abs_tol=1e-12)
    entropy = torch.distributions.Categorical(labels.bincount().double()).entropy()
    assert math.isclose(found[0].item(), entropy.item(), rel_tol=1e-9)
    assert found[1] == 0
    assert torch.allclose(found, criteria.information.score(100 * units + 3, labels, bins=4))


@criterion(on="read")
def _mean(units, labels):
    assert units.shape[1:] == labels.shape
    return units.abs().mean(1)


def test_units_are_of_one_sample_each():
    """Attention with the sequence first mixes samples in its rows; each sample's mean is its own all the same."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 6, dropout=0.0, batch_first=True).eval()
    x = torch.randn(5, 3, 8)
    seen = []
    layer.linear2.register_forward_pre_hook(lambda _, args: seen.append(args[0].mean(1)))
    with torch.enable_grad():
        layer(x)
    expected = seen[0].abs().mean(0)
    graph = slivo.trace(layer, x)
    axis = graph["linear1 out"]
    batches = [(x[:2], torch.tensor([0, 1])), (x[2:], torch.tensor([1, 0, 1]))]
    found = importance(layer, graph, [axis], _mean, batches=batches)[axis.name]
    assert np.allclose(found, (expected / expected.mean()).detach().numpy(), rtol=1e-4)


DATA = ("wanda", "activation", "activation_mean", "obs", "kl", "information", "thinet", "reconstruction", "masking")
BY_SIZE = (
    *("l1", "l2", "lamp", "wanda", "activation", "activation_mean", "obs", "taylor", "snip", "fisher", "kl"),
    *("thinet", "reconstruction", "masking"),
)


def run(model, x, which):
    """Score with labelled batches and a loss, which each criterion takes as much of as it needs."""
    batch = (x, torch.arange(len(x)) % 2)
    return scores(model, x, which, batches=[batch], loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]))


@pytest.mark.parametrize("which", BY_SIZE)
def test_dead_positions_are_the_least(which):
    model, x = net(), torch.randn(8, 3, dtype=torch.float64)
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias, model[2].weight.T):
            tensor[3] = 0
    found = run(model, x, which)["0 out"]
    assert found[3] == 0
    assert (found >= 0).all()


@criterion(on="read")
def _undamped(readers):
    return criteria.obs.score(readers, damping=1e-12)


@criterion(on="read")
def _undamped_reconstruction(readers):
    return criteria.reconstruction.score(readers, damping=1e-12)


@criterion(on="read")
def _undamped_gain(readers, slopes):
    return criteria.gain.score(readers, slopes, damping=1e-12)


@pytest.mark.parametrize(
    "which",
    [
        "wanda",
        _undamped,
        _undamped_reconstruction,
        _undamped_gain,
        "thinet",
        "masking",
        "kl",
        "taylor",
        "snip",
        "fisher",
        "information",
    ],
    ids=lambda each: getattr(each, "name", each),
)
def test_what_changes_no_output_changes_no_score(which):
    """A unit may be larger and its readers smaller by as much (ReLU): nothing is lost by a scale."""
    model, x = net(), torch.randn(40, 3, dtype=torch.float64)
    before = run(model, x, which)
    factors = torch.tensor([0.1, 3.0, 1.0, 20.0, 0.5], dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.mul_(factors[:, None])
        model[0].bias.mul_(factors)
        model[2].weight.div_(factors)
    after = run(model, x, which)
    assert all(np.allclose(before[name], after[name], rtol=1e-5, atol=1e-9) for name in before)


@pytest.mark.parametrize("which", DATA)
def test_batches_with_and_without_a_loss(which):
    model, x = net(), torch.randn(8, 3, dtype=torch.float64)
    labels = torch.arange(8) % 2
    plain = scores(model, x, which, batches=[(x, labels)] if which == "information" else [x])
    for name, found in run(model, x, which).items():
        assert np.allclose(found, plain[name])


@pytest.mark.parametrize("which", [*DATA, "lamp"])
def test_whole_networks_are_cut_to_the_budget(which):
    torch.manual_seed(0)
    model, x = Images(), torch.randn(4, 2, 8, 8)
    small = slivo.prune(
        model, x, keep=slivo.Budget(params=0.6), criterion=which, min_width=1, batches=[(x, torch.arange(4) % 2)],
        loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]),
    )  # fmt: skip
    assert small(x).shape == (4, 2)
    assert slivo.trace(small, x).params <= 0.6 * slivo.trace(model, x).params


def test_scales_of_norms_alone_are_seen():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.PReLU(3), nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.5, -2.0, 0.0]))
    assert scores(model, torch.randn(2, 1, 4, 4), "bn_scale")["0 out"].tolist() == [0.5, 2.0, 0.0]


def test_what_is_missing_is_told():
    model, x = net(), torch.randn(4, 3, dtype=torch.float64)
    for told, which, options in (
        (r"no norm's lies on axis '0 out'; exclude", "bn_scale", {}),
        (r"'wanda' needs batches: give batches=", "wanda", {}),
        (r"'information' needs batches with labels: give", "information", {}),
        (r"needs labels; give batches of \(inputs, labels\)", "information", {"batches": [x]}),
        (r"'obs' was given no batches", "obs", {"batches": []}),
        (r"'information' was given no batches", "information", {"batches": []}),
        (r"does not call the model", "wanda", {"batches": [x], "loss": lambda m, b: b.sum()}),
        (r"activation that meets 0.weight|2.weight holds NaN", "wanda", {"batches": [x * torch.nan]}),
        (r"activation that meets 0.weight|2.weight holds NaN", "activation_mean", {"batches": [x * torch.nan]}),
    ):
        with pytest.raises(SlivoError, match=told):
            scores(model, x, which, **options)
    vector = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Flatten(0)).double()
    with pytest.raises(SlivoError, match="no logits"):
        scores(vector, x, "kl", batches=[x])


class Attention(nn.Module):
    """No weight reads the width of queries and keys; two read what comes in, and one more in training alone."""

    def __init__(self):
        super().__init__()
        self.stem, self.spare = nn.Linear(3, 6), nn.Linear(6, 2)
        self.query, self.key, self.value = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 2)

    def forward(self, x):
        x = self.stem(x)
        weights = (self.query(x) @ self.key(x).mT).softmax(-1)
        out = weights @ self.value(x)
        return (out, self.spare(x)) if self.training else out


def test_axes_that_nothing_reads_are_scored_on_what_writes_them():
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 5, 3)
    graph = slivo.trace(model, x)
    (width,) = (axis for axis in graph.prunable if axis.size == 4)
    found = importance(model, graph, [width, graph["stem out"]], criteria.wanda, batches=[x])
    norms = model.stem(x).square().sum((0, 1)).sqrt()
    expected = ((model.query.weight.abs() + model.key.weight.abs()) * norms).sum(1).detach()
    assert np.allclose(found[width.name], expected / expected.mean(), rtol=1e-5)
    readers = (model.query, model.key, model.value)
    expected = (sum(layer.weight.abs().sum(0) for layer in readers) * norms).detach()
    assert np.allclose(found["stem out"], expected / expected.mean(), rtol=1e-5)
    for which in ("obs", "activation"):
        with pytest.raises(SlivoError, match="no activation was seen"):
            importance(model, graph, [width], criteria.resolve(which), batches=[x])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.memory, self.last = nn.Linear(3, 4), nn.LSTM(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(self.memory(self.first(x))[0])


def test_activations_that_are_not_seen_are_told():
    model, x = Recurrent(), torch.randn(2, 3, 3)
    with pytest.raises(SlivoError, match=r"no activation was seen .* axis 'first out' .*exclude the axis"):
        scores(model, x, "wanda", batches=[x])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return torch.tanh(x @ self.weight.T) @ self.weight


@pytest.mark.parametrize("which", ["wanda", "obs", "activation"])
def test_a_weight_tied_with_its_transpose_is_read_on_either_side(which):
    model, x = Tied(), torch.randn(5, 3)
    other = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False))
    with torch.no_grad():
        other[0].weight.copy_(model.weight)
        other[2].weight.copy_(model.weight.T)
    (found,) = scores(model, x, which, batches=[x]).values()
    (expected,) = scores(other, x, which, batches=[x]).values()
    assert np.allclose(found, expected)


def test_half_precision_does_not_overflow():
    layer, x = nn.Linear(4, 2).bfloat16(), torch.full((3, 4), 1e25).bfloat16()
    with Watch(dict(layer.named_parameters()), means, spread=True) as watch:
        layer(x)
    assert watch.found["weight[1]"].dtype == torch.float32


@pytest.mark.parametrize("which", DATA)
def test_models_that_lie_channels_last_score_the_same(which):
    torch.manual_seed(0)
    model, x = Images().double(), torch.randn(4, 2, 8, 8, dtype=torch.float64)
    batches = [(x, torch.arange(4) % 2)]
    plain = scores(model, x, which, batches=batches, loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    model.to(memory_format=torch.channels_last)
    found = scores(model, x, which, batches=batches, loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    assert plain
    assert all(np.allclose(found[name], plain[name], rtol=1e-6) for name in plain)
