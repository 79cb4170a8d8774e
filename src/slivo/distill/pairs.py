"""Pairs: which modules of a student and a teacher to compare, proposed from one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slivo.distill._maps import pooled
from slivo.distill._tensors import first_tensor, gram, kernel
from slivo.errors import RecipeError, SlivoError
from slivo.graph.capture import evaluating

_MOST = 48
"""Places of a model that are looked at; of more, so many evenly spaced ones."""

_COARSE = 8
"""Places along height and width on which alignment is measured; larger maps are pooled."""


@dataclass(frozen=True)
class Pair:
    """A module of the student and one of the teacher that say alike.

    Attributes:
        student: Path in the student.
        teacher: Path in the teacher.
        alignment: Linear centered kernel alignment of what they put out, 0 to 1.
        shapes: Of what they put out for one sample, student's and teacher's.
    """

    student: str
    teacher: str
    alignment: float
    shapes: tuple[tuple[int, ...], tuple[int, ...]]

    def __str__(self) -> str:
        """Say which modules, of which shapes, and how alike."""
        shapes = ("x".join(map(str, each)) for each in self.shapes)
        ours, theirs = shapes
        return f"{self.student} ({ours}) - {self.teacher} ({theirs}), alignment {self.alignment:.2f}"


class Pairs(tuple[Pair, ...]):
    """Proposed pairs, from the inputs to the outputs; as text a line each."""

    __slots__ = ()

    @property
    def at(self) -> dict[str, str]:
        """The pairs as losses take them: ``slivo.losses.hint(at=pairs.at)``."""
        return {pair.student: pair.teacher for pair in self}

    def __str__(self) -> str:
        """Say each pair on a line."""
        return "\n".join(map(str, self))


def propose(
    student: nn.Module,
    teacher: nn.Module,
    batch: Any,
    *,
    count: int = 4,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Pairs:
    """Propose modules to compare in a distillation: at like depths and resolutions, where both say alike.

    Both models run once. Places are what blocks put out (children of lists, and modules with modules inside). Of all
    ways to pair the student's places with the teacher's in order, that of the largest sum of alignments is found;
    pairs of other depth or resolution count less. Of these the last of each resolution are proposed, and then others
    between them.

    Args:
        student: Any model; left as it was.
        teacher: Any model; left as it was.
        batch: Inputs, as both models take them; 32 samples or more make the alignment mean something.
        count: How many pairs, at most.
        forward: ``(model, batch)`` to the output; None for ``model(batch)``, or ``model(*batch)`` of a tuple.

    Returns:
        The pairs, in order of depth; print them, and give ``pairs.at`` to losses. Where channels differ, losses such as
        ``hint`` make adapters; where resolutions do, they pool.

    Raises:
        RecipeError: If ``count`` is not 1 or more.
        SlivoError: If a model has no module that puts out a tensor with a batch.

    Source: Kornblith, Norouzi, Lee, Hinton 2019, "Similarity of Neural Network Representations Revisited",
    arXiv:1905.00414 (alignment); pairing in order is a longest common subsequence with weights.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> def net(depth):
        ...     return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(depth)))
        >>> found = propose(net(2), net(4), torch.randn(32, 4), count=2)
        >>> len(found), sorted(found.at)
        (2, ['0', '1'])
    """
    if count < 1:
        raise RecipeError(f"count is {count}; it must be 1 or more")
    ours, theirs = (_places(model, batch, forward or _called, count) for model in (student, teacher))
    for model, places, role in ((student, ours, "student"), (teacher, theirs, "teacher")):
        if not places:
            raise SlivoError(
                f"the {role} ({type(model).__name__}) has no module that puts out features of 2 samples or more"
            )
    kernels = [torch.stack([_kernel(each) for each in found.values()]) for found in (ours, theirs)]
    alike = gram(*kernels).double().cpu().numpy()
    near = [
        [_near(one, other, ((i + 1) / len(ours), (j + 1) / len(theirs))) for j, other in enumerate(theirs.values())]
        for i, one in enumerate(ours.values())
    ]
    chosen = _in_order(alike.clip(0, 1) * np.array(near))
    found = []
    for i, j in _spread(chosen, [each.shape[2:] for each in ours.values()], count):
        student_at, teacher_at = list(ours)[i], list(theirs)[j]
        shapes = tuple(ours[student_at].shape[1:]), tuple(theirs[teacher_at].shape[1:])
        found.append(Pair(student_at, teacher_at, float(alike[i, j]), shapes))
    return Pairs(found)


def _spread(chosen: Sequence[tuple[int, int]], resolutions: Sequence[torch.Size], count: int) -> list[tuple[int, int]]:
    """Return so many pairs: the last of each resolution, from the end; and others evenly between, if there is room."""
    last = {resolutions[pair[0]]: at for at, pair in enumerate(chosen)}
    taken = sorted(last.values())[-count:]
    rest = [at for at in range(len(chosen)) if at not in taken]
    room = min(count - len(taken), len(rest))
    taken += [rest[round(at)] for at in np.linspace(0, len(rest) - 1, room + 2)[1:-1]] if room else []
    return [chosen[at] for at in sorted(set(taken))]


def _called(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _places(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any], least: int) -> dict[str, Tensor]:
    """Return what blocks put out, in the order in which they end; of models with few, what layers do, too."""
    blocks = [name for name, module in model.named_modules() if name and next(module.children(), None) is not None]
    found = _outputs(model, blocks, batch, forward)
    if len(found) < least:
        layers = [
            name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
        ]
        found = _outputs(model, [*blocks, *(each for each in layers if each)], batch, forward)
    names = list(found)
    if len(names) > _MOST:
        names = [names[at] for at in np.linspace(0, len(names) - 1, _MOST).round().astype(int)]
    return {name: found[name] for name in names}


def _outputs(
    model: nn.Module, names: Sequence[str], batch: Any, forward: Callable[[nn.Module, Any], Any]
) -> dict[str, Tensor]:
    """Return the first tensor of what modules put out, of those that put out one with the batch."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None and tensor.dim() > 1 and tensor.is_floating_point():
                seen.pop(name, None)
                seen[name] = tensor.float().clone()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        with evaluating(model), torch.no_grad():
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    size = max((len(each) for each in seen.values()), default=0)
    return {name: each for name, each in seen.items() if len(each) == size > 1}


def _kernel(features: Tensor) -> Tensor:
    """Return what tells how alike two places are, by the means over a coarse grid."""
    if features.dim() == 4:
        features = pooled(features, [min(size, _COARSE) for size in features.shape[2:]])
    return kernel(features.flatten(1))


def _near(one: Tensor, other: Tensor, depths: tuple[float, float]) -> float:
    """Return how near two places are in depth and resolution, 0 to 1."""
    near = 1 - abs(depths[0] - depths[1])
    if one.dim() == other.dim() == 4:
        sizes = sorted((one.shape[-1] * one.shape[-2], other.shape[-1] * other.shape[-2]))
        near *= (sizes[0] / sizes[1]) ** 0.5
    return near


def _in_order(scores: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Return pairs of rows and columns, both ascending, of the largest sum of scores."""
    rows, columns = scores.shape
    best = np.zeros((rows + 1, columns + 1))
    for i in range(rows):
        for j in range(columns):
            best[i + 1, j + 1] = max(best[i, j + 1], best[i + 1, j], best[i, j] + scores[i, j])
    found, i, j = [], rows, columns
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            found.append((i, j))
    return found[::-1]
