"""Several teachers: a committee that speaks with one voice, and a chain in which each learns from the one before."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slivo.distill._tensors import class_indices, classes_last, first_tensor, positive, shape
from slivo.errors import RecipeError, ShapeError
from slivo.graph.capture import evaluating

_log = logging.getLogger("slivo")

Voices = Literal["equal", "confidence"] | Sequence[float]


class Committee(nn.Module):
    """Teachers whose probabilities are averaged; itself a teacher, as `committee` makes it.

    Attributes:
        teachers: The members. Their modules are tapped as ``teachers.0.layer1``.
        shares: What each member's word counts, shape (teachers,), of sum 1.
        confident: Whether the surer members of each sample count for more.
        temperature: At which probabilities are averaged.
        class_dim: Which dimension of the members' outputs holds the classes; None for the last of up to three.
    """

    shares: Tensor
    confident: Tensor
    temperature: Tensor

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        shares: Tensor,
        *,
        confident: bool,
        temperature: float,
        class_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.class_dim = class_dim
        self.teachers = nn.ModuleList(teachers)
        self.register_buffer("shares", shares)
        # Buffers, all of it: what is said hangs on them as on weights.
        self.register_buffer("confident", torch.tensor(confident))
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return logits, of the members' shape: T log Σ wᵢ softmax(zᵢ / T)."""
        voices = self.log_probabilities(*args, **kwargs)
        said = self.temperature * torch.logsumexp(self._weights(voices) + voices, dim=0)
        return said if self.class_dim is None else said.movedim(-1, self.class_dim)

    def log_probabilities(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the logarithm of each member's softened probabilities, shape (teachers, batch, ..., classes)."""
        found = [first_tensor(teacher(*args, **kwargs)) for teacher in self.teachers]
        logits = [each for each in found if each is not None]
        if len(logits) < len(found) or len({each.shape for each in logits}) > 1:
            said = ", ".join("no tensor" if each is None else shape(each) for each in found)
            raise ShapeError(f"the teachers of a committee give out {said}; they must have the same classes")
        last = [classes_last(each, self.class_dim) for each in logits]
        return torch.stack([F.log_softmax(each.float() / self.temperature, dim=-1) for each in last])

    def _weights(self, voices: Tensor) -> Tensor:
        """Return the logarithms of what each member's word counts, to be added to `voices`."""
        shares = self.shares.log().reshape(-1, *[1] * (voices.dim() - 1))
        if not self.confident:
            return shares
        entropies = -(voices.exp() * voices).nan_to_num(0.0).sum(-1, keepdim=True)
        return F.log_softmax(shares - entropies, dim=0)


def committee(
    teachers: Sequence[nn.Module],
    voices: Voices = "equal",
    *,
    temperature: float = 4.0,
    class_dim: int | None = None,
) -> Committee:
    """Make one teacher of several, whose probabilities are averaged.

    A student that is to minimize the mean of the divergences from all of them is to say the mean of their
    probabilities: gradients are the same. Averaging their logits instead would teach what none of them says.

    Args:
        teachers: Models of the same classes in the same order; run in evaluation mode by `distillation`.
        voices: What each counts: ``equal``; numbers of any sum; or ``confidence``, by which for each sample the
            members weigh as e to the power of minus the entropy of what they say. `learn_voices` finds numbers.
        temperature: At which probabilities are averaged; that of the loss, with which it then is exact.
        class_dim: Which dimension of the members' outputs holds the classes: 1 for (batch, classes, height, width).
            None for the last; of outputs of more than three dimensions it must be said.

    Returns:
        A module with the inputs of the teachers, whose output is logits: T log Σ wᵢ softmax(zᵢ / T).

    Raises:
        RecipeError: If there are no teachers, or voices or temperature make no sense.

    Source: You, Xu, Xu, Tao 2017, "Learning from Multiple Teacher Networks", KDD (averaged probabilities); Kwon, Na,
    Lee, Kim 2020, "Adaptive Knowledge Distillation Based on Entropy", ICASSP (confidence).

    Example:
        >>> one, other = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> both, x = committee([one, other], temperature=1.0), torch.ones(1, 3)
        >>> mean = (one(x).softmax(-1) + other(x).softmax(-1)) / 2
        >>> torch.allclose(both(x).softmax(-1), mean)
        True
    """
    if not teachers:
        raise RecipeError("a committee has no teachers; give one or more")
    positive("temperature", temperature)
    numbers = [1.0] * len(teachers) if isinstance(voices, str) else [float(each) for each in voices]
    if isinstance(voices, str) and voices not in ("equal", "confidence"):
        raise RecipeError(f"voices is {voices!r}; allowed: equal, confidence, or {len(teachers)} numbers")
    if (
        len(numbers) != len(teachers)
        or not all(math.isfinite(each) and each >= 0 for each in numbers)
        or not any(numbers)
    ):
        raise RecipeError(
            f"voices is {voices}; there must be {len(teachers)} numbers, none below 0 and not all of them 0"
        )
    shares = torch.tensor(numbers) / sum(numbers)
    return Committee(teachers, shares, confident=voices == "confidence", temperature=temperature, class_dim=class_dim)


def learn_voices(
    members: Committee,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any],
    labels: Callable[[Any], Tensor],
    *,
    rounds: int = 200,
) -> Committee:
    """Find what each member's word should count: the mixture under which labels that none was trained on are likeliest.

    Args:
        members: The committee; left as it was.
        batches: Labelled data, held out; a few hundred samples.
        forward: ``(model, batch)`` to the model's output.
        labels: Class labels of a batch.
        rounds: Of expectation maximization, each of which makes the labels likelier.

    Returns:
        A committee of the same members. Its voices are numbers; it is not confident.

    Raises:
        RecipeError: If there are no labels.

    The likelihood Π Σ wᵢ pᵢ(y) is concave in w; each round sets wᵢ to the mean of wᵢ pᵢ(y) / Σ wⱼ pⱼ(y). Probabilities
    are at temperature 1.

    Source: Jordan, Jacobs 1994, "Hierarchical mixtures of experts and the EM algorithm", Neural Computation 6(2).
    """
    found = []
    with evaluating(members), torch.no_grad():
        for batch in batches:
            said: list[Tensor] = []
            for teacher in members.teachers:
                logits = first_tensor(forward(teacher, batch))
                if logits is None:
                    raise ShapeError("a teacher of the committee gives out no tensor")
                logits = classes_last(logits, members.class_dim)
                right = class_indices(labels(batch), logits.shape[-1])
                said.append(F.log_softmax(logits.float(), dim=-1).gather(-1, right[..., None]).flatten())
            found.append(torch.stack(said))
    if not found:
        raise RecipeError("there are no batches to learn the voices of a committee from")
    likely = torch.cat(found, dim=1).double()
    shares = torch.full((len(likely), 1), 1 / len(likely), dtype=torch.float64, device=likely.device)
    for _ in range(rounds):
        shares = F.softmax(shares.log() + likely, dim=0).mean(1, keepdim=True)
    shares = shares.flatten().to(members.shares)
    _log.info("voices of the committee: %s", ", ".join(f"{share:.3f}" for share in shares))
    temperature, class_dim = float(members.temperature), members.class_dim
    return Committee(list(members.teachers), shares, confident=False, temperature=temperature, class_dim=class_dim)
