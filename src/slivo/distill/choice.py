"""Choice: which of several teachers suits a student, told by short trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slivo.distill import logits
from slivo.distill._tensors import class_indices, logits_of, shape
from slivo.distill.teacher import frozen
from slivo.errors import RecipeError, ShapeError
from slivo.graph.capture import evaluating
from slivo.graph.copies import duplicate

_POWERS = [at / 2 for at in range(-4, 9)]
"""Of 2: temperatures that are tried, from a quarter to 16."""


@dataclass(frozen=True)
class Rank:
    """How a teacher did in a trial.

    Attributes:
        name: The teacher.
        score: What a student knows of held-out labels after the trial: minus its cross-entropy, in nats, at the
            temperature at which it is least (how sure it is can be mended afterwards), the mean over folds. The higher
            the better; differences matter, not the value.
        accuracy: Of the teacher itself, on the batch.
        entropy: Of what it says, in nats, at temperature 1: near 0 it says no more than labels do.
        gap: Divergence of the student from it after the trial, in nats: large if it asks for more than the student can.
    """

    name: str
    score: float
    accuracy: float
    entropy: float
    gap: float

    def __str__(self) -> str:
        """Say the score and what it comes from."""
        return (
            f"{self.name}: score {self.score:.3f} (accuracy {self.accuracy:.1%}, entropy {self.entropy:.2f} nats, the "
            f"student stays {self.gap:.2f} nats behind)"
        )


def rank_teachers(
    student: nn.Module,
    candidates: Mapping[str, nn.Module],
    batch: tuple[Any, Tensor],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    steps: int = 100,
    folds: int = 2,
    lr: float = 1e-2,
    temperature: float = 4.0,
    label_weight: float = 0.1,
    seed: int = 0,
) -> list[Rank]:
    """Rank teachers by what a student learns of each in a trial of seconds.

    The best teacher is not the one of highest accuracy: one that is too far ahead, or too sure of itself, teaches a
    small student less. For each teacher a copy of the student is distilled for a few steps on a part of the batch; what
    it then says of the labels of the rest is the score. All trials have the same batches, steps and dropout.

    Args:
        student: The model to be trained; left untouched.
        candidates: Teachers by name, of the student's classes, on its device; left untouched.
        batch: ``(inputs, labels)``: as many labelled samples as there are, a thousand or more; best not those on which
            the teachers were trained longest.
        forward: ``(model, inputs)`` to the output; None for ``model(inputs)``.
        steps: Of each trial, with half of a fold's training samples each.
        folds: Parts of the batch, each of which is held out once.
        lr: Learning rate of the trial (AdamW).
        temperature: Of the distillation.
        label_weight: Weight of the labels' own loss, as for `slivo.distill.distill`.
        seed: Of the folds and the order of samples.

    Returns:
        The teachers, best first, each with what its score comes from.

    Raises:
        RecipeError: If there are no candidates, or an option is out of range.
        ShapeError: If there are fewer than two samples a fold, or the classes differ.

    Source: Mirzadeh et al. 2020, "Improved Knowledge Distillation via Teacher Assistant", arXiv:1902.03393, and Cho,
    Hariharan 2019, "On the Efficacy of Knowledge Distillation", arXiv:1910.01348 (better teachers are not better
    teachers of small students); the trial is ours.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(64, 2), torch.arange(64) % 2
        >>> x[:, 0] += 4.0 * y
        >>> good = nn.Linear(2, 2)
        >>> with torch.no_grad():
        ...     _ = good.weight.copy_(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]))
        ...     _ = good.bias.copy_(torch.tensor([4.0, -4.0]))
        >>> found = rank_teachers(nn.Linear(2, 2), {"noise": nn.Linear(2, 2), "good": good}, (x, y), lr=0.05)
        >>> [each.name for each in found]
        ['good', 'noise']
    """
    if not candidates or steps < 1 or folds < 2:
        raise RecipeError(
            f"there are {len(candidates)} candidates, {steps} steps and {folds} folds; allowed: 1, 1 and 2 or more"
        )
    inputs, labels = batch
    if len(labels) < 2 * folds:
        raise ShapeError(f"there are {len(labels)} samples for {folds} folds; give 2 for each, better hundreds")
    run = forward or (lambda model, given: model(given))
    setting = _Setting(student, inputs, run, steps, lr, temperature, label_weight)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    parts = [order[at::folds] for at in range(folds)]
    ranks = []
    for name, teacher in candidates.items():
        with frozen(teacher):
            told = logits_of(run(teacher, inputs)).float()
        right = class_indices(labels, told.shape[-1])
        trials = [_trial(setting, told, right, held, seed + at) for at, held in enumerate(parts)]
        scores, gaps = zip(*trials, strict=True)
        entropy = -(told.softmax(-1) * told.log_softmax(-1)).nan_to_num(0.0).sum(-1).mean()
        accuracy = (told.argmax(-1) == right).double().mean()
        ranks.append(Rank(name, sum(scores) / folds, float(accuracy), float(entropy), sum(gaps) / folds))
    return sorted(ranks, key=lambda rank: -rank.score)


@dataclass(frozen=True)
class _Setting:
    """What all trials share."""

    student: nn.Module
    inputs: Any
    run: Callable[[nn.Module, Any], Any]
    steps: int
    lr: float
    temperature: float
    label_weight: float


def _trial(setting: _Setting, told: Tensor, labels: Tensor, held: Tensor, seed: int) -> tuple[float, float]:
    """Return minus the cross-entropy of a trained copy on what was held out, and how far it is behind the teacher."""
    model, run = duplicate(setting.student).train(), setting.run
    whole = torch.arange(len(labels), device=labels.device)
    seen = whole[~torch.isin(whole, held)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr)
    size = max(2, len(seen) // 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(setting.steps):
            chosen = seen[torch.randperm(len(seen))[:size].to(seen.device)]
            said = logits_of(run(model, _rows(setting.inputs, chosen))).float()
            if said.shape[-1] != told.shape[-1]:
                raise ShapeError(f"the student has logits {shape(said)} and the teacher {shape(told)}; they must agree")
            taught = logits.kd(said, told[chosen], temperature=setting.temperature)
            share = setting.label_weight
            optimizer.zero_grad()
            torch.autograd.backward((1 - share) * taught + share * F.cross_entropy(said, labels[chosen]))
            optimizer.step()
    with evaluating(model), torch.no_grad():
        said = logits_of(run(model, _rows(setting.inputs, held))).float()
    surest = min(float(F.cross_entropy(said / 2**power, labels[held])) for power in _POWERS)
    return -surest, float(logits.kd(said, told[held], temperature=1.0))


def _rows(inputs: Any, chosen: Tensor) -> Any:
    """Return chosen samples of inputs in any containers."""
    if isinstance(inputs, Tensor):
        return inputs[chosen]
    if isinstance(inputs, Mapping):
        return {name: _rows(each, chosen) for name, each in inputs.items()}
    return tuple(_rows(each, chosen) for each in inputs) if isinstance(inputs, tuple | list) else inputs
