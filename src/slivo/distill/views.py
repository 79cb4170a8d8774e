"""Views of samples: augmented versions, of which each is the same tensor whenever and wherever it is read."""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from slivo.errors import RecipeError, ShapeError
from slivo.tasks.base import BatchSource, Shuffle

Sample = Any
Batch = Any

KEY = "key"
"""Where the keys are in batches that are mappings; in others they come last."""

# Samples that are read to know a data set again. A transform that is another shows in all of them, other samples in
# most; what is left shows when a sample is looked up, whose own checksum goes along with it.
_PROBES = 16


class Views(Dataset[Any]):
    """A data set whose samples carry a key, and come in a fixed number of augmented views that can be read again.

    While a view is read, the global random generators of PyTorch, NumPy and Python are set from (seed, sample, view),
    and put back afterwards. What the data set and ``augment`` draw from them is hence a function of these three alone:
    not of the process, the order, the number of workers, or what was read before. Epoch e shows view e modulo
    ``count``. A transform that draws from a generator of its own cannot be replayed; a cache refuses its samples.

    Samples ``(input, label)`` become ``(input, label, key)``, mappings get an entry ``"key"``. A key is four integers:
    sample, view, checksum of the sample, and a number that tells this set of views from others. Everything in
    `slivo.tasks` and `slivo.train` takes such batches as it takes others.

    Args:
        data: Samples by index, such as ``(input, label)``, or with `slivo.tasks.base.BatchSource`'s ``take``.
        count: Views of a sample. 1 shows each as it is. More cost as many times the disk in a cache, and so many
            passes of the teacher; 4 to 16 keep most of what augmentation brings to a short training.
        seed: Of the views; not of their order, which a training draws itself.
        augment: ``(sample)`` to an augmented sample, which draws from the global generators. Not needed where the data
            set augments by itself.
        collate: Makes a batch of a list of samples, without keys; PyTorch's own if None.

    Raises:
        RecipeError: If ``count`` is below 1, or 1 with ``augment``.
        ShapeError: If the data have no length or are empty.

    Example:
        >>> data = TensorDataset(torch.zeros(3, 2), torch.arange(3))
        >>> views = Views(data, count=2, augment=lambda sample: (sample[0] + torch.rand(2), sample[1]))
        >>> image, label, key = views[1]
        >>> torch.equal(views[1][0], image), key[:2].tolist()
        (True, [1, 0])
    """

    def __init__(
        self,
        data: Dataset[Any],
        *,
        count: int = 1,
        seed: int = 0,
        augment: Callable[[Sample], Sample] | None = None,
        collate: Callable[[list[Sample]], Batch] | None = None,
    ) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise RecipeError(f"count is {count}; it must be 1 or more, the views of each sample")
        if count == 1 and augment is not None:
            raise RecipeError("augment with one view would show the same crop in every epoch; give count=2 or more")
        try:
            self._size = len(data)  # type: ignore[arg-type]
        except TypeError as error:
            raise ShapeError(f"the data ({type(data).__name__}) have no length; views need samples by index") from error
        if not self._size:
            raise ShapeError("the data are empty; give at least one sample")
        self.data = data
        self.count = count
        self.seed = seed
        self._augment = augment
        self._collate = collate or default_collate
        # Nothing needs to see single samples, so that data that can may give whole batches.
        self._whole = augment is None and collate is None
        self.identity = self._identify()
        digest = hashlib.sha256(repr(self.identity).encode()).digest()
        self._tag = int.from_bytes(digest[:8], "little") >> 1

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Sample:
        """Return a sample with its key; index ``view * len(self) + sample`` is another view of it than 0."""
        self._check([index])
        view, sample = divmod(index, self._size)
        with _randomness_kept():
            found = self._read(sample, view)
        return _with_key(found, torch.tensor([sample, view, _checksum(found), self._tag]))

    def take(self, indices: Sequence[int], key: tuple[int, int] | None) -> Batch:
        """Return a batch of samples, in the view of an epoch; in view 0 without one (see `BatchSource`)."""
        view = key[1] % self.count if key else 0
        return self.batch([view * self._size + index for index in indices])

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return a batch with its keys, shape (samples, 4), by indices as ``views[index]`` takes them."""
        self._check(indices)
        if type(self.data) is TensorDataset and self._whole:
            chosen = torch.tensor(indices) % self._size
            batch = tuple(tensor[chosen] for tensor in self.data.tensors)
            return _with_key(batch, self._keys(indices, [_checksum(row) for row in zip(*batch, strict=True)]))
        shown = {index // self._size for index in indices}
        if isinstance(self.data, BatchSource) and self._whole and len(shown) == 1:
            with _randomness_kept():
                batch = self.data.take([index % self._size for index in indices], self._turn(shown.pop()))
            rows = [pytree.tree_map_only(Tensor, itemgetter(row), batch) for row in range(len(indices))]
            return _with_key(batch, self._keys(indices, [_checksum(row) for row in rows]))
        with _randomness_kept():
            read = [self._read(index % self._size, index // self._size) for index in indices]
        return _with_key(self._collate(read), self._keys(indices, [_checksum(sample) for sample in read]))

    def holds(self, keys: Tensor) -> bool:
        """Tell keys of these views from others, and from what is no keys."""
        return keys.dtype == torch.int64 and keys.dim() == 2 and keys.shape[1] == 4 and bool(
            (keys[:, 3] == self._tag).all()
        )  # fmt: skip

    def _check(self, indices: Sequence[int]) -> None:
        wrong = [index for index in indices if not 0 <= index < self._size * self.count]
        if wrong:
            raise IndexError(f"index {wrong[0]} is out of range: {self.count} views of {self._size} samples")

    def _keys(self, indices: Sequence[int], checksums: Sequence[int]) -> Tensor:
        rows = [
            [index % self._size, index // self._size, checksum, self._tag]
            for index, checksum in zip(indices, checksums, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)

    def _read(self, sample: int, view: int) -> Sample:
        """Return a view of a sample; to be called where the global generators are kept."""
        found = self._plain(sample, view)
        return found if self._augment is None else self._augment(found)

    def _plain(self, sample: int, view: int) -> Sample:
        """Return a view of a sample as the data set gives it, with the generators set for what comes next."""
        _seed(self.seed, sample, view)
        if isinstance(self.data, BatchSource) and self._augment is None:
            return pytree.tree_map_only(Tensor, itemgetter(0), self.data.take([sample], self._turn(view)))
        return self.data[sample]

    def _turn(self, view: int) -> tuple[int, int] | None:
        """Return what a `BatchSource` gets for a view; a single one is of samples as they are."""
        return (self.seed, view) if self.count > 1 else None

    def _identify(self) -> dict[str, Any]:
        """Return what a cache of these views depends on, by name."""
        total = self._size * self.count
        places = sorted({probe * (total - 1) // max(1, _PROBES - 1) for probe in range(_PROBES)})
        plain, shown = [], []
        with _randomness_kept():
            for place in places:
                view, sample = divmod(place, self._size)
                plain.append(_checksum(self._plain(sample, view)))
                shown.append(_checksum(self._read(sample, view)))
        described = {"samples": self._size, "views": self.count, "seed": self.seed}
        digests = {name: zlib.crc32(repr(sums).encode()) for name, sums in (("data", plain), ("augment", shown))}
        return {**described, **{name: f"{digest:08x}" for name, digest in digests.items()}}


def loader(views: Views, *, batch_size: int, seed: int, workers: int = 0) -> DataLoader[Any]:
    """Return shuffled batches of views with their keys, for a training loop of one's own or `slivo.train.fit`.

    `slivo.distill` does so by itself from a task whose training data are views.

    Args:
        views: The data.
        batch_size: Samples in a batch; the last may be smaller.
        seed: Of the order. Each pass is the next epoch, with the next view of every sample;
            ``loader.sampler.set_epoch(epoch)`` sets it, which `slivo.train.fit` does.
        workers: Processes that read; what they read does not depend on their number.

    Example:
        >>> views = Views(TensorDataset(torch.eye(4)), count=2)
        >>> batches = loader(views, batch_size=4, seed=0)
        >>> [keys[:, 1].tolist() for _ in range(2) for _, keys in batches]
        [[0, 0, 0, 0], [1, 1, 1, 1]]
    """
    return ordered(views, _Epochs(len(views), seed, views.count), batch_size=batch_size, workers=workers)


def ordered(
    views: Views, order: Sequence[int] | Shuffle, *, batch_size: int, workers: int = 0
) -> DataLoader[Any]:  # fmt: skip
    """Return batches of views with their keys, by indices as ``views[index]`` takes them.

    Example:
        >>> views = Views(TensorDataset(torch.eye(3)), count=2)
        >>> [keys[:, :2].tolist() for _, keys in ordered(views, [1, 4, 5], batch_size=2)]
        [[[1, 0], [1, 1]], [[2, 1]]]
    """
    return DataLoader(
        _Batches(views),
        batch_size,
        sampler=order,
        collate_fn=_as_is,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def keys_of(batch: Batch) -> Tensor | None:
    """Return what stands where a batch has its keys, if it is a tensor; `Views.holds` tells whether they are.

    Example:
        >>> keys_of((torch.zeros(2, 3), torch.tensor([[0, 1]]))), keys_of({"pixels": torch.zeros(2, 3)})
        (tensor([[0, 1]]), None)
    """
    if isinstance(batch, Mapping):
        found = batch.get(KEY)
    else:
        found = batch[-1] if isinstance(batch, tuple | list) and batch else None
    return found if isinstance(found, Tensor) else None


class _Epochs(Shuffle):
    """A new order every epoch, of the view that is its turn; as indices, so that workers need not know the epoch."""

    def __init__(self, size: int, seed: int, count: int) -> None:
        super().__init__(size, seed)
        self.count = count

    def __iter__(self) -> Iterator[int]:
        view = self.next_epoch % self.count
        return (view * self.size + sample for sample in super().__iter__())


class _Batches(Dataset[Any]):
    """Hands a loader whole batches; `DataLoader` asks for them through ``__getitems__``."""

    def __init__(self, views: Views) -> None:
        self.views = views

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.views.batch(indices)


def _as_is(batch: Batch) -> Batch:
    return batch


def _with_key(sample: Any, key: Tensor) -> Any:
    if isinstance(sample, Mapping):
        return {**sample, KEY: key}
    return (*sample, key) if isinstance(sample, tuple | list) else (sample, key)


def _checksum(sample: Sample) -> int:
    """Return a checksum of all that is in a sample: of which the teacher sees what, is not for the data to know."""
    found = 0
    for leaf in pytree.tree_leaves(sample):
        if isinstance(leaf, Tensor):
            leaf = leaf.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        elif hasattr(leaf, "tobytes"):  # NumPy's arrays, images
            leaf = leaf.tobytes()
        else:
            leaf = repr(leaf).encode()
        found = zlib.crc32(leaf, found)
    return found


@contextmanager
def _randomness_kept() -> Iterator[None]:
    """Give the global random generators of the CPU back as they were; those of GPUs are not touched."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.default_generator.set_state(pytorch)


def _seed(seed: int, sample: int, view: int) -> None:
    words = np.random.SeedSequence([seed % 2**63, sample, view]).generate_state(4, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]) << 32 | int(words[3]))
