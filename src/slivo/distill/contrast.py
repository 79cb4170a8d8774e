"""Losses that tell a sample from others, by their embeddings. One function each; the name in recipes is the function's.

An activation is (batch, features), (batch, tokens, features) or (batch, channels, *space); maps and tokens are averaged
over their places. The others are those of the batch, and what the adapter remembers of batches before: a queue of a
fixed number of the teacher's embeddings, not of the size of the data set. Each call puts those of its batch in front,
while the adapter is in training mode; there is nothing else that a call changes. All losses are scalar, computed in
float32 at least, let no gradient flow into the teacher, and are means over the samples; without samples they are 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slivo.distill._maps import average, exact
from slivo.distill._probabilities import kl
from slivo.distill._tensors import gram, nothing, positive, same_batch, unit, widen
from slivo.distill.adapt import adapted, channels
from slivo.errors import RecipeError


class _Embedding(nn.Module):
    """What makes embeddings of both activations, and a queue of the teacher's.

    Attributes:
        ours: From the student's features.
        theirs: From the teacher's.
        queue: Embeddings of length 1, the newest first; rows of 0 are yet to be filled.
    """

    queue: Tensor

    def __init__(self, ours: nn.Module, theirs: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.ours, self.theirs = ours, theirs
        self.register_buffer("queue", torch.zeros(size))

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return both as embeddings of length 1."""
        return unit(self.ours(average(student))), unit(self.theirs(average(teacher)))

    @torch.no_grad()
    def remember(self, embeddings: Tensor) -> None:
        """Put embeddings of the teacher in front of the queue, while training."""
        if self.training and len(self.queue):
            # A new tensor: the old one may be needed by a backward pass that is still to come.
            self.queue = torch.cat([embeddings.to(self.queue.dtype), self.queue])[: len(self.queue)]


def _projections(student: Tensor, teacher: Tensor, *, features: int, queue: int) -> nn.Module:
    _counts(features=features, queue=queue)
    ours, theirs = (nn.Linear(channels(each), features) for each in (student, teacher))
    return _Embedding(ours, theirs, (queue, features)).to(widen(student, teacher)[0].dtype)


def _into_teachers(student: Tensor, teacher: Tensor, *, queue: int) -> nn.Module:
    _counts(features=1, queue=queue)
    sizes = channels(student), channels(teacher)
    ours = nn.Identity() if sizes[0] == sizes[1] else nn.Linear(*sizes)
    return _Embedding(ours, nn.Identity(), (queue, sizes[1])).to(widen(student, teacher)[0].dtype)


@adapted(_projections)
def crd(
    student: Tensor,
    teacher: Tensor,
    adapter: _Embedding,
    *,
    temperature: float = 0.07,
    features: int = 128,
    queue: int = 0,
) -> Tensor:
    """Cross-entropy of finding the teacher's embedding of a sample by the student's among others, and the reverse.

    A lower bound of the mutual information of both. Tap the last activation before the classifier.

    Args:
        student: Activations.
        teacher: Activations; all but the batch may differ.
        adapter: A linear layer from either to ``features``, both trained along, and the queue. `distillation` makes it.
        temperature: τ > 0 that cosines are divided by.
        features: Length of the embeddings.
        queue: How many of the teacher's embeddings of batches before are told apart, too; 0 for those of the batch
            alone, which is enough for batches of 64 and more.

    Returns:
        Scalar, the mean over samples of −(log softmax(s_i · t_j / τ)_i + log softmax(t_i · s_j / τ)_i) / 2, where j
        runs over the batch, and for the student's side over the queue as well. The paper has a memory of two
        embeddings of every sample of the data set, and estimates the softmax by noise contrast.

    Raises:
        ShapeError: If the batches differ.

    Source: Tian, Krishnan, Isola 2019, "Contrastive Representation Distillation", arXiv:1910.10699, section 3; the
    softmax over the batch as in van den Oord, Li, Vinyals 2018, "Representation Learning with Contrastive Predictive
    Coding", arXiv:1807.03748, section 2.

    Example:
        >>> from slivo import losses
        >>> losses.crd(at="avgpool", queue=1024).params
        {'queue': 1024}
    """
    positive("temperature", temperature)
    _counts(features=features, queue=queue)
    same_batch(student, teacher, least=2)
    if not len(student):
        return nothing(student)
    ours, theirs, remembered = _embedded(student, teacher, adapter)
    right = torch.arange(len(ours), device=ours.device)
    forth = _logits(ours, torch.cat([theirs, remembered]), temperature)
    back = _logits(theirs, ours, temperature)
    adapter.remember(theirs)
    return (F.cross_entropy(forth, right) + F.cross_entropy(back, right)) / 2


@adapted(_into_teachers)
def queue_kl(
    student: Tensor, teacher: Tensor, adapter: _Embedding, *, temperature: float = 0.04, queue: int = 4096
) -> Tensor:
    """Kullback-Leibler divergence of how alike a sample is to many others, teacher to student: needs no labels.

    Args:
        student: Activations.
        teacher: Activations; all but the batch may differ.
        adapter: A linear layer from the student's features to the teacher's, where they differ in number, and the
            queue. `distillation` makes it.
        temperature: τ > 0 that cosines are divided by.
        queue: How many of the teacher's embeddings of batches before are compared with, beside those of the batch.

    Returns:
        Scalar, KL(softmax(t Aᵀ / τ) ‖ softmax(s Aᵀ / τ)), the mean over samples, where the rows of A are the teacher's
        embeddings of the batch and of the queue, all of length 1.

    Raises:
        ShapeError: If the batches differ.

    Source: Fang, Wang, Wang, Zhang, Yang, Liu 2021, "SEED: Self-supervised Distillation For Visual Representation",
    arXiv:2101.04731, section 3, with the one temperature of Abbasi Koohpayegani, Tejankar, Pirsiavash 2020, "CompRess:
    Self-Supervised Learning by Compressing Representations", arXiv:2010.14713, section 3.

    Example:
        >>> from slivo import losses
        >>> losses.queue_kl(at="avgpool").supplied
        ('adapter',)
    """
    positive("temperature", temperature)
    _counts(features=1, queue=queue)
    same_batch(student, teacher, least=2)
    if not len(student):
        return nothing(student)
    ours, theirs, remembered = _embedded(student, teacher, adapter)
    anchors = torch.cat([theirs, remembered])
    log_t, log_s = (_logits(each, anchors, temperature).log_softmax(-1) for each in (theirs, ours))
    adapter.remember(theirs)
    return kl(log_t, log_s).mean()


def _embedded(student: Tensor, teacher: Tensor, adapter: _Embedding) -> tuple[Tensor, Tensor, Tensor]:
    """Return the embeddings of both, and those of the teacher that are remembered."""
    student, teacher = widen(student, teacher)
    with exact(student):
        ours, theirs = adapter(student, teacher)
    remembered = adapter.queue.to(theirs.dtype)
    return ours, theirs, remembered[remembered.ne(0).any(-1)]


def _logits(rows: Tensor, others: Tensor, temperature: float) -> Tensor:
    return gram(rows, others) / temperature


def _counts(*, features: int, queue: int) -> None:
    if features < 1 or queue < 0:
        raise RecipeError(f"features is {features} and queue {queue}; features must be 1 or more and queue 0 or more")
