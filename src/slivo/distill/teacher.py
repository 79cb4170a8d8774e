"""The teacher: run without a trace on it, proved unchanged, and doubted where it knows nothing."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slivo.errors import SlivoError
from slivo.graph.capture import evaluating

_log = logging.getLogger("slivo")


class Source(Protocol):
    """What answers in a teacher's place, such as `slivo.distill.cache.Cached`."""

    model: nn.Module
    """The teacher itself."""

    @property
    def lesson(self) -> str:
        """What its answers depend on beside the teacher."""

    def outputs(self, forward: Callable[[nn.Module, Any], Any], batch: Any, paths: Sequence[str]) -> dict[str, Tensor]:
        """Return by path what the teacher's modules put out for a batch; its output is at the empty path."""


@contextmanager
def frozen(teacher: nn.Module) -> Iterator[nn.Module]:
    """Run a teacher in evaluation mode and without gradients, and leave it as it was.

    Without gradients alone its batch norms would still learn, and its dropout would blur what it teaches.

    Args:
        teacher: Any model; its modes come back afterwards, its ``requires_grad`` is not touched.

    Example:
        >>> net = nn.Dropout().train()
        >>> with frozen(net):
        ...     net(torch.ones(3))
        tensor([1., 1., 1.])
        >>> net.training
        True
    """
    with evaluating(teacher), torch.no_grad():
        yield teacher


def checksum(model: nn.Module) -> str:
    """Return a checksum of everything a model has learned: all parameters and buffers.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> before = checksum(net)
        >>> with torch.no_grad():
        ...     _ = net.bias.add_(1)
        >>> checksum(net) == before
        False
    """
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def verify(teacher: nn.Module, before: str) -> None:
    """Check that a teacher is what it was.

    Args:
        teacher: The teacher.
        before: Its `checksum` then.

    Raises:
        SlivoError: If its parameters or buffers changed.
    """
    if checksum(teacher) != before:
        raise SlivoError(
            f"the teacher ({type(teacher).__name__}) changed while it taught: does it share parameters with the "
            "student, or does its forward keep a state? Give a deep copy as the teacher"
        )


def doubt(score: float, chance: float, measure: str = "accuracy") -> bool:
    """Warn, through the logger ``slivo``, if a teacher is no better than guessing.

    Args:
        score: What the teacher reaches.
        chance: What guessing reaches, such as one over the number of classes.
        measure: Name of the score, for the message.

    Returns:
        Whether it warned.
    """
    # One third in single precision, as metrics give it, is more than one third.
    if score > chance + 1e-6:
        return False
    _log.warning(
        "the teacher's %s is %.3f, no better than chance (%.3f): it has nothing to teach. Is it trained, are its "
        "weights loaded, does it get its inputs as it was trained on them, are the classes in one order?",
        measure,
        score,
        chance,
    )
    return True


def same_preprocessing(student: nn.Module, teacher: nn.Module) -> bool:
    """Warn, through the logger ``slivo``, if two models say that they want their images normalized differently.

    Args:
        student: Models of timm say so, by ``pretrained_cfg``; others say nothing.
        teacher: The same.

    Returns:
        Whether nothing speaks against giving both the same images.

    Example:
        >>> same_preprocessing(nn.Linear(1, 1), nn.Linear(1, 1))
        True
    """
    said = [getattr(model, "pretrained_cfg", None) for model in (student, teacher)]
    for key in ("mean", "std"):
        ours, theirs = (tuple(each.get(key) or ()) if isinstance(each, Mapping) else () for each in said)
        if ours and theirs and ours != theirs:
            _log.warning(
                "the student wants its images normalized by %s %s and the teacher by %s; one of both sees other images "
                "than it was trained on. Give the teacher its own (teacher_forward=...)",
                key,
                ours,
                theirs,
            )
            return False
    return True
