"""Refit: what was removed is made up for, exactly where it can be, and by least squares where it cannot."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import slivo
from slivo import edits
from slivo.errors import SlivoError
from slivo.prune import Plan, cut, reestimate, refit

TINY = 1e-11
"""A ridge that only keeps the equations solvable."""


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def repeat_(*layers: nn.Module) -> None:
    """Have the second half of what layers write be a multiple of the first, of each group its own."""
    with torch.no_grad():
        for layer in layers:
            half = len(layer.weight) // 2
            layer.weight[half:] = 2 * layer.weight[:half]
            if layer.bias is not None:
                layer.bias[half:] = 2 * layer.bias[:half]


def halved(model: nn.Module, x: Tensor, axis: str) -> nn.Module:
    """Cut the second half of an axis."""
    size = slivo.trace(model, x)[axis].size
    return cut(model, x, Plan({axis: size}, {axis: range(size // 2)}))


def agree(one: nn.Module, other: nn.Module, x: Tensor) -> bool:
    return torch.allclose(one.eval()(x), other.eval()(x), rtol=0, atol=1e-8)


class Residual(nn.Module):
    """A stem, a block with batch norms whose output is added, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        y += x
        return self.head(y.relu().mean((2, 3)))


def residual() -> Residual:
    torch.manual_seed(0)
    net = Residual().double()
    for norm in (net.bn1, net.bn2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return net.eval()


@pytest.mark.parametrize(
    ("reader", "size"),
    [
        (nn.Conv2d(8, 6, 3, padding=1), (9, 9)),
        (nn.Conv2d(8, 6, (3, 2), stride=(2, 1), padding=(0, 1), bias=False), (9, 9)),
        (nn.Conv2d(8, 6, 3, padding="same", dilation=2, padding_mode="reflect"), (9, 9)),
        (nn.Conv1d(8, 6, 3, stride=2), (20,)),
        (nn.Conv3d(8, 6, 2, padding=1), (4, 4, 4)),
    ],
)
def test_convolutions_make_up_for_channels_that_depend_on_others(reader: nn.Module, size: Sequence[int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(type(reader)(3, 8, 1), nn.ReLU(), reader).double()
    repeat_(model[0])
    x = noise(20, 3, *size)
    small = halved(model, x, "0 out")
    mended = refit(small, model, [x[:12], x[12:]], ridge=TINY)
    assert not agree(small, model, x)
    assert agree(mended, model, noise(5, 3, *size))  # inputs that were not seen


def test_linear_layers_on_sequences() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)).double()
    repeat_(model[0])
    x = noise(10, 7, 5)
    assert agree(refit(halved(model, x, "0 out"), model, [x], ridge=TINY), model, noise(4, 7, 5))


def test_grouped_and_depthwise_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).double()
    repeat_(model[0], model[2])
    with torch.no_grad():  # relu(2 (2 w) x) is a multiple of relu(w x)
        model[2].weight[4:] = model[2].weight[:4]
        model[2].bias[4:] = 2 * model[2].bias[:4]
    x = noise(16, 3, 6, 6)
    small = halved(model, x, "* out")
    assert small[2].groups == 4
    assert agree(refit(small, model, [x], ridge=TINY), model, noise(3, 3, 6, 6))
    grouped = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2, stride=2)).double()
    with torch.no_grad():
        for group in (0, 4):
            grouped[0].weight[group + 2 : group + 4] = 2 * grouped[0].weight[group : group + 2]
            grouped[0].bias[group + 2 : group + 4] = 2 * grouped[0].bias[group : group + 2]
    axis = next(axis for axis in slivo.trace(grouped, x).prunable if axis.size in (4, 8))
    kept = [0, 1] if axis.size == 4 else [0, 1, 4, 5]
    small = cut(grouped, x, Plan({axis.name: axis.size}, {axis.name: kept}))
    assert agree(refit(small, grouped, [x], ridge=TINY), grouped, noise(3, 3, 6, 6))


def test_residual_networks_with_batch_norm() -> None:
    model, x = residual(), noise(24, 3, 6, 6)
    repeat_(model.conv1)
    with torch.no_grad():
        model.bn1.running_mean[4:] = 2 * model.bn1.running_mean[:4]
        model.bn1.running_var[4:] = 4 * (model.bn1.running_var[:4] + model.bn1.eps) - model.bn1.eps
        model.bn1.weight[4:], model.bn1.bias[4:] = model.bn1.weight[:4], model.bn1.bias[:4]
    small = halved(model, x, next(axis.name for axis in slivo.trace(model, x).prunable if axis.size == 8))
    assert agree(refit(small, model, [x], ridge=TINY), model, noise(3, 3, 6, 6))


def test_errors_of_the_stream_are_mended_where_something_is_added_to_it() -> None:
    model, x = residual(), noise(24, 3, 6, 6)
    small = slivo.prune(model, x, keep=slivo.Budget(macs=0.6), only=["conv1"])
    with torch.no_grad():
        small.stem.bias += 0.5
    mended = refit(small, model, [x])

    def stream(net: nn.Module) -> Tensor:
        stem = net.stem(x)
        return stem + net.bn2(net.conv2(net.bn1(net.conv1(stem)).relu()))

    torch.testing.assert_close(stream(mended).mean((0, 2, 3)), stream(model).mean((0, 2, 3)))
    assert (stream(mended) - stream(model)).square().mean() < (stream(small) - stream(model)).square().mean()


