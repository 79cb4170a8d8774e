"""Training of shared values: the gradient is that of the values, and nothing parts what is shared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import slivo
from slivo.errors import SlivoError
from slivo.share import TrainValues, share, tied
from slivo.train import EMA, Hook, OptimizerSpec, TrainState, fit

PLAIN = OptimizerSpec(lr=0.05, momentum=0.0, nesterov=False, weight_decay=0.0, schedule="constant", warmup=0.0)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def data(count: int = 32) -> DataLoader[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    pairs = TensorDataset(torch.randn(count, 8), torch.randint(4, (count,)))
    return DataLoader(pairs, batch_size=16, shuffle=True, generator=torch.Generator())


def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {"loss": F.cross_entropy(model(batch[0]), batch[1])}


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_a_step_is_that_of_gradient_descent_on_the_values(reduce: str) -> None:
    small = share(slivo.sparsify(net(), sparsity=0.3), 4)
    batch = next(iter(data()))
    expected = {}
    for name in ("0.weight", "2.weight"):
        weight = dict(small.named_parameters())[name].detach()
        values, number = weight.unique(return_inverse=True)
        values.requires_grad_()
        output = functional_call(small, {name: values[number]}, (batch[0],))
        (gradient,) = torch.autograd.grad(F.cross_entropy(output, batch[1]), values)
        if reduce == "mean":
            gradient = gradient / number.flatten().bincount()
        moved = torch.where(values == 0, 0, values - 0.05 * gradient).detach()
        expected[name] = moved[number]
    one = DataLoader(TensorDataset(*batch), batch_size=16)
    fit(small, one, objective, epochs=1, optimizer=PLAIN, hooks=[TrainValues(reduce)], precision="fp32")  # type: ignore[arg-type]
    for name, weight in expected.items():
        torch.testing.assert_close(dict(small.named_parameters())[name].detach(), weight)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("groups", [1, 4])
def test_what_is_shared_stays_so(kind: str, groups: int) -> None:
    small = share(slivo.sparsify(net(), sparsity=0.5), 4, groups=groups)
    before = {name: weight.detach().clone() for name, weight in small.named_parameters()}
    fit(
        small, data(), objective, epochs=3, optimizer=OptimizerSpec(kind, lr=0.01),  # type: ignore[arg-type]
        hooks=[TrainValues(), EMA(0.5)],
    )  # fmt: skip
    for name in ("0.weight", "2.weight"):
        old, new = before[name], dict(small.named_parameters())[name].detach()
        assert torch.equal(old == 0, new == 0)
        assert not torch.equal(old, new)
        for one, other in zip(old.chunk(groups), new.chunk(groups), strict=True):
            for value in one[one != 0].unique():
                assert len(other[one == value].unique()) == 1
    pairs = data().dataset.tensors  # type: ignore[attr-defined]
    with torch.no_grad():
        loss = float(objective(small, pairs)["loss"])
        small.load_state_dict(before)
        assert loss < float(objective(small, pairs)["loss"])


def test_powers_of_two_stay_what_they_are_and_the_rest_learns() -> None:
    small = share(net(), 4, codebook="powers-of-two")
    before = {name: weight.detach().clone() for name, weight in small.named_parameters()}
    fit(small, data(), objective, epochs=2, hooks=[TrainValues()])
    for name, weight in small.named_parameters():
        assert torch.equal(weight, before[name]) == ("weight" in name)


def test_a_training_that_was_broken_off_goes_on(tmp_path: Path) -> None:
    class Stop(Hook):
        def __init__(self, epoch: int = 0) -> None:
            self.epoch = epoch

        def on_epoch_end(self, state: TrainState) -> None:
            if state.epoch == self.epoch:
                raise KeyboardInterrupt

    whole, broken = (share(net(), 4) for _ in range(2))
    fit(whole, data(), objective, epochs=4, hooks=[TrainValues()])
    with pytest.raises(KeyboardInterrupt):
        fit(broken, data(), objective, epochs=4, hooks=[TrainValues(), Stop(3)], checkpoint=tmp_path / "c")
    broken = share(net(), 4)
    fit(broken, data(), objective, epochs=4, hooks=[TrainValues(), Stop()], checkpoint=tmp_path / "c")
    for one, other in zip(whole.parameters(), broken.parameters(), strict=True):
        assert torch.equal(one, other)


def test_tied_trains_as_the_hook_does() -> None:
    one, other = (share(slivo.sparsify(net(), sparsity=0.4), 4) for _ in range(2))
    batch = next(iter(data()))
    loader = DataLoader(TensorDataset(*batch), batch_size=16)
    fit(one, loader, objective, epochs=3, optimizer=PLAIN, hooks=[TrainValues("mean")], precision="fp32")
    sgd = torch.optim.SGD(other.parameters(), lr=0.05)
    with tied(other):
        for _ in range(3):
            sgd.zero_grad()
            objective(other, (batch[0], batch[1]))["loss"].backward()
            sgd.step()
    assert list(dict(one.named_parameters())) == list(dict(other.named_parameters()))
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right)


def test_tied_leaves_the_model_whole_on_errors() -> None:
    small = share(net(), 4)
    names = list(small.state_dict())
    with pytest.raises(ZeroDivisionError), tied(small):
        raise ZeroDivisionError
    assert list(small.state_dict()) == names


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(SlivoError, match=r"call slivo\.share first"), tied(net()):
        pass
    with pytest.raises(SlivoError, match=r"call slivo\.share first"):
        fit(net(), data(), objective, epochs=1, hooks=[TrainValues()])
    with pytest.raises(SlivoError, match="'product'; sum or mean"):
        TrainValues("product")  # type: ignore[arg-type]
    small = share(net(), 4)
    with tied(small), pytest.raises(SlivoError, match=r"call slivo\.share first"), tied(small):
        pass
