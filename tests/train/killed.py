"""Train in a process of its own that kills itself: ``python killed.py CHECKPOINT EPOCH``."""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from slivo.train import EMA, ClipGradients, Hook, OptimizerSpec, fit

EPOCHS = 4


class Kill(Hook):
    """Ends the process, without any clean-up, in the middle of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_gradients(self, state):
        if state.epoch == self.epoch and state.step % 3 == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def model():
    """Return a net with everything that has a state or draws random numbers."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    return nn.Sequential(first, nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 3))


def train(net, checkpoint, *, shuffle=True, kind="sgd", hooks=(), on_epoch=None):
    """Train it on fixed data, of which the last batch is a single sample."""
    images = torch.randn(13, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(images, torch.arange(13) % 3)
    return fit(
        net,
        DataLoader(data, batch_size=4, shuffle=shuffle),
        lambda net, batch: {"ce": nn.functional.cross_entropy(net(batch[0]), batch[1])},
        epochs=EPOCHS,
        optimizer=OptimizerSpec(kind=kind, lr=0.05),
        hooks=[ClipGradients(1.0), EMA(0.9), *hooks],
        checkpoint=checkpoint,
        on_epoch=on_epoch,
        seed=3,
    )


if __name__ == "__main__":
    train(model(), Path(sys.argv[1]), hooks=[Kill(int(sys.argv[2]))])
