"""Balance: how much each term of a loss moves the student, told by the lengths of their gradients."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

_log = logging.getLogger("slivo")

_LITTLE = 0.01


def gradient_norms(parts: Mapping[str, Tensor], student: nn.Module) -> dict[str, float]:
    """Return the length of each part's gradient over all parameters of the student that are trained; 0 if it has none.

    Args:
        parts: Scalars by name.
        student: The model; its ``grad`` are left as they are.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> gradient_norms({"a": 3 * net.weight.sum(), "b": torch.zeros(())}, net)
        {'a': 3.0, 'b': 0.0}
    """
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    norms = {}
    for name, part in parts.items():
        found: Iterable[Tensor | None] = ()
        if part.requires_grad and trained:
            found = torch.autograd.grad(part, trained, retain_graph=True, allow_unused=True)
        squares = [float(each.double().square().sum()) for each in found if each is not None]
        norms[name] = sum(squares) ** 0.5
    return norms


def warn(shares: Mapping[str, float]) -> list[str]:
    """Warn, through the logger ``slivo``, of terms that do next to nothing, or all.

    Args:
        shares: Lengths of the gradients of all weighted terms, by name.

    Returns:
        Names of the terms that were warned of.
    """
    total = sum(shares.values())
    if len(shares) < 2 or total == 0:
        return []
    little = [name for name, value in shares.items() if value < _LITTLE * total]
    for name in little:
        _log.warning(
            "the loss %s has %.2g %% of the gradient when the training begins, and teaches next to nothing beside %s; "
            "change the weights (weight='auto' finds one), or leave it out",
            name,
            100 * shares[name] / total,
            max(shares, key=lambda each: shares[each]),
        )
    return little
