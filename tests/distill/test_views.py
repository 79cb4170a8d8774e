"""A view of a sample is one tensor, whichever worker reads it, when, and after what; other processes: `test_cache`."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from slivo.distill.views import Views, keys_of, loader
from slivo.errors import RecipeError, ShapeError
from slivo.tasks import classification
from slivo.tasks import loader as task_loader
from slivo.tasks.digits import Shifted

SIZE = 7


def images():
    return torch.arange(SIZE * 16.0).reshape(SIZE, 1, 4, 4)


def plain():
    return TensorDataset(images(), torch.arange(SIZE) % 3)


def noisy(sample):
    """Draw from all three global generators."""
    drawn = torch.rand(1, 4, 4) + np.random.rand() + random.random()
    return sample[0] + drawn, sample[1]


class OfItself(Dataset):
    """Augments by itself, and gives mappings of arrays and words."""

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return {"word": f"sample {index}", "pixels": images()[index].numpy() + torch.randn(1).numpy()}


KINDS = {
    "plain": lambda seed=0: Views(plain(), count=3, seed=seed),
    "augment": lambda seed=0: Views(plain(), count=3, seed=seed, augment=noisy),
    "by itself": lambda seed=0: Views(OfItself(), count=3, seed=seed),
    "whole batches": lambda seed=0: Views(Shifted(images(), torch.arange(SIZE) % 3), count=3, seed=seed),
}
SAME = ("plain",)


def pixels(sample):
    return torch.as_tensor(sample["pixels"] if isinstance(sample, dict) else sample[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_is_one_tensor_in_any_order_and_batch(kind):
    views = KINDS[kind]()
    first = [pixels(views[index]) for index in range(3 * SIZE)]
    torch.manual_seed(5)
    for index in reversed(range(3 * SIZE)):
        assert torch.equal(pixels(KINDS[kind]()[index]), first[index])
    order = [20, 3, 3, 0, 11]
    batch = views.batch(order)
    assert torch.equal(pixels(batch), torch.stack([first[index] for index in order]))
    assert [key.tolist() for key in keys_of(batch)] == [keys_of_one(views[index]) for index in order]
    assert keys_of(views.batch([8, 9])).tolist() == [keys_of_one(views[8]), keys_of_one(views[9])]


def keys_of_one(sample):
    return (sample["key"] if isinstance(sample, dict) else sample[-1]).tolist()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in SAME])
def test_views_and_seeds_differ(kind):
    views, other = KINDS[kind](), KINDS[kind](seed=1)
    assert any(not torch.equal(pixels(views[index]), pixels(views[index + SIZE])) for index in range(SIZE))
    assert any(not torch.equal(pixels(views[index]), pixels(other[index])) for index in range(3 * SIZE))
    assert views.identity != other.identity
    assert not views.holds(other.batch([0])[-1] if kind != "by itself" else other.batch([0])["key"])


def test_one_view_shows_samples_as_they_are():
    shifted = Shifted(images(), torch.arange(SIZE))
    for data in (plain(), shifted):
        views = Views(data)
        assert all(torch.equal(views[index][0], images()[index]) for index in range(SIZE))
        assert torch.equal(views.take([4, 2], (3, 9))[0], images()[[4, 2]])


# Later versions of Python warn of PyTorch's own way to start workers.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_show_their_view_whatever_the_number_of_workers(workers):
    views = KINDS["augment"]()
    batches = loader(views, batch_size=3, seed=4, workers=workers)
    orders = []
    for epoch in range(4):
        found = list(batches)
        keys = torch.cat([keys for _, _, keys in found])
        assert set(keys[:, 1].tolist()) == {epoch % 3}
        assert sorted(keys[:, 0].tolist()) == list(range(SIZE))
        for inputs, labels, rows in found:
            for image, label, key in zip(inputs, labels, rows, strict=True):
                again = views[int(key[1]) * SIZE + int(key[0])]
                assert torch.equal(image, again[0])
                assert torch.equal(label, again[1])
                assert torch.equal(key, again[2])
        orders.append(keys[:, 0].tolist())
    assert orders[0] != orders[3]
    batches.sampler.set_epoch(0)
    assert torch.cat([keys for _, _, keys in batches])[:, 0].tolist() == orders[0]


def test_a_task_shows_the_views_of_its_epochs():
    views = KINDS["augment"]()
    task = classification("views", views, plain(), plain(), classes="abc", example_inputs=(images()[:2],))
    batches = task_loader(task, "train", batch_size=4, seed=0)
    for epoch in (0, 1, 2, 3):
        assert {int(key[1]) for _, _, keys in batches for key in keys} == {epoch % 3}
    assert {int(key[1]) for _, _, keys in task_loader(task, "train", batch_size=4) for key in keys} == {0}


def test_generators_of_the_caller_stay_as_they_are():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for kind in KINDS.values():
        views = kind()
        views[3], views.batch([1, 2])
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


class Fails(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise OSError("gone")


def test_generators_come_back_even_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(OSError, match="gone"):
        Views(Fails())
    assert torch.equal(torch.get_rng_state(), before)


def test_collate_sees_samples_without_keys():
    views = Views(plain(), count=2, augment=noisy, collate=lambda samples: [torch.stack([x for x, _ in samples])])
    inputs, keys = views.batch([1, 9])
    assert inputs.shape == (2, 1, 4, 4)
    assert keys[:, :2].tolist() == [[1, 0], [2, 1]]


def test_bare_tensors_get_keys_too():
    views = Views(list(images()))
    image, key = views[2]
    assert torch.equal(image, images()[2])
    assert views.holds(key[None])
    assert keys_of(views.batch([2, 3])).shape == (2, 4)


def test_what_is_no_key_is_told_from_keys():
    views = Views(plain())
    keys = views.batch([0, 1])[-1]
    assert views.holds(keys)
    for other in (keys.int(), keys[0], keys[:, :3], keys + 1):
        assert not views.holds(other)
    for batch in ((), images(), {"x": 1}, [1, "a"]):
        assert keys_of(batch) is None


def test_another_set_of_views_has_another_identity():
    views = Views(plain(), count=2, augment=noisy)
    others = {
        "samples": Views(torch.utils.data.Subset(plain(), range(6)), count=2, augment=noisy),
        "views": Views(plain(), count=3, augment=noisy),
        "seed": Views(plain(), count=2, seed=1, augment=noisy),
        "data": Views(TensorDataset(images() + 1, torch.arange(SIZE)), count=2, augment=noisy),
        "augment": Views(plain(), count=2, augment=lambda sample: (noisy(sample)[0] * 2, 0)),
    }
    assert Views(plain(), count=2, augment=noisy).identity == views.identity
    for name, other in others.items():
        assert other.identity[name] != views.identity[name]
    # What else is in a sample may be what the teacher gets.
    second = Views(TensorDataset(images(), torch.zeros(SIZE)), count=2, augment=noisy)
    assert second.identity["data"] != views.identity["data"]


def test_refuses_what_makes_no_sense():
    for count in (0, -1, 1.5, True):
        with pytest.raises(RecipeError, match="count is"):
            Views(plain(), count=count)
    with pytest.raises(RecipeError, match="give count=2"):
        Views(plain(), augment=noisy)
    with pytest.raises(ShapeError, match="have no length"):
        Views(iter(()))
    with pytest.raises(ShapeError, match="empty"):
        Views(TensorDataset(torch.zeros(0, 2)))
    for index in (14, -1):
        with pytest.raises(IndexError, match="2 views of 7 samples"):
            Views(plain(), count=2, augment=noisy)[index]
        with pytest.raises(IndexError, match="2 views of 7 samples"):
            Views(plain(), count=2).batch([0, index])
