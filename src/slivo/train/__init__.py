"""Training: one loop, an objective of named terms, and hooks."""

from slivo.train.checkpoint import read, write
from slivo.train.hooks import EMA, ClipGradients, Hook, Saves, Stopped, TrainState
from slivo.train.loop import Batch, Objective, fit
from slivo.train.optim import OptimizerSpec
from slivo.train.precision import Precision
from slivo.train.progress import Progress, Report

__all__ = [
    "EMA",
    "Batch",
    "ClipGradients",
    "Hook",
    "Objective",
    "OptimizerSpec",
    "Precision",
    "Progress",
    "Report",
    "Saves",
    "Stopped",
    "TrainState",
    "fit",
    "read",
    "write",
]
