"""The objective of a distillation: weighted terms between a teacher and the model in training."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from slivo.distill import teacher as teachers
from slivo.distill._tensors import first_tensor, shape
from slivo.distill.adapt import adapter, channels
from slivo.distill.classes import ClassMap
from slivo.distill.taps import match, tap
from slivo.errors import RecipeError, ShapeError, SlivoError
from slivo.graph.capture import evaluating

Batch = Any


@dataclass(frozen=True)
class Term:
    """One loss between student and teacher: a function, its options, its weight, and where it looks.

    Attributes:
        function: ``(student, teacher, ..., **params)`` to a scalar. Positional parameters beside the two tensors are
            supplied where their names are known: ``labels`` and ``adapter``.
        params: Keyword arguments of the function.
        weight: What the loss is multiplied by.
        at: Path of the module whose output is compared, in both models, or a pair of paths (student, teacher); ``""``
            is the model's output. With ``*`` and ``**`` it may be many, in each model's order; each is a term.
        class_map: Which classes are shared, if the outputs' classes differ; None takes the distillation's.
    """

    function: Callable[..., Tensor]
    params: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    at: str | tuple[str, str] = ""
    class_map: ClassMap | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise RecipeError(f"weight of {self.name} is {self.weight}; it must be above 0, or the term left out")
        if not isinstance(self.at, str):
            object.__setattr__(self, "at", tuple(self.at))
            if len(self.at) != 2 or not all(isinstance(path, str) for path in self.at):
                raise RecipeError(f"at of {self.name} is {self.at}; it must be a module's path, or (student, teacher)")
        unknown = [name for name in self.supplied if name not in ("labels", "adapter")]
        if unknown:
            raise RecipeError(
                f"loss {self.name} has a positional parameter {unknown[0]!r}; beside student and teacher there may be "
                "labels and adapter; make an option keyword-only"
            )
        try:
            inspect.signature(self.function).bind(None, None, *self.supplied, **self.params)
        except TypeError as error:
            raise RecipeError(f"loss {self.name} cannot be called with {dict(self.params)}: {error}") from error

    @property
    def name(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", "custom")

    @property
    def supplied(self) -> tuple[str, ...]:
        """Names of what the function needs beside both tensors and its options."""
        return supplied(self.function)

    @property
    def places(self) -> tuple[str, str]:
        """Paths or patterns in student and teacher."""
        return (self.at, self.at) if isinstance(self.at, str) else self.at


def supplied(function: Callable[..., Tensor]) -> tuple[str, ...]:
    """Return the names of a loss function's positional parameters after student and teacher."""
    parameters = inspect.signature(function).parameters.values()
    positional = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return tuple(positional[2:])


def second(batch: Batch) -> Tensor:
    """Return the labels of a batch ``(inputs, labels)``."""
    if not (isinstance(batch, tuple | list) and len(batch) > 1 and isinstance(batch[1], Tensor)):
        raise ShapeError(
            f"a batch is a {type(batch).__name__} and not (inputs, labels); give distillation(..., labels=...), which "
            "takes the labels out of a batch"
        )
    return batch[1]


