"""Which classes student and teacher share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from slivo.distill._tensors import class_indices, shape
from slivo.errors import ShapeError

Unmapped = Literal["left out", "other"]


@dataclass(frozen=True)
class ClassMap:
    """Where the student's classes are among the teacher's, for a subset, a superset, another order, or coarser classes.

    What the student has for itself it learns from the labels alone. Several classes of the teacher that are one of the
    student's have the sum of their probabilities; a temperature softens that sum.

    Attributes:
        teacher: For each class of the student the teacher's index of it, several indices, or None where the teacher
            does not know it.
        unmapped: What becomes of classes that only one of both has. ``"left out"`` compares the others alone, on which
            probabilities are renormalized. ``"other"`` takes all of the student's for one more class, the last, and all
            of the teacher's for the same: probabilities stay as they are.

    Example:
        >>> shared = ClassMap((2, None, 0))
        >>> student, teacher = shared.logits(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 20.0, 30.0]]))
        >>> student.tolist(), teacher.tolist()
        ([[1.0, 3.0]], [[30.0, 10.0]])
        >>> _, teacher = ClassMap(((0, 1), 2)).logits(torch.zeros(1, 2), torch.tensor([[0.5, 0.3, 0.2]]).log())
        >>> [round(share, 6) for share in teacher.exp()[0].tolist()]
        [0.8, 0.2]
    """

    teacher: tuple[int | tuple[int, ...] | None, ...]
    unmapped: Unmapped = "left out"

    def __post_init__(self) -> None:
        given = tuple(tuple(each) if isinstance(each, list | tuple) else each for each in self.teacher)
        object.__setattr__(self, "teacher", given)
        if self.unmapped not in get_args(Unmapped):
            raise ShapeError(f"unmapped is {self.unmapped!r}; it must be 'left out' or 'other'")
        shared, least = [index for group in self._groups for index in group], 1 if self.unmapped == "other" else 2
        wrong = any(isinstance(index, bool) or not isinstance(index, int) or index < 0 for index in shared)
        if wrong or len(self._groups) < least or () in given or len(set(shared)) != len(shared):
            raise ShapeError(
                f"class map {list(given)} must give {'one' if least == 1 else 'two'} or more different classes of the "
                "teacher (integers from 0, several in a list), and None for classes that it does not know"
            )
        if self.unmapped == "other" and None not in given:
            raise ShapeError(
                f"class map {list(given)} leaves the student no class that could stand for others; use 'left out'"
            )

    @classmethod
    def by_name(
        cls,
        student: Sequence[str],
        teacher: Sequence[str],
        *,
        merged: Mapping[str, Sequence[str]] | None = None,
        unmapped: Unmapped = "left out",
    ) -> ClassMap:
        """Return the map between two lists of class names, in the order of the logits.

        Args:
            student: The student's classes.
            teacher: The teacher's.
            merged: By a class of the student the teacher's classes that it comprises; None where names are the same.
            unmapped: What becomes of the others.

        Raises:
            ShapeError: If a name stands twice in a list, fewer than two are in both, or one that is merged is in none.

        Example:
            >>> ClassMap.by_name(["cat", "dog", "owl"], ["dog", "eel", "cat"])
            ClassMap(teacher=(2, 0, None), unmapped='left out')
            >>> ClassMap.by_name(["pet", "owl"], ["dog", "owl", "cat"], merged={"pet": ["cat", "dog"]}).teacher
            ((2, 0), 1)
        """
        merged = merged or {}
        for role, given in (("student", student), ("teacher", teacher)):
            twice = [name for index, name in enumerate(given) if name in given[:index]]
            if twice:
                raise ShapeError(f"the {role} has two classes named {twice[0]!r}; give the map by indices")
        places = {name: index for index, name in enumerate(teacher)}
        for role, known, named in (
            ("student", set(student), list(merged)),
            ("teacher", set(teacher), [name for group in merged.values() for name in group]),
        ):
            missing = [name for name in named if name not in known]
            if missing:
                raise ShapeError(f"merged names {missing[0]!r}, which is no class of the {role}")
        found = (tuple(places[one] for one in merged[name]) if name in merged else places.get(name) for name in student)
        return cls(tuple(found), unmapped)

    def logits(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return both on the shared classes, in the student's order; what is ``"other"`` comes last.

        Args:
            student: Logits, shape (..., student's classes).
            teacher: Logits, shape (..., teacher's classes).

        Raises:
            ShapeError: If the logits have not as many classes as the map says, or none of the teacher's is left over.
        """
        shared = {index for group in self._groups for index in group}
        if student.shape[-1] != len(self.teacher) or teacher.shape[-1] <= max(shared):
            raise ShapeError(
                f"the class map is for {len(self.teacher)} classes of the student and {max(shared) + 1} or more of the "
                f"teacher; their logits have shapes {shape(student)} and {shape(teacher)}"
            )
        own = [place for place, index in enumerate(self.teacher) if index is None]
        rest = [index for index in range(teacher.shape[-1]) if index not in shared]
        ours: list[tuple[int, ...]] = [(place,) for place, index in enumerate(self.teacher) if index is not None]
        theirs = list(self._groups)
        if self.unmapped == "other":
            if not rest:
                raise ShapeError(f"the class map has all {len(shared)} classes of the teacher; use 'left out'")
            ours, theirs = [*ours, tuple(own)], [*theirs, tuple(rest)]
        return _merged(student, ours), _merged(teacher, theirs)

    def labels(self, labels: Tensor) -> Tensor:
        """Return labels as positions among the classes that are compared.

        Args:
            labels: Classes of the student, integers of any shape; below 0 for none.

        Returns:
            Integers of that shape; for classes that the teacher does not know -1, or the position of ``"other"``.

        Raises:
            ShapeError: If they are no indices of the student's classes.
        """
        labels = class_indices(labels, len(self.teacher))
        unknown = len(self._groups) if self.unmapped == "other" else -1
        positions, count = [], 0
        for index in self.teacher:
            positions.append(unknown if index is None else count)
            count += index is not None
        table = torch.tensor(positions, device=labels.device)
        return torch.where(labels < 0, -1, table[labels.clamp(min=0)])

    @property
    def _groups(self) -> list[tuple[int, ...]]:
        """Return the teacher's classes for each of the student's that it knows."""
        return [index if isinstance(index, tuple) else (index,) for index in self.teacher if index is not None]


def _merged(logits: Tensor, groups: Sequence[tuple[int, ...]]) -> Tensor:
    """Return the logits of groups of classes, whose probabilities are the sums of theirs."""
    if all(len(group) == 1 for group in groups):
        return logits[..., [group[0] for group in groups]]
    widened = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.stack([_sum(widened[..., list(group)]) for group in groups], -1)


def _sum(logits: Tensor) -> Tensor:
    """Return the logarithm of the sum of exponentials over the last dimension; of nothing it has no gradient."""
    if logits.shape[-1] == 1:
        return logits[..., 0]
    nothing = (logits == -math.inf).all(-1)
    return logits.masked_fill(nothing.unsqueeze(-1), 0.0).logsumexp(-1).masked_fill(nothing, -math.inf)
