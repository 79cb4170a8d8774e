"""Handwritten digits that ship with scikit-learn: 1797 images of 8x8 pixels, no download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from slivo.errors import require
from slivo.tasks.base import Task, generator
from slivo.tasks.classification import classification


class Shifted(Dataset[tuple[Tensor, Tensor]]):
    """Images moved by up to one pixel each way; the move of a sample is a function of (seed, epoch, sample)."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels
        self._padded = F.pad(images, (1, 1, 1, 1))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def take(self, indices: Sequence[int], key: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        """Return a batch, moved if there is a key; empty pixels come in at the edge."""
        rows = torch.tensor(indices)
        if key is None:
            return self.images[rows], self.labels[rows]
        # Not the state that the order of the samples is drawn from, or the two would be related.
        moves = torch.randint(0, 3, (len(self), 2), generator=generator(~key[0], key[1]))[rows]
        height, breadth = self.images.shape[-2:]
        down = moves[:, 0, None, None] + torch.arange(height)[:, None]
        right = moves[:, 1, None, None] + torch.arange(breadth)
        return self._padded[rows[:, None, None], :, down, right].movedim(-1, 1), self.labels[rows]


def digits(*, augment: bool = False) -> Task:
    """Return the task of telling ten handwritten digits apart.

    A third is held out as the test set and a tenth of the rest as the validation set, both with each digit's share
    kept. The split is the same for every run.

    Args:
        augment: Move the training images by up to one pixel each way, anew every epoch. It costs epochs: worth it
            for trainings of some tens of epochs.

    Returns:
        The task; images of shape (1, 8, 8), from 0 to 1.

    Raises:
        SlivoError: If scikit-learn is not installed.

    Example:
        >>> task = digits()
        >>> len(task.train), len(task.val), len(task.test)
        (1078, 120, 599)
    """
    data: Any = require("sklearn.datasets", extra="demo", why="the digits data").load_digits()
    split: Any = require("sklearn.model_selection", extra="demo", why="the digits data").train_test_split
    images = torch.from_numpy((data.images / 16).astype(np.float32)).unsqueeze(1)
    labels = torch.from_numpy(data.target.astype(np.int64))
    rest, test = split(np.arange(len(labels)), test_size=1 / 3, stratify=data.target, random_state=0)
    train, val = split(rest, test_size=0.1, stratify=data.target[rest], random_state=0)
    parts = {name: (images[rows], labels[rows]) for name, rows in (("train", train), ("val", val), ("test", test))}
    return classification(
        "digits",
        Shifted(*parts["train"]) if augment else TensorDataset(*parts["train"]),
        TensorDataset(*parts["val"]),
        TensorDataset(*parts["test"]),
        classes=[str(name) for name in data.target_names],
        example_inputs=(parts["train"][0][:2],),
    )
