"""Trainers: distillation in the loops of other libraries, which this module does not import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slivo.distill.objective import Distillation
from slivo.errors import SlivoError


class TrainerMixin:
    """Has a `transformers.Trainer`, or one derived from it, train a student by a distillation.

    Put it before the trainer: ``class Distiller(TrainerMixin, Trainer): pass``, and give ``distillation=``, an
    objective of `slivo.distill.distillation` that was prepared on the student. While the model trains, its loss is the
    sum of the terms; evaluation is the trainer's own. Adapters are trained along, without weight decay, and ramps go
    by the trainer's steps. The mean of each term since the last log is logged.

    Args:
        distillation: The objective. Its forward is called with what the trainer gives the model, a mapping.

    Raises:
        SlivoError: If the training runs in several processes.

    Example:
        >>> class Plain:  # in the place of transformers.Trainer
        ...     def __init__(self, model):
        ...         self.model = model
        >>> class Distiller(TrainerMixin, Plain):
        ...     pass
        >>> from slivo.distill import distillation
        >>> from slivo import losses
        >>> student, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> def forward(model, batch):
        ...     return model(batch["x"])
        >>> made = distillation(teacher, forward, lambda out, _: out.sum(), [losses.kd()])
        >>> Distiller(student, distillation=made).distillation is made
        True
    """

    # What `compute_loss` gives is the mean over a batch, which the trainer is to divide by the batches it adds up.
    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, distillation: Distillation, **kwargs: Any) -> None:
        self.distillation = distillation
        self._sums: dict[str, float] = {}
        self._counted = 0
        self.state: Any = None
        super().__init__(*args, **kwargs)
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False  # as older trainers say it

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the trainer's optimizer, and have it train the adapters along."""
        parent: Any = super()
        optimizer: torch.optim.Optimizer = parent.create_optimizer(*args, **kwargs)
        known = {id(each) for group in optimizer.param_groups for each in group["params"]}
        more = [each for each in self.distillation.parameters() if id(each) not in known]
        if more:
            optimizer.add_param_group({"params": more, "weight_decay": 0.0})
        return optimizer

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the sum of the distillation's terms in training, and what the trainer says otherwise."""
        if return_outputs or not model.training:
            parent: Any = super()
            return parent.compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise SlivoError("a distillation runs in one process, on one device; start it without a launcher")
        self.distillation.progress = min(self.state.global_step / max(self.state.max_steps, 1), 1.0)
        parts = self.distillation(model, inputs)
        for name, part in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(part.detach())
        self._counted += 1
        total: Tensor = torch.stack([part.float() for part in parts.values()]).sum()
        return total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the means of the terms since they were logged last."""
        if self._counted and "loss" in logs:
            logs = {**logs, **{f"loss_{name}": value / self._counted for name, value in self._sums.items()}}
            self._sums, self._counted = {}, 0
        parent: Any = super()
        parent.log(logs, *args, **kwargs)