def distillation(
    teacher: nn.Module,
    task_forward: Callable[[nn.Module, Batch], Any],
    task_loss: Callable[[Any, Batch], Tensor],
    terms: Iterable[Term],
    *,
    label_weight: float = 0.1,
    labels: Callable[[Batch], Tensor] = second,
    class_map: ClassMap | None = None,
) -> Distillation:
    """Return the objective of a distillation, for `slivo.train.fit` or any loop of one's own.

    Args:
        teacher: Run in evaluation mode and without gradients, then left as it was; not copied. On the student's device.
        task_forward: ``(model, batch)`` to the model's output, for both models.
        task_loss: ``(output, batch)`` to a scalar, the mean over samples.
        terms: What is compared; see `slivo.losses`.
        label_weight: Weight of the task's own loss; 0 needs no labels.
        labels: Class labels of a batch, for losses that need them (``dkd``).
        class_map: Which classes are shared, if student and teacher have different ones.

    Returns:
        A callable ``(model, batch)`` to weighted terms by name, whose sum is the loss. As a context manager, or by
        `Distillation.close`, it proves at the end that the teacher has not changed.

    Raises:
        RecipeError: If there are no terms or a weight makes no sense.

    Example:
        >>> from slivo import losses
        >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> batch = torch.randn(8, 4), torch.randint(3, (8,))
        >>> def forward(model, batch):
        ...     return model(batch[0])
        >>> def loss(output, batch):
        ...     return nn.functional.cross_entropy(output, batch[1])
        >>> with distillation(teacher, forward, loss, [losses.kd(weight=0.9)]) as objective:
        ...     parts = objective(student, batch)
        >>> list(parts)
        ['labels', 'kd']
    """
    if not (math.isfinite(label_weight) and label_weight >= 0):
        raise RecipeError(f"label_weight is {label_weight}; it must be 0 or above")
    chosen = tuple(terms)
    if not chosen:
        raise RecipeError("there are no losses to distil with; give one or more, such as slivo.losses.kd()")
    return Distillation(teacher, task_forward, task_loss, chosen, label_weight, labels, class_map)


