"""Terms: which losses a distillation adds up, with what weights, and where in the models each looks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from inspect import isfunction
from typing import Any, Literal, get_origin, get_type_hints

from torch import Tensor, nn

from slivo.distill import heads, logits
from slivo.distill._tensors import classes_last
from slivo.distill.classes import ClassMap
from slivo.distill.schedule import Ramp, now
from slivo.distill.taps import match
from slivo.errors import RecipeError, SlivoError

At = str | tuple[str, str] | Mapping[str, str]
Weight = float | Ramp | Literal["auto"]

_SUPPLIED = ("labels", "mask", "adapter")


@dataclass(frozen=True)
class Term:
    """One loss between student and teacher: a function, its options, its weight, and where it looks.

    Attributes:
        function: ``(student, teacher, ..., **params)`` to a scalar. Positional parameters beside the two tensors are
            supplied where their names are known: ``labels``, ``mask`` (True where a token counts) and ``adapter``
            (what is trained along; see `slivo.distill.adapt.adapted`). One whose ``student`` is annotated as a
            sequence of tensors is given all places at once, in the order of ``at``.
        params: Keyword arguments of the function; a number may be a `Ramp`.
        weight: What the loss is multiplied by: a number, a `Ramp`, or ``"auto"``, which has its gradient as long as
            that of all terms whose weights are given (measured once, when the training begins).
        at: Path of the module whose output is compared, in both models, or a pair of paths (student, teacher); ``""``
            is the model's output. With ``*`` and ``**`` it may be many, in each model's order; each is a term. A
            mapping lists several, ``{student: teacher}``.
        class_map: Which classes are shared, if the outputs' classes differ; None takes the distillation's, but of a
            head has none.
        head: Which output is compared, if a model has several: a key, field or place such as ``"boxes"``, ``1`` or
            ``"hidden_states.3"``, or a pair (student, teacher). A mapping lists several, ``{student: teacher}``.
            ``at`` is then ``""``.
        labels: What the function's ``labels`` are: a part of the batch (by key or place, as ``head``) or a function of
            the batch; None takes the distillation's.
        mask: The same of its ``mask``.
        class_dim: Which dimension of both tensors holds the classes, if it is not the last: 1 for (batch, classes,
            height, width). It is moved to the end, before class map and mask, and so each place is a sample. Losses on
            logits of more than three dimensions want it said, 1 or -1, for a softmax over columns would go unseen.
    """

    function: Callable[..., Tensor]
    params: Mapping[str, Any] = field(default_factory=dict)
    weight: Weight = 1.0
    at: At = ""
    class_map: ClassMap | None = None
    head: heads.Head | None = None
    labels: heads.Part | None = None
    mask: heads.Part | None = None
    class_dim: int | None = None

    def __post_init__(self) -> None:
        _check_weight(self.name, self.weight)
        if not isinstance(self.at, str | Mapping):
            object.__setattr__(self, "at", tuple(self.at))
            if len(self.at) != 2 or not all(isinstance(path, str) for path in self.at):
                raise RecipeError(f"at of {self.name} is {self.at}; it must be a module's path, or (student, teacher)")
        heads.check_part(f"labels of {self.name}", self.labels)
        heads.check_part(f"mask of {self.name}", self.mask)
        if self.head is not None:
            heads.pairs(self.name, self.head)
            if not isinstance(self.head, str | int | Mapping):
                object.__setattr__(self, "head", tuple(self.head))
            if self.at != "":
                raise RecipeError(f"{self.name} is at {self.at!r} and of head {self.head!r}; give one of both")
        unknown = [name for name in self.supplied if name not in _SUPPLIED]
        if unknown:
            raise RecipeError(
                f"loss {self.name} has a positional parameter {unknown[0]!r}; beside student and teacher there may be "
                f"{', '.join(_SUPPLIED)}; make an option keyword-only"
            )
        try:
            inspect.signature(self.function).bind(None, None, *self.supplied, **self.params)
        except TypeError as error:
            raise RecipeError(f"loss {self.name} cannot be called with {dict(self.params)}: {error}") from error

    @property
    def name(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", "custom")

    @cached_property
    def supplied(self) -> tuple[str, ...]:
        """Names of what the function needs beside both tensors and its options."""
        return supplied(self.function)

    @cached_property
    def joint(self) -> bool:
        """Whether the function compares several places at once."""
        return joint(self.function)

    @property
    def on_outputs(self) -> bool:
        """Whether the models' outputs are compared, of which there is one each."""
        return self.head is None and self.at in ("", ("", ""))

    def classes_last(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return both with their classes in the last dimension.

        Raises:
            ShapeError: If there is no such dimension, or it must be said which it is.
        """
        # Of all losses on logits only these do not ask what is a class.
        entrywise = self.function in (logits.mse, logits.l1)
        if self.class_dim is None and (entrywise or self.function.__module__ != logits.__name__):
            return student, teacher
        return classes_last(student, self.class_dim), classes_last(teacher, self.class_dim)

    def options(self, progress: float) -> dict[str, Any]:
        """Return the options at a share of the training that is done."""
        return {name: now(value, progress) for name, value in self.params.items()}


@dataclass(frozen=True)
class Place:
    """Where a term looks: one path in each model, or several at once; heads stand in brackets."""

    student: tuple[str, ...]
    teacher: tuple[str, ...]


def supplied(function: Callable[..., Tensor]) -> tuple[str, ...]:
    """Return the names of a loss function's positional parameters after student and teacher."""
    parameters = inspect.signature(function).parameters.values()
    positional = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return tuple(positional[2:])


def joint(function: Callable[..., Tensor]) -> bool:
    """Tell whether a loss function compares sequences of tensors.

    Example:
        >>> def several(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor: ...
        >>> joint(several), joint(nn.functional.mse_loss)
        (True, False)
    """
    first = next(iter(inspect.signature(function).parameters.values()), None)
    if first is None or first.annotation is first.empty:
        return False
    owner = function.func if isinstance(function, partial) else function
    origin = get_origin(get_type_hints(owner)[first.name] if isfunction(owner) else first.annotation)
    return isinstance(origin, type) and issubclass(origin, Sequence)


def plan(terms: Sequence[Term], student: nn.Module, teacher: nn.Module) -> dict[str, tuple[Term, Place]]:
    """Return by name each term and where it looks; paths are looked up anew, for models may change.

    Raises:
        SlivoError: If a path does not exist, or as many modules do not match in both models.
    """
    found: dict[str, tuple[Term, Place]] = {}
    for term in terms:
        for place in _places(term, student, teacher):
            said = "+".join(place.student)
            name = f"{term.name}@{said}" if said and term.head is None else f"{term.name}{said}"
            count = sum(other == name or other.startswith(f"{name}#") for other in ("labels", *found))
            found[f"{name}#{count + 1}" if count else name] = (term, place)
    return found


def _places(term: Term, student: nn.Module, teacher: nn.Module) -> list[Place]:
    if term.head is None:
        pairs = list(term.at.items()) if isinstance(term.at, Mapping) else [term.at]
        found = [pair for each in pairs for pair in _pairs(term.name, each, student, teacher)]
    else:
        found = [(heads.path(ours), heads.path(theirs)) for ours, theirs in heads.pairs(term.name, term.head)]
    if term.joint:
        return [Place(tuple(ours for ours, _ in found), tuple(theirs for _, theirs in found))]
    return [Place((ours,), (theirs,)) for ours, theirs in found]


def _pairs(name: str, at: str | tuple[str, str], student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    """Return the paths that a term compares, by student and teacher."""
    ours = match(student, at if isinstance(at, str) else at[0], role="student")
    if isinstance(at, str):
        return [(path, match(teacher, path, role="teacher")[0]) for path in ours]
    theirs = match(teacher, at[1], role="teacher")
    if len(ours) != len(theirs):
        raise SlivoError(
            f"{name} at {at}: {len(ours)} modules of the student match and {len(theirs)} of the teacher; they are "
            "paired in order and must be as many"
        )
    return list(zip(ours, theirs, strict=True))


def _check_weight(name: str, weight: Any) -> None:
    if weight == "auto":
        return
    values = (weight.start, weight.end) if isinstance(weight, Ramp) else (weight,)
    if not all(isinstance(each, int | float) and math.isfinite(each) and each >= 0 for each in values) or not any(
        values
    ):
        raise RecipeError(f"weight of {name} is {weight}; it must be above 0, or the term left out")
