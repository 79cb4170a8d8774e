"""Distillation: train a student on what a teacher says, by losses on logits, activations and relations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slivo.distill.adapt import adapted
from slivo.distill.cache import Cached, cached, fill
from slivo.distill.choice import Rank, rank_teachers
from slivo.distill.classes import ClassMap
from slivo.distill.committee import Committee, committee, learn_voices
from slivo.distill.low_rank import lora, lora_targets, merge_lora
from slivo.distill.objective import Distillation, distillation
from slivo.distill.pairs import Pair, Pairs, propose
from slivo.distill.peers import SelfTaught, labelled, mutual, self_taught
from slivo.distill.ranks import gathered
from slivo.distill.schedule import Ramp
from slivo.distill.sequence import (
    causal_language_model,
    check_vocabularies,
    continued,
    mask_tokens,
    masked_language_model,
    on_policy,
    shared_places,
    teacher_texts,
)
from slivo.distill.student import Inherited, inherit
from slivo.distill.taps import tap
from slivo.distill.teacher import doubt
from slivo.distill.terms import Term
from slivo.distill.trainers import LightningMixin, TrainerMixin
from slivo.distill.views import Views
from slivo.errors import ArtifactError
from slivo.graph.copies import duplicate
from slivo.measure import quality
from slivo.tasks import Task, forward, loader
from slivo.train import Hook, OptimizerSpec, Precision, fit
from slivo.train.hooks import TrainState

__all__ = [
    "Cached",
    "ClassMap",
    "Committee",
    "Distillation",
    "Inherited",
    "LightningMixin",
    "Pair",
    "Pairs",
    "Ramp",
    "Rank",
    "Result",
    "SelfTaught",
    "Term",
    "TrainerMixin",
    "Views",
    "adapted",
    "cached",
    "causal_language_model",
    "check_vocabularies",
    "committee",
    "continued",
    "distill",
    "distillation",
    "fill",
    "gathered",
    "inherit",
    "labelled",
    "learn_voices",
    "lora",
    "lora_targets",
    "mask_tokens",
    "masked_language_model",
    "merge_lora",
    "mutual",
    "on_policy",
    "propose",
    "rank_teachers",
    "self_taught",
    "shared_places",
    "tap",
    "teacher_texts",
]

# A tenth of the learning rate from scratch: the student starts from weights that are worth keeping.
_FINE_TUNING = OptimizerSpec(lr=0.01)


@dataclass(frozen=True)
class Result:
    """What a distillation gives.

    Attributes:
        model: The trained student, in evaluation mode; its edits are the student's.
        history: One row an epoch, as `slivo.train.fit` returns them.
    """

    model: nn.Module
    history: list[dict[str, Any]]


def distill(
    student: nn.Module,
    teacher: nn.Module | Cached,
    task: Task,
    losses: Sequence[Term],
    *,
    epochs: int,
    optimizer: OptimizerSpec = _FINE_TUNING,
    batch_size: int = 64,
    label_weight: float | Ramp = 0.1,
    class_map: ClassMap | None = None,
    seed: int = 0,
    hooks: Sequence[Hook] = (),
    checkpoint: Path | None = None,
    on_epoch: Callable[[Mapping[str, Any]], None] | None = None,
    precision: Precision = "auto",
    rollbacks: int = 0,
) -> Result:
    """Train a copy of the student to do as the teacher does.

    Args:
        student: The model to start from, on the device to train on; left untouched.
        teacher: The model to learn from; left untouched. Or one whose answers are kept on disk (`cached`), for a task
            whose training data are the same `Views`.
        task: Data, inputs, and the loss on labels.
        losses: What is compared; see `slivo.losses`. ``[slivo.losses.kd(weight=0.9)]`` is a good start.
        epochs: Passes over the training data.
        optimizer: Optimizer and schedule. A learning rate of 0.01 suits a student cut out of the teacher; 0.1 one
            that starts from random weights.
        batch_size: Samples in a batch. Relations between samples (``rkd_distance``, ``sp``) need 64 or more.
        label_weight: Weight of the task's own loss; with 0 the labels are not used.
        class_map: Which classes are shared, if student and teacher have different ones.
        seed: Of the data's order, the adapters, and everything random in the training.
        hooks: Hooks of the training, such as gradual pruning.
        checkpoint: A file that is written after each epoch and resumed from.
        on_epoch: Gets each row once its epoch is done.
        precision: As in `slivo.train.fit`.
        rollbacks: As in `slivo.train.fit`.

    Returns:
        The trained copy, and one row an epoch with each loss by name and the metrics on the validation data.

    Raises:
        RecipeError: If there are no losses, or an option is out of range.
        ShapeError: If the models do not fit each other; says what to map or adapt.
        SlivoError: If a path does not exist, or the teacher changed.
        ArtifactError: If the checkpoint is of another training, teacher or other losses.

    Example:
        >>> from slivo import losses
        >>> from slivo.tasks import classification
        >>> data = torch.utils.data.TensorDataset(torch.eye(4), torch.arange(4) % 2)
        >>> task = classification("eye", data, data, data, classes="ab", example_inputs=(torch.eye(4)[:2],))
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator ...>
        >>> result = distill(nn.Linear(4, 2), nn.Linear(4, 2), task, [losses.kd()], epochs=2)
        >>> list(result.history[-1]["terms"])
        ['labels', 'kd']
    """
    model = duplicate(student)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if isinstance(teacher, Cached):
        teacher = teacher.to(device)
    elif any(tensor.device != device for tensor in (*teacher.parameters(), *teacher.buffers())):
        teacher = duplicate(teacher).to(device)
    objective = distillation(
        teacher, partial(forward, task), task.loss, losses, label_weight=label_weight, class_map=class_map
    )
    with objective:
        with torch.random.fork_rng(devices=[]):
            batch = next(iter(loader(task, "train", batch_size=batch_size)))
            objective.prepare(model, pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch), seed=seed)
            if task.primary == "accuracy" and class_map is None:
                doubt(quality(objective.teacher, task, "val")["accuracy"], 1 / len(task.classes))
        history = fit(
            model,
            loader(task, "train", batch_size=batch_size, seed=seed),
            objective,
            epochs=epochs,
            optimizer=optimizer,
            hooks=[*hooks, _Lesson(objective)],
            validate=lambda model: quality(model, task, "val"),
            seed=seed,
            precision=precision,
            checkpoint=checkpoint,
            on_epoch=on_epoch,
            extra_parameters=objective.parameters(),
            rollbacks=rollbacks,
        )
    return Result(model, history)


class _Lesson(Hook):
    """Tells the objective how far the training is.

    Refuses to go on from a checkpoint of another teacher or other losses, which would make a mixture of both.
    """

    def __init__(self, objective: Distillation) -> None:
        self.objective = objective

    def on_step_start(self, state: TrainState) -> None:
        self.objective.progress = state.step / state.total_steps

    def state_dict(self) -> dict[str, Any]:
        # Adapters' parameters are the training's own; what else they keep, such as a queue, is no parameter.
        kept = {name: dict(made.named_buffers()) for name, made in self.objective.adapters.items()}
        return {**self.objective.lesson, "weights": dict(self.objective.weights), "kept": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in self.objective.lesson.items():
            if state.get(name) != value:
                raise ArtifactError(
                    f"the checkpoint belongs to another distillation ({name}: {value}, there {state.get(name)}); "
                    "remove it, or give another path"
                )
        self.objective.weights = dict(state["weights"])  # found when the training began
        for name, made in self.objective.adapters.items():
            for key, buffer in made.named_buffers():
                buffer.copy_(state["kept"][name][key])