class Distillation:
    """The objective that `distillation` makes."""

    def __init__(
        self,
        teacher: nn.Module,
        forward: Callable[[nn.Module, Batch], Any],
        loss: Callable[[Any, Batch], Tensor],
        terms: tuple[Term, ...],
        label_weight: float,
        labels: Callable[[Batch], Tensor],
        class_map: ClassMap | None,
    ) -> None:
        self.teacher = teacher
        self.terms = terms
        self.adapters: dict[str, nn.Module] = {}
        self._forward = forward
        self._loss = loss
        self._label_weight = label_weight
        self._labels = labels
        self._class_map = class_map
        self._before = teachers.checksum(teacher)

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the weighted terms of a batch, by name; their sum is the loss."""
        plan = self._plan(model)
        output, student, teacher = self._run(model, batch, plan)
        parts: dict[str, Tensor] = {}
        if self._label_weight > 0:
            parts["labels"] = self._label_weight * self._loss(output, batch)
        for name, (term, ours, theirs) in plan.items():
            try:
                parts[name] = self._value(name, term, student[ours], teacher[theirs], batch)
            except (RecipeError, ShapeError) as error:
                raise type(error)(f"{name}: {error}") from error
        return parts

    def prepare(self, student: nn.Module, batch: Batch, *, seed: int = 0) -> Self:
        """Make the adapters that the terms need, and try all terms on a batch; before the optimizer is made.

        Args:
            student: The model that will be trained; left as it was.
            batch: Any batch of the data, on the student's device.
            seed: Of the adapters' initial weights.

        Returns:
            Itself.

        Raises:
            SlivoError: If a path does not exist or a module does not run.
            ShapeError: If tensors do not fit each other.
        """
        with evaluating(student), torch.no_grad():
            plan = self._plan(student)
            _, ours, theirs = self._run(student, batch, plan)
            self.adapters = {}
            for index, (name, (term, here, there)) in enumerate(plan.items()):
                if "adapter" in term.supplied:
                    pair = self._shared(term, ours[here], theirs[there])
                    made = adapter(*pair, seed=seed + index)
                    if made is not None:
                        self.adapters[name] = made
            self(student, batch)
        return self

    def parameters(self) -> list[Parameter]:
        """Return the adapters' parameters, which must be trained along; they are no part of the student."""
        return [parameter for made in self.adapters.values() for parameter in made.parameters()]

    @property
    def lesson(self) -> dict[str, str]:
        """What is taught: the teacher's checksum, the terms and the labels' weight, to compare with another's."""
        said = [
            (term.name, sorted(term.params.items()), term.weight, term.at, self._classes(term)) for term in self.terms
        ]
        return {"teacher": self._before, "losses": repr(said), "label_weight": repr(self._label_weight)}

    def close(self) -> None:
        """Check that the teacher has not changed.

        Raises:
            SlivoError: If it has.
        """
        teachers.verify(self.teacher, self._before)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An error on its way says more than what it may have caused.
        if kind is None:
            self.close()

    def _plan(self, student: nn.Module) -> dict[str, tuple[Term, str, str]]:
        """Return by name each term with its paths in student and teacher, looked up anew: models may change."""
        plan: dict[str, tuple[Term, str, str]] = {}
        for term in self.terms:
            for ours, theirs in _pairs(term, student, self.teacher):
                name = f"{term.name}@{ours}" if ours else term.name
                count = sum(other == name or other.startswith(f"{name}#") for other in ("labels", *plan))
                plan[f"{name}#{count + 1}" if count else name] = (term, ours, theirs)
        return plan

    def _run(
        self, student: nn.Module, batch: Batch, plan: Mapping[str, tuple[Term, str, str]]
    ) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
        """Return the student's output, and by path what was tapped of both; the outputs are at the empty path."""
        with teachers.frozen(self.teacher):
            _, theirs = _outputs(
                self.teacher, self._forward, batch, [there for _, _, there in plan.values()], "teacher"
            )
        output, ours = _outputs(student, self._forward, batch, [here for _, here, _ in plan.values()], "student")
        return output, ours, theirs

    def _classes(self, term: Term) -> ClassMap | None:
        """Return the class map of a term; the distillation's own is for the models' outputs only."""
        return term.class_map or (self._class_map if term.places == ("", "") else None)

    def _shared(self, term: Term, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return both on the classes they share, if there is a map of them."""
        classes = self._classes(term)
        return (student, teacher) if classes is None else classes.logits(student, teacher)

    def _value(self, name: str, term: Term, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """Return a term's weighted loss."""
        student, teacher = self._shared(term, student, teacher)
        args: list[Any] = [student, teacher]
        for what in term.supplied:
            if what == "labels":
                classes, labels = self._classes(term), self._labels(batch)
                args.append(labels if classes is None else classes.labels(labels))
            else:
                args.append(self._adapter(name, student, teacher))
        value = term.function(*args, **term.params)
        if value.dim():
            raise ShapeError(f"the loss has shape {shape(value)}; it must be one number, such as the mean over samples")
        return term.weight * value

    def _adapter(self, name: str, student: Tensor, teacher: Tensor) -> nn.Module | None:
        made = self.adapters.get(name)
        sizes = channels(student), channels(teacher)
        if made is None and sizes[0] != sizes[1]:
            raise ShapeError(
                f"the student has {sizes[0]} features and the teacher {sizes[1]}; call prepare(student, batch) "
                "before training, and give parameters() to the optimizer"
            )
        if made is not None and tuple(next(made.parameters()).shape[:2]) != (sizes[1], sizes[0]):
            raise ShapeError(
                f"the adapter was not made for the student's {sizes[0]} and the teacher's {sizes[1]} features; "
                "call prepare(student, batch) again after the student's shape has changed"
            )
        return made


def _pairs(term: Term, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    """Return the paths that a term compares, by student and teacher."""
    ours = match(student, term.places[0], role="student")
    if isinstance(term.at, str):
        return [(path, match(teacher, path, role="teacher")[0]) for path in ours]
    theirs = match(teacher, term.places[1], role="teacher")
    if len(ours) != len(theirs):
        raise SlivoError(
            f"{term.name} at {term.at}: {len(ours)} modules of the student match and {len(theirs)} of the teacher; "
            "they are paired in order and must be as many"
        )
    return list(zip(ours, theirs, strict=True))


def _outputs(
    model: nn.Module, forward: Callable[[nn.Module, Batch], Any], batch: Batch, paths: Sequence[str], role: str
) -> tuple[Any, dict[str, Tensor]]:
    inner = sorted({path for path in paths if path})
    with tap(model, inner) as seen:
        output = forward(model, batch)
    missing = [path for path in inner if path not in seen]
    if missing:
        raise SlivoError(f"module {missing[0]!r} of the {role} did not run; tap one that its forward calls")
    if "" in paths:
        logits = first_tensor(output)
        if logits is None:
            raise SlivoError(f"the {role} puts out {type(output).__name__} without a tensor; return logits")
        seen[""] = logits
    return output, seen
