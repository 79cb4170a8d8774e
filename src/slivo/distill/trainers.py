"""Trainers: distillation in the loops of other libraries, which this module does not import."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slivo.distill.objective import Distillation
from slivo.errors import ArtifactError, SlivoError


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


class LightningMixin:
    """Has a ``LightningModule`` of Lightning learn by a distillation.

    Put it before the module: ``class Distiller(LightningMixin, Mine): pass``, and give ``distillation=``, an objective
    of `slivo.distill.distillation` whose forward is called with the module and what its training step is given. The
    training step is then the sum of the terms, which are logged as ``loss_kd`` and so on; validation and all else is
    the module's own. When the optimizers are made, the teacher is moved to the module's device, and adapters and
    weights are made and found on the first batch unless `Distillation.prepare` did so before; adapters are trained
    along by the first group of the first optimizer. Ramps go by the trainer's steps. At the end the teacher is proved
    unchanged.

    A checkpoint has the student's tensors, as the module alone loads them, beside them adapters and the weights that
    were found, and nothing of the teacher. A fit goes on from it (``ckpt_path=``) only with the same lesson.

    Args:
        distillation: The objective. It stays out of the module's hyperparameters.

    Raises:
        SlivoError: If the training runs in several processes, or the module optimizes by hand.
        ArtifactError: If a fit is to go on from a checkpoint of another teacher or other losses.

    Example:
        >>> class Mine(nn.Linear):  # in the place of a LightningModule
        ...     pass
        >>> class Distiller(LightningMixin, Mine):
        ...     pass
        >>> from slivo import losses
        >>> from slivo.distill import distillation
        >>> def forward(model, batch):
        ...     return model(batch[0])
        >>> made = distillation(nn.Linear(2, 3), forward, lambda out, _: out.sum(), [losses.kd()])
        >>> student = Distiller(2, 3, distillation=made)
        >>> list(student.state_dict())
        ['weight', 'bias']
    """

    def __init__(self, *args: Any, distillation: Distillation, **kwargs: Any) -> None:
        _parent(self).__init__(*args, **kwargs)
        self.distillation = distillation
        self._stored: Mapping[str, Any] | None = None

    def configure_optimizers(self) -> Any:
        """Make the module's optimizers, and have the first train the adapters along."""
        module: Any = self
        if not module.automatic_optimization:
            raise SlivoError(
                f"{type(self).__name__} optimizes by hand (automatic_optimization is False), so that its training step "
                "cannot be another; call the distillation in it, and sum up its terms"
            )
        if module.trainer.world_size > 1:
            raise SlivoError("a distillation runs in one process, on one device; give the trainer devices=1")
        # If the module is compiled, so is this step, which logs; its forward alone is enough.
        vars(self).pop("training_step", None)
        self._prepare()
        made = _parent(self).configure_optimizers()
        optimizers = list(_optimizers(made))
        known = {id(each) for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]}
        for optimizer in optimizers[:1]:
            # Schedules keep a number for each group, and know of none that is added.
            group = optimizer.param_groups[0]
            group["params"].extend(each for each in self.distillation.parameters() if id(each) not in known)
        return made

    def training_step(self, batch: Any, *_: Any, **__: Any) -> Tensor:
        """Return the sum of the distillation's terms."""
        module: Any = self
        self.distillation.progress = min(module.trainer.global_step / max(self._steps(), 1), 1.0)
        parts = self.distillation(module, batch)
        module.log_dict({f"loss_{name}": part.detach() for name, part in parts.items()})
        total: Tensor = torch.stack([part.float() for part in parts.values()]).sum()
        return total

    def on_fit_end(self) -> None:
        """Check that the teacher has not changed."""
        _parent(self).on_fit_end()
        self.distillation.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep adapters, the weights that were found, and what is taught."""
        _parent(self).on_save_checkpoint(checkpoint)
        made = self.distillation
        checkpoint[_KEPT] = {
            "lesson": made.lesson,
            "weights": dict(made.weights),
            "adapters": {name: dict(each.state_dict()) for name, each in made.adapters.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is to be restored when a fit begins, once there are adapters to restore it into."""
        _parent(self).on_load_checkpoint(checkpoint)
        self._stored = checkpoint.get(_KEPT)

    def _steps(self) -> float:
        module: Any = self
        return float(module.trainer.estimated_stepping_batches)

    def _prepare(self) -> None:
        """Have the objective ready on the module's device, as a checkpoint left it if there is one."""
        module: Any = self
        made = self.distillation
        made.teacher.to(module.device)
        if not (made.adapters or made.weights) and any(
            term.weight == "auto" or "adapter" in term.supplied for term in made.terms
        ):
            self._steps()  # the trainer gets its data
            with torch.random.fork_rng(devices=[]):
                batch = next(iter(module.trainer.train_dataloader))
            made.prepare(module, module.trainer.strategy.batch_to_device(batch))
        for each in made.adapters.values():
            each.to(module.device)
        if self._stored is not None:
            _restore(made, self._stored)
            self._stored = None


def _parent(module: LightningMixin) -> Any:
    """Return what ``super()`` would, by which `save_hyperparameters` would know an ``__init__`` of the module's own.

    It would keep the arguments, and with them the teacher, in each checkpoint.
    """
    return super(LightningMixin, module)


_KEPT = "slivo_distillation"
"""Under what a checkpoint of Lightning keeps what the student's tensors do not say."""


def _restore(made: Distillation, stored: Mapping[str, Any]) -> None:
    for name, value in made.lesson.items():
        there = stored["lesson"].get(name)
        if there != value:
            raise ArtifactError(
                f"the checkpoint belongs to another distillation ({name}: {value}, there {there}); give the trainer "
                "another ckpt_path, or none"
            )
    made.weights = dict(stored["weights"])  # found when the training began
    for name, each in made.adapters.items():
        each.load_state_dict(stored["adapters"][name])


def _optimizers(made: Any) -> Iterator[torch.optim.Optimizer]:
    """Find the optimizers in what a LightningModule gives: one, several, or with schedules in mappings or beside."""
    if isinstance(made, torch.optim.Optimizer):
        yield made
    elif isinstance(made, Mapping):
        yield from _optimizers(made.get("optimizer"))
    elif isinstance(made, list | tuple):
        for each in made:
            yield from _optimizers(each)
