"""Optimizers and learning-rate schedules as a value that recipes can hold."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from slivo.errors import SlivoError


@dataclass(frozen=True)
class OptimizerSpec:
    """Which optimizer, and how its learning rate moves.

    Attributes:
        kind: ``sgd`` or ``adamw``.
        lr: Peak learning rate. 0.1 suits SGD with batch norm from scratch, a tenth of it fine-tuning; 0.001 AdamW.
        momentum: Of SGD.
        nesterov: Look ahead along the momentum (SGD).
        weight_decay: Of weights; coupled for SGD, decoupled for AdamW.
        decay_vectors: Whether biases and the scales of norms decay as well; they rarely should.
        schedule: ``one-cycle`` (up from a 25th along a cosine, then down to nearly nothing), ``cosine`` (the same,
            up along a line) or ``constant``.
        warmup: Share of the steps that go up; of ``one-cycle`` and ``cosine``.
    """

    kind: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decay_vectors: bool = False
    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    warmup: float = 0.2

    def __post_init__(self) -> None:
        if self.kind not in ("sgd", "adamw"):
            raise SlivoError(f"optimizer kind is {self.kind!r}; allowed: sgd, adamw")
        if self.schedule not in ("one-cycle", "cosine", "constant"):
            raise SlivoError(f"optimizer schedule is {self.schedule!r}; allowed: one-cycle, cosine, constant")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise SlivoError(f"optimizer lr is {self.lr}; it must be above 0")
        if not 0 <= self.momentum < 1:
            raise SlivoError(f"optimizer momentum is {self.momentum}; allowed: 0 up to, not including, 1")
        if not self.weight_decay >= 0:
            raise SlivoError(f"optimizer weight_decay is {self.weight_decay}; it must be 0 or above")
        if not 0 <= self.warmup < 1:
            raise SlivoError(f"optimizer warmup is {self.warmup}; a share of the steps, 0 up to, not including, 1")


def build(spec: OptimizerSpec, parameters: Iterable[Parameter], total_steps: int) -> tuple[Optimizer, LambdaLR]:
    """Make an optimizer over parameters, and its schedule, to be stepped once a step.

    Args:
        spec: What to make.
        parameters: What is trained; those that need no gradient are passed over, doubles count once.
        total_steps: Steps that the schedule spans.

    Returns:
        The optimizer and the schedule.

    Raises:
        SlivoError: If no parameter is to be trained.
    """
    trained = [parameter for parameter in dict.fromkeys(parameters) if parameter.requires_grad]
    if not trained:
        raise SlivoError("nothing to train: no parameter of the model requires a gradient; unfreeze some of it")
    weights = [parameter for parameter in trained if parameter.dim() > 1 or spec.decay_vectors]
    vectors = [parameter for parameter in trained if not (parameter.dim() > 1 or spec.decay_vectors)]
    groups = [
        {"params": members, "weight_decay": decay}
        for members, decay in ((weights, spec.weight_decay), (vectors, 0.0))
        if members
    ]
    optimizer: Optimizer
    if spec.kind == "sgd":
        optimizer = SGD(groups, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov and spec.momentum > 0)
    else:
        optimizer = AdamW(groups, lr=spec.lr)
    return optimizer, LambdaLR(optimizer, partial(lr_share, spec, total_steps=total_steps))


def lr_share(spec: OptimizerSpec, step: int, *, total_steps: int) -> float:
    """Return the share of the peak learning rate at a step.

    Args:
        spec: The schedule.
        step: From 0.
        total_steps: Steps that the schedule spans.

    Returns:
        A number from 1e-4 to 1.

    Source: Smith, Topin 2017, arXiv:1708.07120 (one cycle); Loshchilov, Hutter 2016, arXiv:1608.03983 (cosine).

    Example:
        >>> spec = OptimizerSpec(warmup=0.5)
        >>> [round(lr_share(spec, step, total_steps=4), 2) for step in range(5)]
        [0.04, 0.52, 1.0, 0.5, 0.0]
    """
    if spec.schedule == "constant":
        return 1.0
    rise = spec.warmup * total_steps
    if step < rise:
        share = step / rise
        return _between(1 / 25, 1.0, share if spec.schedule == "cosine" else _eased(share))
    return _between(1.0, 1e-4, _eased(min(1.0, (step - rise) / (total_steps - rise))))


def _eased(share: float) -> float:
    return (1 - math.cos(math.pi * share)) / 2


def _between(start: float, end: float, share: float) -> float:
    return start * (1 - share) + end * share
