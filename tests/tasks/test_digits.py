"""The digits are split once and for all, and moved by (seed, epoch) alone."""

import pytest
import torch

from slivo.tasks import check, digits, loader
from slivo.tasks.digits import Shifted
from slivo.zoo import small_cnn


def test_splits_are_disjoint_complete_stratified_and_always_the_same():
    first, second = digits(), digits()
    images = [[tuple(x.flatten().tolist()) for x, _ in part] for part in (first.train, first.val, first.test)]
    assert [len(part) for part in images] == [1078, 120, 599]
    assert len({image for part in images for image in part}) == 1797
    for part, other in zip((first.train, first.val, first.test), (second.train, second.val, second.test), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part.tensors, other.tensors, strict=True))
        share = torch.bincount(part.tensors[1]).double() / len(part)
        assert ((share - 0.1).abs() < 0.012).all()
    values = first.train.tensors[0]
    assert (values.min(), values.max(), values.dtype) == (0, 1, torch.float32)
    assert first.classes == tuple("0123456789")
    assert first.example_inputs[0].shape == (2, 1, 8, 8)


def test_a_network_of_the_zoo_fits():
    check(digits(augment=True), small_cnn(8))


def shifted(count=200):
    images = torch.rand(count, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    return Shifted(images, torch.arange(count))


def test_every_move_by_up_to_a_pixel_occurs_and_nothing_else():
    data = shifted()
    moved, labels = data.take(range(200), (0, 0))
    assert torch.equal(labels, data.labels)
    seen = set()
    for image, result in zip(data.images, moved, strict=True):
        padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
        options = [(d, r) for d in range(3) for r in range(3) if torch.equal(padded[:, d : d + 4, r : r + 5], result)]
        assert len(options) == 1
        seen.update(options)
    assert len(seen) == 9


def test_moves_are_a_function_of_seed_epoch_and_sample_not_of_the_batch():
    data = shifted()
    whole, _ = data.take(range(200), (3, 1))
    part, _ = data.take([7, 150, 8], (3, 1))
    assert torch.equal(part, whole[[7, 150, 8]])
    for key in ((3, 2), (4, 1)):
        assert not torch.equal(data.take(range(200), key)[0], whole)


def test_without_a_key_samples_are_as_they_are():
    data = shifted()
    assert torch.equal(data.take([3, 1], None)[0], data.images[[3, 1]])
    assert torch.equal(data[3][0], data.images[3])


@pytest.mark.parametrize("augment", [False, True])
def test_a_training_loader_moves_and_a_plain_one_does_not(augment):
    task, plain = digits(augment=augment), digits()
    known = {tuple(image.flatten().tolist()) for image, _ in plain.train}

    def share(batches):
        rows = [tuple(image.flatten().tolist()) in known for images, _ in batches for image in images]
        return sum(rows) / len(rows)

    assert share(loader(task, "train", batch_size=256)) == 1
    shuffled = loader(task, "train", batch_size=256, seed=0)
    assert (share(shuffled) < 0.3) if augment else (share(shuffled) == 1)
    shuffled.sampler.set_epoch(0)
    again = loader(task, "train", batch_size=256, seed=0)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(shuffled, again, strict=True))
