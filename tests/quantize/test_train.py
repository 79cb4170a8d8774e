"""Quantization-aware training: what comes out of it computes what was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import slivo
from slivo.edits.quantize import QuantizedLayer
from slivo.errors import SlivoError
from slivo.quantize import QuantizationAware, aware
from slivo.quantize.train import Rounding, rounded_weight
from slivo.tasks import classification
from slivo.train import EMA, Hook, OptimizerSpec, TrainState, fit


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def pairs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, 1, 8, 8, generator=generator), torch.randint(3, (24,), generator=generator)


def data() -> DataLoader[tuple[Tensor, Tensor]]:
    return DataLoader(TensorDataset(*pairs()), batch_size=8, shuffle=True, generator=torch.Generator())


def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {"loss": F.cross_entropy(model(batch[0]), batch[1])}


@pytest.mark.parametrize("bits", [4, 7, 8])
def test_the_codes_compute_what_was_trained(bits: int) -> None:
    model, x = net(), pairs()[0]
    seen: list[Tensor] = []

    def validate(model: nn.Module) -> dict[str, float]:
        seen.append(model(x).clone())
        return {}

    before = list(dict(model.named_parameters()))
    hook = QuantizationAware([x], weight_bits=bits, range_rate=0.01)
    fit(model, data(), objective, epochs=3, hooks=[hook], validate=validate, precision="fp32")
    assert list(dict(model.named_parameters())) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    small = slivo.quantize(model, batches=[x], ranges=hook.ranges, weight_bits=bits)
    assert sum(isinstance(module, QuantizedLayer) for module in small.modules()) == 3
    # The same codes; biases are rounded to the grid of the sums, products are summed in another order, and a value
    # between two codes may go to either.
    gap = (small(x) - seen[-1]).abs()
    assert float(gap.median()) < 1e-4
    assert float(gap.max()) < 0.02 * float(seen[-1].abs().max())
    calibrated = slivo.quantize(model, batches=[x], weight_bits=bits)
    assert hook.ranges["0"].activation != (0.0, 0.0)
    assert float(calibrated[0].input_scale) != float(small[0].input_scale)


def test_training_with_rounding_does_better_than_rounding_after() -> None:
    x, y = pairs()
    model, hook = net(), QuantizationAware([x], weight_bits=2)
    fit(model, data(), objective, epochs=8, optimizer=OptimizerSpec(lr=0.05), precision="fp32")
    after = slivo.quantize(model, batches=[x], weight_bits=2)
    fit(model, data(), objective, epochs=8, hooks=[hook], optimizer=OptimizerSpec(lr=0.02), precision="fp32")
    aware = slivo.quantize(model, batches=[x], ranges=hook.ranges, weight_bits=2)
    assert F.cross_entropy(aware(x), y) < F.cross_entropy(after(x), y)


class Stop(Hook):
    def __init__(self, epoch: int = 0) -> None:
        self.epoch = epoch

    def on_step_end(self, state: TrainState) -> None:
        if state.epoch == self.epoch:
            raise KeyboardInterrupt


def test_a_training_that_was_broken_off_ends_bit_identical(tmp_path: Path) -> None:
    x = pairs()[0]

    def run(model: nn.Module, stop: int, checkpoint: Path | None) -> QuantizationAware:
        hook = QuantizationAware([x], range_rate=0.01)
        fit(model, data(), objective, epochs=4, hooks=[EMA(0.5), hook, Stop(stop)], checkpoint=checkpoint)
        return hook

    whole, broken = net(), net()
    expected = run(whole, 0, None)
    with pytest.raises(KeyboardInterrupt):
        run(broken, 3, tmp_path / "c")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in broken.modules())
    broken = net()
    found = run(broken, 0, tmp_path / "c")
    assert found.ranges == expected.ranges
    for name, value in whole.state_dict().items():
        assert torch.equal(value, broken.state_dict()[name]), name


def test_a_distillation_guides_it() -> None:
    x, y = pairs()
    split = TensorDataset(x, y)
    task = classification("noise", split, split, split, classes="abc", example_inputs=(x[:2],))
    teacher, hook = net().eval(), QuantizationAware([x])
    result = slivo.distill(
        teacher, teacher, task, [slivo.losses.kd(), slivo.losses.hint(at="3")], epochs=1, batch_size=8, hooks=[hook]
    )
    assert set(result.history[0]["terms"]) == {"labels", "kd", "hint@3"}
    small = slivo.quantize(result.model, batches=[x], ranges=hook.ranges)
    assert ((small(x) - teacher(x)).norm() / teacher(x).norm()).item() < 0.5


def test_gradients_are_those_of_clipping_and_of_the_ends() -> None:
    rounding = Rounding((-1.0, 3.0))
    x = torch.tensor([-5.0, -0.5, 0.013, 2.0, 9.0], requires_grad=True)
    out = rounding(x)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    step = 4 / 255
    slack = float((out - x)[1:4].detach().sum()) / 255 / step
    # The derivative by an end is 1 where that end cuts off; by a logarithm it is times the end.
    wanted = torch.tensor([(1 - slack) * -1.0, (1 + slack) * 3.0])
    assert rounding.stretch.grad is not None
    torch.testing.assert_close(rounding.stretch.grad, wanted)
    assert rounding(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_rounding_a_rounded_weight_changes_nothing() -> None:
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 8):
        once = rounded_weight(weight, bits)
        torch.testing.assert_close(rounded_weight(once, bits), once, rtol=1e-6, atol=0)


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(input=self.first(x).relu())


def test_a_loop_of_ones_own() -> None:
    torch.manual_seed(0)
    model, x = Keyword(), torch.randn(16, 4)
    names = list(model.state_dict())
    with aware(model, [x], exclude=["second"]) as rehearsal:
        adam = torch.optim.Adam([*model.parameters(), *rehearsal.parameters()], lr=0.01)
        for _ in range(3):
            adam.zero_grad()
            model(x).square().mean().backward()
            adam.step()
        trained = model(x).detach()
        assert list(model.state_dict()) == names
    assert list(rehearsal.ranges) == ["first"]
    small = slivo.quantize(model, batches=[x], ranges=rehearsal.ranges, exclude=["second"])
    torch.testing.assert_close(small(x), trained, rtol=0, atol=1e-4)  # the grid of the bias
    with aware(model, [x]), pytest.raises(RuntimeError):
        model(torch.randn(2, 3))
    assert "weight" not in vars(model.first)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"range_rate": -1}, "range_rate is -1"),
        ({"rest": 2}, "rest is 2; a share"),
        ({"weight_bits": 9}, "weight_bits is 9; a whole number from 2 to 8"),
        ({"exclude": ["*"]}, "nothing to quantize"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, object], words: str) -> None:
    x = pairs()[0]
    with pytest.raises(SlivoError, match=words):
        fit(net(), data(), objective, epochs=1, hooks=[QuantizationAware([x], **options)])  # type: ignore[arg-type]
