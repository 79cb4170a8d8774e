"""Which classes student and teacher share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slivo.distill._tensors import class_indices, shape
from slivo.errors import ShapeError


@dataclass(frozen=True)
class ClassMap:
    """Where the student's classes are among the teacher's, for a subset, a superset, or another order.

    Both are compared on the classes they share, on which the probabilities are renormalized. What the student has for
    itself it learns from the labels alone.

    Attributes:
        teacher: For each class of the student the teacher's index of it, or None where the teacher does not know it.

    Example:
        >>> shared = ClassMap((2, None, 0))
        >>> student, teacher = shared.logits(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 20.0, 30.0]]))
        >>> student.tolist(), teacher.tolist()
        ([[1.0, 3.0]], [[30.0, 10.0]])
    """

    teacher: tuple[int | None, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "teacher", tuple(self.teacher))
        shared = [index for index in self.teacher if index is not None]
        wrong = any(isinstance(index, bool) or not isinstance(index, int) or index < 0 for index in shared)
        if wrong or len(shared) < 2 or len(set(shared)) != len(shared):
            raise ShapeError(
                f"class map {list(self.teacher)} must give two or more different classes of the teacher (integers "
                "from 0), and None for classes that it does not know"
            )

    @classmethod
    def by_name(cls, student: Sequence[str], teacher: Sequence[str]) -> ClassMap:
        """Return the map between two lists of class names, in the order of the logits.

        Raises:
            ShapeError: If a name stands twice in a list, or fewer than two are in both.

        Example:
            >>> ClassMap.by_name(["cat", "dog", "owl"], ["dog", "eel", "cat"])
            ClassMap(teacher=(2, 0, None))
        """
        for role, given in (("student", student), ("teacher", teacher)):
            twice = [name for index, name in enumerate(given) if name in given[:index]]
            if twice:
                raise ShapeError(f"the {role} has two classes named {twice[0]!r}; give the map by indices")
        places = {name: index for index, name in enumerate(teacher)}
        return cls(tuple(places.get(name) for name in student))

    def logits(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return both on the shared classes, in the student's order.

        Args:
            student: Logits, shape (..., student's classes).
            teacher: Logits, shape (..., teacher's classes).

        Raises:
            ShapeError: If the logits have not as many classes as the map says.
        """
        largest = max(index for index in self.teacher if index is not None)
        if student.shape[-1] != len(self.teacher) or teacher.shape[-1] <= largest:
            raise ShapeError(
                f"the class map is for {len(self.teacher)} classes of the student and {largest + 1} or more of the "
                f"teacher; their logits have shapes {shape(student)} and {shape(teacher)}"
            )
        ours = [place for place, index in enumerate(self.teacher) if index is not None]
        theirs = [index for index in self.teacher if index is not None]
        return student[..., ours], teacher[..., theirs]

    def labels(self, labels: Tensor) -> Tensor:
        """Return labels as positions among the shared classes, -1 for classes that the teacher does not know.

        Args:
            labels: Classes of the student, integers of any shape; below 0 for none.

        Raises:
            ShapeError: If they are no indices of the student's classes.
        """
        labels = class_indices(labels, len(self.teacher))
        positions, count = [], 0
        for index in self.teacher:
            positions.append(-1 if index is None else count)
            count += index is not None
        table = torch.tensor(positions, device=labels.device)
        return torch.where(labels < 0, -1, table[labels.clamp(min=0)])
