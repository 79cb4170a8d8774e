"""Precision and layout are chosen by rule, and put back."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from slivo.train import fit, precision

CPU = torch.device("cpu")


def net():
    return nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten())


def test_multiply_accumulates_are_those_of_the_convolutions():
    model = net()
    model[1].eval()
    images = torch.randn(3, 2, 8, 8)
    count = precision.convolution_macs(model, lambda: model(images))
    assert count == 3 * (4 * 6 * 6 * 2 * 9 + 4 * 4 * 4 * 2 * 9)
    assert [module.training for module in model] == [True, False, True, True]
    assert not any(module._forward_hooks for module in model)
    assert torch.equal(model[1].running_mean, torch.zeros(4))


@pytest.mark.parametrize(("able", "worth", "chosen"), [(False, 0, "fp32"), (True, 10**12, "fp32"), (True, 1, "bf16")])
def test_auto_is_bf16_only_where_the_device_has_it_and_there_is_work(monkeypatch, able, worth, chosen):
    monkeypatch.setattr(precision, "has_bf16", lambda _: able)
    monkeypatch.setattr(precision, "WORTH_BF16", worth)
    dtypes = []

    def objective(model, batch):
        output = model(batch[0])
        dtypes.append((model.training, output.dtype))
        return {"x": output.float().square().mean()}

    fit(net(), DataLoader(TensorDataset(torch.randn(4, 2, 8, 8)), batch_size=2), objective, epochs=1)
    expected = torch.bfloat16 if chosen == "bf16" else torch.float32
    assert {dtype for training, dtype in dtypes if training} == {expected}


def test_nets_without_convolutions_are_never_run_to_decide(monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda _: True)
    assert precision.choose(nn.Linear(2, 2), CPU, lambda: pytest.fail("run")) == "fp32"


def test_bf16_needs_hardware():
    assert precision.has_bf16(CPU) in (True, False)
    assert not precision.has_bf16(torch.device("meta"))


def test_convolutions_are_channels_last_meanwhile_and_keep_their_values():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last), nn.Conv1d(3, 4, 3)
    )
    weights = list(model.parameters())
    before = [(weight.detach().clone(), weight.stride()) for weight in weights]
    with precision.layout(model, CPU, "fp32", lambda: None):
        assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in model[:2])
    after = list(model.parameters())
    assert all(now is weight for now, weight in zip(after, weights, strict=True))
    for now, (value, stride) in zip(after, before, strict=True):
        assert torch.equal(now, value)
        assert now.stride() == stride
    with precision.layout(model, torch.device("cuda"), "fp32", lambda: None):
        assert model[0].weight.is_contiguous()


class Viewing(nn.Module):
    """Reads activations as they lie in memory, as much code does."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4 * 6 * 6, 3)

    def forward(self, x):
        x = self.conv(x)
        return self.head(x.view(len(x), -1))


def test_code_that_reads_memory_as_it_lies_is_trained():
    torch.manual_seed(0)
    model = Viewing().train()
    before = model.conv.weight.detach().clone()
    batches = DataLoader(TensorDataset(torch.randn(8, 2, 8, 8), torch.arange(8) % 3), batch_size=4)
    fit(model, batches, lambda net, batch: {"ce": nn.functional.cross_entropy(net(batch[0]), batch[1])}, epochs=1)
    assert model.conv.weight.is_contiguous()
    assert not torch.equal(model.conv.weight, before)
