"""A task, a teacher and a student for tests of the cache, and processes of their own that fill or use one.

``python remembering.py fill FOLDER`` fills it; ``... train FOLDER CHECKPOINT N`` trains and is killed when the teacher
is asked for the N-th time.
"""

import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from slivo import losses
from slivo.distill import Views, cached, distill, fill
from slivo.tasks import classification
from slivo.train import OptimizerSpec

SIZE = 12
CLASSES = 5
TAPS = ("", "features", "features.0")


class Teacher(nn.Module):
    """Computes in small whole numbers, exactly, so that no answer depends on which samples come together."""

    def __init__(self, seed=0):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
        self.head = nn.Linear(3, CLASSES)
        self.norm = nn.BatchNorm1d(CLASSES, eps=0)
        self.rows = []
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in (*self.features.parameters(), *self.head.parameters()):
                parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator))

    def forward(self, x):
        self.rows.append(len(x))
        return self.norm(self.head(self.features(x).sum((2, 3)))) / 64


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.features = nn.Conv2d(1, 2, 3)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(2, CLASSES)

    def forward(self, x):
        return self.head(self.drop(self.features(x)).relu().mean((2, 3)))


def roll(sample):
    """Move an image at random, and change its brightness; draw from all three global generators."""
    image, label = sample
    moved = torch.roll(image, (np.random.randint(4), random.randrange(4)), (1, 2))
    return moved + torch.randint(3, ()), label


def data():
    images = torch.randint(-2, 3, (SIZE, 1, 4, 4), generator=torch.Generator().manual_seed(2)).float()
    return TensorDataset(images, torch.arange(SIZE) % CLASSES)


def views(count=2, **options):
    return Views(data(), count=count, augment=roll if count > 1 else None, **options)


def forward(model, batch):
    return model(batch[0])


def train(teacher, folder, *, count=2, checkpoint=None, epochs=3, batch_size=4, taps=TAPS, **options):
    """Distill by a teacher with a memory, or one without if there is no folder."""
    shown = views(count)
    held = data()
    task = classification("whole numbers", shown, held, held, classes="abcde", example_inputs=(held.tensors[0][:2],))
    lesson = [losses.kd(weight=0.5), losses.dkd(weight=0.1), losses.hint(at="features", weight=0.1)]
    if folder is not None:
        teacher = cached(teacher, shown, folder, taps=taps, **{"feature_dtype": torch.float32, **options})
    return distill(
        Student(), teacher, task, lesson, epochs=epochs, batch_size=batch_size, checkpoint=checkpoint,
        optimizer=OptimizerSpec(lr=0.05), precision="fp32",
    )  # fmt: skip


class Deadly(Teacher):
    """Ends the process, without any clean-up, when it is asked for the n-th time."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    def forward(self, x):
        self.times -= 1
        if not self.times:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


if __name__ == "__main__":
    what, folder, *rest = sys.argv[1:]
    if what == "train":
        train(Deadly(int(rest[1])), folder, checkpoint=Path(rest[0]))
    else:
        cache = cached(Teacher(), views(8), folder, taps=TAPS)
        print("ready", flush=True)
        sys.stdin.readline()
        fill(cache, forward, batch_size=3)