class Cubic(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * x.pow(3)


def test_what_is_added_to_its_own_output_is_no_stream() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), Cubic()).double(), noise(40, 4)
    small = halved(model, x, "0 out")
    mended = refit(small, model, [x], ridge=TINY)
    read = torch.cat([model[:2](x)[:, :4], torch.ones(40, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(read, model[:3](x)).solution
    torch.testing.assert_close(mended[2].weight, expected[:4].T, rtol=1e-6, atol=1e-8)


def test_the_constant_part_goes_into_the_batch_norm() -> None:
    model, x = residual(), noise(24, 3, 6, 6)
    small = slivo.prune(model, x, keep=slivo.Budget(macs=0.6), only=["conv1"])
    mended = refit(small, model, [x])

    def block(net: nn.Module) -> Tensor:
        return net.bn2(net.conv2(net.bn1(net.conv1(net.stem(x))).relu()))

    torch.testing.assert_close(block(mended).mean((0, 2, 3)), block(model).mean((0, 2, 3)))
    assert mended.conv2.bias is None


def test_the_weights_are_those_of_least_squares() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double(), noise(40, 4)
    mended = refit(halved(model, x, "0 out"), model, [x[:10], x[10:]], ridge=TINY)
    read = torch.cat([model[:2](x)[:, :3], torch.ones(40, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(read, model(x)).solution
    torch.testing.assert_close(mended[2].weight, expected[:3].T, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(mended[2].bias, expected[3], rtol=1e-6, atol=1e-8)


def test_the_error_is_never_worse_and_falls_with_the_ridge() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3)).double(), noise(9, 4)
    small = halved(model, x, "0 out")
    nets = [refit(small, model, [x], ridge=ridge) for ridge in (1e-9, 1e-3, 0.1, 10.0)]
    with torch.no_grad():
        errors = [float((net(x) - model(x)).square().sum()) for net in [*nets, small]]
    assert errors == sorted(errors)


def test_nothing_changes_where_nothing_was_cut() -> None:
    model, x = residual(), noise(4, 3, 6, 6)
    same = refit(model, model, [x])
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in same.state_dict().items())


def test_a_refitted_model_is_hardly_changed_by_another_refit() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double(), noise(30, 4)
    once = refit(halved(model, x, "0 out"), model, [x], ridge=1e-9)
    torch.testing.assert_close(refit(once, model, [x], ridge=1e-9)(x), once(x), rtol=1e-6, atol=1e-6)


def test_cuts_in_several_steps_are_one() -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double(),
        noise(40, 4),
    )
    repeat_(model[0], model[2])
    twice = halved(halved(model, x, "2 out"), x, "0 out")
    assert agree(refit(twice, model, [x], ridge=TINY), model, noise(5, 4))


def test_the_arguments_are_left_untouched() -> None:
    model, x = residual().train(), noise(8, 3, 6, 6)
    small = slivo.prune(model, x, keep=slivo.Budget(macs=0.6))
    before = copy.deepcopy([model.state_dict(), small.state_dict(), x])
    mended = refit(small, model, iter([x]))
    reestimate(small, [x])
    for one, other in zip(before[:2], (model, small), strict=True):
        assert all(torch.equal(value, one[name]) for name, value in other.state_dict().items())
    assert torch.equal(before[2], x)
    assert model.training
    assert mended.training
    assert all(not module._forward_hooks for net in (model, mended) for module in net.modules())
    assert edits.record(mended) == edits.record(small)


def test_saved_and_loaded(tmp_path) -> None:
    model, x = residual(), noise(8, 3, 6, 6)
    mended = refit(slivo.prune(model, x, keep=slivo.Budget(macs=0.6)), model, [x])
    slivo.save(mended, tmp_path / "net")
    assert torch.equal(slivo.load(tmp_path / "net", factory=lambda: Residual().double()).eval()(x), mended(x))


def test_batch_norms_have_the_statistics_of_the_batches() -> None:
    model, x = residual(), noise(8, 3, 6, 6)
    new = reestimate(model, [x])
    read = model.conv1(model.stem(x))
    torch.testing.assert_close(new.bn1.running_mean, read.mean((0, 2, 3)))
    torch.testing.assert_close(new.bn1.running_var, read.transpose(0, 1).flatten(1).var(1))
    assert new.bn1.momentum == 0.1
    assert not new.bn1.training


def test_layers_that_share_weights_stay_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False)).double()
    model[3].weight = nn.Parameter(noise(8, 4))
    model[2].weight = model[2].weight
    tied = nn.ModuleDict({"body": model[:2], "one": model[2], "two": copy.copy(model[2])})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = tied

        def forward(self, x: Tensor) -> Tensor:
            x = self.parts["body"](x)
            return self.parts["one"](x) + self.parts["two"](2 * x)

    both, x = Both(), noise(6, 4)
    both.parts["two"]._parameters = {"weight": both.parts["one"].weight, "bias": None}
    small = slivo.prune(both, x, keep=slivo.Budget(macs=0.5))
    with caplog.at_level(logging.WARNING, "slivo"):
        mended = refit(small, both, [x])
    assert "nothing was refitted" in caplog.text
    assert torch.equal(mended(x), small(x))


def test_bad_input_is_told() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(6, 4)
    small = slivo.prune(model, x, keep=slivo.Budget(macs=0.5))
    with pytest.raises(SlivoError, match="there are no batches"):
        refit(small, model, [])
    with pytest.raises(SlivoError, match="batches is"):
        refit(small, model, x)
    with pytest.raises(SlivoError, match="ridge is 0; a positive number"):
        refit(small, model, [x], ridge=0)
    with pytest.raises(SlivoError, match="was not cut from the second"):
        refit(model, small, [x])
    with pytest.raises(SlivoError, match="'quantize' edit besides its cuts"):
        refit(slivo.quantize(small, "int8-weights", batches=[x]), model, [x])
