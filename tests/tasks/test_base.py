"""Loaders give each sample once, in an order that seed and epoch alone decide; misfits are named."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from slivo.errors import ShapeError
from slivo.tasks import check, classification, forward, loader
from slivo.tasks.base import generator


class Samples(torch.utils.data.Dataset):
    """A data set that can only be asked for one sample at a time."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


def tensors(count=11):
    return TensorDataset(torch.arange(4.0 * count).view(count, 4), torch.arange(count) % 3)


def task(data=None, **changes):
    data = data or tensors()
    made = classification("rows", data, data, data, classes="abc", example_inputs=(data[:2][0],))
    return replace(made, **changes)


def flat(batches):
    return [label for _, labels in batches for label in labels.tolist()]


def order(batches):
    return [int(row[0]) // 4 for inputs, _ in batches for row in inputs]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_without_a_seed_batches_come_in_order(split):
    batches = loader(task(), split, batch_size=4)
    assert [len(labels) for _, labels in batches] == [4, 4, 3]
    assert order(batches) == order(batches) == list(range(11))


def test_with_a_seed_every_pass_is_the_next_epoch():
    batches = loader(task(), "train", batch_size=4, seed=3)
    first, second = order(batches), order(batches)
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second
    again = loader(task(), "train", batch_size=2, seed=3)
    again.sampler.set_epoch(1)
    torch.manual_seed(5)
    assert order(again) == second
    again.sampler.set_epoch(0)
    assert order(again) == first
    assert order(loader(task(), "train", batch_size=4, seed=4)) != first


def test_batches_by_index_are_those_that_collate_would_make():
    data = tensors()
    sample = Samples(data)
    for seed in (None, 1):
        quick = list(loader(task(data), "train", batch_size=4, seed=seed))
        slow = list(loader(task(data, train=sample), "train", batch_size=4, seed=seed))
        for (inputs, labels), (others, names) in zip(quick, slow, strict=True):
            assert torch.equal(inputs, others)
            assert torch.equal(labels, names)


def test_a_tasks_own_collate_is_used():
    batches = loader(task(collate=lambda samples: len(samples)), "train", batch_size=4)
    assert list(batches) == [4, 4, 3]


def test_a_loaders_data_can_be_asked_for_single_samples():
    data = loader(task(), "train", batch_size=4).dataset
    assert len(data) == 11
    assert data[2][1] == 2


def test_neighboring_seeds_and_epochs_draw_differently():
    draws = {tuple(torch.rand(3, generator=generator(s, e)).tolist()) for s in range(-3, 20) for e in range(20)}
    assert len(draws) == 23 * 20


def test_forward_feeds_the_model_what_the_task_says():
    made = task(inputs=lambda batch: (batch[0][:, :2], batch[0][:, 2:]))

    class Two(nn.Module):
        def forward(self, a, b):
            return torch.cat([b, a], 1)

    batch = next(iter(loader(made, "val", batch_size=3)))
    assert torch.equal(forward(made, Two(), batch), batch[0].roll(2, 1))


def images(channels=1):
    data = TensorDataset(torch.zeros(4, channels, 6, 6), torch.arange(4) % 3)
    return classification("images", data, data, data, classes="abc", example_inputs=(torch.zeros(2, channels, 6, 6),))


class Pick(nn.Module):
    def forward(self, x):
        return {"scores": x}


class Fails(nn.Module):
    def forward(self, *_):
        raise ValueError


def conv(inputs=1, outputs=3, hidden=4):
    return nn.Sequential(nn.Conv2d(inputs, hidden, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, outputs))


@pytest.mark.parametrize(
    ("made", "model", "words"),
    [
        (
            images(),
            conv(3),
            r"module '0' \(Conv2d\) got .* \(2, 1, 6, 6\) from task 'images', but expects .* 3 channels",
        ),
        (task(), conv(1), r"\(2, 4\) from task 'rows', but expects 4 dimensions with 1 channels"),
        (images(), conv(hidden=5), r"module '1' \(BatchNorm2d\) got .* \(2, 5, 4, 4\) .* expects 4 channels"),
        (images(), nn.Sequential(conv(), nn.Linear(5, 3)), r"module '1' \(Linear\) got .* \(2, 3\) .* 5 features"),
        (task(), nn.Linear(4, 3).double(), r"the model \(Linear\) got .* failed: .*dtype"),
        (task(), Fails(), r"the model \(Fails\) .* failed: ValueError"),
        (task(inputs=lambda batch: ()), nn.Linear(4, 3), r"got an input of shape \(no tensor\)"),
        (
            task(inputs=lambda batch: batch[7]),
            nn.Linear(4, 3),
            r"inputs of task 'rows' cannot be taken out of its batch",
        ),
        (task(), nn.Linear(4, 5), r"output for task 'rows' has shape \(2, 5\), expected \(batch, 3\): one score"),
        (task(), Pick(), r"output \(dict\) does not suit the loss of task 'rows'"),
        (task(TensorDataset(torch.zeros(2, 4), torch.tensor([0, 9]))), nn.Linear(4, 3), r"loss .*Target 9"),
    ],
)
def test_misfits_are_named_with_place_and_shapes(made, model, words):
    model[0].train(False) if isinstance(model, nn.Sequential) else None
    modes = [module.training for module in model.modules()]
    with pytest.raises(ShapeError, match=words) as caught:
        check(made, model)
    assert "\n" not in str(caught.value)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_fits_is_left_as_it_was():
    model = conv()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check(images(), model)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_batches_of_any_nesting_reach_the_models_device():
    made = task(
        collate=lambda samples: {"x": [torch.stack([x for x, _ in samples])], "name": "rows", "y": samples[0][1]},
        inputs=lambda batch: (batch["x"][0],),
        loss=lambda output, batch: output.mean(),
    )
    check(made, nn.Linear(4, 3))
