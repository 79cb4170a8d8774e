"""The objective of a distillation: weighted terms between a teacher and the model in training."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from slivo.distill import balance, heads
from slivo.distill import teacher as teachers
from slivo.distill._tensors import first_tensor, shape
from slivo.distill.adapt import made_by, make, sizes
from slivo.distill.classes import ClassMap
from slivo.distill.schedule import Ramp, now
from slivo.distill.taps import tap
from slivo.distill.terms import Place, Term, plan
from slivo.errors import RecipeError, ShapeError, SlivoError
from slivo.graph.capture import evaluating, trying

Batch = Any
Plan = Mapping[str, tuple[Term, Place]]
Tapped = Mapping[str, Tensor]

_log = logging.getLogger("slivo")


def second(batch: Batch) -> Tensor:
    """Return the labels of a batch ``(inputs, labels)``."""
    if not (isinstance(batch, tuple | list) and len(batch) > 1 and isinstance(batch[1], Tensor)):
        raise ShapeError(
            f"a batch is a {type(batch).__name__} and not (inputs, labels); give distillation(..., labels=...), which "
            "takes the labels out of a batch"
        )
    return batch[1]


def attended(batch: Batch) -> Tensor | None:
    """Return where the tokens of a batch count: its ``attention_mask`` as booleans, or None if it has none."""
    found = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return found.bool() if isinstance(found, Tensor) else None


@dataclass(frozen=True)
class BatchParts:
    """How losses get what they need beside activations out of a batch."""

    labels: Callable[[Batch], Tensor]
    mask: Callable[[Batch], Tensor | None]


def distillation(
    teacher: nn.Module | teachers.Source,
    task_forward: Callable[[nn.Module, Batch], Any],
    task_loss: Callable[[Any, Batch], Tensor],
    terms: Iterable[Term],
    *,
    label_weight: float | Ramp = 0.1,
    labels: Callable[[Batch], Tensor] = second,
    mask: Callable[[Batch], Tensor | None] = attended,
    class_map: ClassMap | None = None,
    teacher_forward: Callable[[nn.Module, Batch], Any] | None = None,
) -> Distillation:
    """Return the objective of a distillation, for `slivo.train.fit` or any loop of one's own.

    Args:
        teacher: Run in evaluation mode and without gradients, then left as it was; not copied. On the student's device.
            Or one whose answers are kept on disk (`slivo.distill.cache.cached`), for batches that carry keys.
        task_forward: ``(model, batch)`` to the model's output, for both models.
        task_loss: ``(output, batch)`` to a scalar, the mean over samples.
        terms: What is compared; see `slivo.losses`.
        label_weight: Weight of the task's own loss; 0 needs no labels.
        labels: Class labels of a batch, for losses that need them (``dkd``) and name none of their own.
        mask: Which tokens of a batch count, shape (batch, tokens), for losses on tokens that name none of their own;
            None for all.
        class_map: Which classes are shared, if student and teacher have different ones, for losses on the outputs that
            have none of their own; of several heads each has its own.
        teacher_forward: As ``task_forward``, for a teacher whose inputs are others, such as clean images, larger ones,
            or another modality; None for the same.

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
    for value in (label_weight.start, label_weight.end) if isinstance(label_weight, Ramp) else (label_weight,):
        if not (math.isfinite(value) and value >= 0):
            raise RecipeError(f"label_weight is {label_weight}; it must be 0 or above")
    chosen = tuple(terms)
    if not chosen:
        raise RecipeError("there are no losses to distil with; give one or more, such as slivo.losses.kd()")
    parts = BatchParts(labels, mask)
    theirs = teacher_forward or task_forward
    return Distillation(teacher, task_forward, task_loss, chosen, label_weight, parts, class_map, theirs)


class Distillation:
    """The objective that `distillation` makes.

    Attributes:
        teacher: What teaches.
        terms: What is compared.
        adapters: What is trained along, by name of the term.
        weights: The weights that `prepare` found, by name of the term.
        progress: The share of the training that is done, which options that are a `Ramp` go by; `distill` keeps it,
            and who calls the objective in a loop of their own sets it.
    """

    def __init__(
        self,
        teacher: nn.Module | teachers.Source,
        forward: Callable[[nn.Module, Batch], Any],
        loss: Callable[[Any, Batch], Tensor],
        terms: tuple[Term, ...],
        label_weight: float | Ramp,
        batch_parts: BatchParts,
        class_map: ClassMap | None,
        teacher_forward: Callable[[nn.Module, Batch], Any],
    ) -> None:
        self.teacher = teacher if isinstance(teacher, nn.Module) else teacher.model
        self._source = None if isinstance(teacher, nn.Module) else teacher
        self.terms = terms
        self.adapters: dict[str, nn.Module] = {}
        self.weights: dict[str, float] = {}
        self.progress = 0.0
        self._made_for: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._forward = forward
        self._teacher_forward = teacher_forward
        self._loss = loss
        self._label_weight = label_weight
        self._parts = batch_parts
        self._class_map = class_map
        self._before = teachers.checksum(self.teacher)

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the weighted terms of a batch, by name; their sum is the loss."""
        parts, found = self._raw(model, batch)
        for name, (term, _) in found.items():
            parts[name] = self._weight(name, term) * parts[name]
        if "labels" in parts:
            parts["labels"] = now(self._label_weight, self.progress) * parts["labels"]
        return parts

    def prepare(self, student: nn.Module, batch: Batch, *, seed: int = 0) -> Self:
        """Make the adapters that the terms need, and find the weights that are to be found; before the optimizer.

        All terms are tried on the batch, and a warning says which do next to nothing (`slivo.distill.balance`).

        Args:
            student: The model that will be trained; left as it was.
            batch: Any batch of the data, on the student's device; weights are found better on more samples.
            seed: Of the adapters' initial weights.

        Returns:
            Itself.

        Raises:
            SlivoError: If a path does not exist or a module does not run.
            ShapeError: If tensors do not fit each other.
        """
        self.adapters, self._made_for, self.weights = {}, {}, {}
        if self._teacher_forward is self._forward:
            teachers.same_preprocessing(student, self.teacher)
        with evaluating(student):
            if any("adapter" in term.supplied for term in self.terms):
                self._adapt(student, batch, seed)
        norms, found = self._norms(student, batch, seed)
        self._balance(norms, found)
        return self

    def _norms(self, student: nn.Module, batch: Batch, seed: int) -> tuple[dict[str, float], Plan]:
        """Return the lengths of the terms' gradients, as they are when the training begins.

        With the batch's own statistics, that is: those that batch norms hold may be of nothing yet, or of another
        network.
        """
        try:
            return self._measured(student, batch, seed, training=True)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):  # so say batch norms of one sample
                raise
            return self._measured(student, batch, seed, training=False)

    def _measured(
        self, student: nn.Module, batch: Batch, seed: int, *, training: bool
    ) -> tuple[dict[str, float], Plan]:
        with trying(student, training=training), torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            parts, found = self._raw(student, batch)
            return balance.gradient_norms(parts, student), found

    def parameters(self) -> list[Parameter]:
        """Return the adapters' parameters, which must be trained along; they are no part of the student."""
        return [parameter for made in self.adapters.values() for parameter in made.parameters()]

    @property
    def lesson(self) -> dict[str, str]:
        """What is taught: the teacher's checksum, the terms and the labels' weight, to compare with another's."""
        said = [
            (
                term.name,
                sorted(term.params.items()),
                term.weight,
                term.at,
                self._classes(term),
                term.head,
                term.class_dim,
            )
            for term in self.terms
        ]
        taught = self._before if self._source is None else f"{self._before} {self._source.lesson}"
        return {"teacher": taught, "losses": repr(said), "label_weight": repr(self._label_weight)}

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

    def _raw(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], Plan]:
        """Return the terms of a batch by name, not weighted, and where they look."""
        found = plan(self.terms, model, self.teacher)
        output, ours, theirs = self._run(model, batch, found)
        parts: dict[str, Tensor] = {}
        if not isinstance(self._label_weight, int | float) or self._label_weight > 0:
            parts["labels"] = self._loss(output, batch)
        for name, (term, place) in found.items():
            try:
                parts[name] = self._value(name, term, *self._pair(term, place, ours, theirs), batch)
            except (RecipeError, ShapeError) as error:
                raise type(error)(f"{name}: {error}") from error
        return parts, found

    def _run(self, student: nn.Module, batch: Batch, found: Plan) -> tuple[Any, Tapped, Tapped]:
        """Return the student's output, and by path what was tapped of both; the outputs are at the empty path."""
        places = [place for _, place in found.values()]
        paths = [path for place in places for path in place.teacher]
        if self._source is None:
            theirs = answers(self.teacher, self._teacher_forward, batch, paths)
        else:
            theirs = self._source.outputs(self._teacher_forward, batch, paths)
        paths = [path for place in places for path in place.student]
        output, ours = _outputs(student, self._forward, batch, paths, "student")
        return output, ours, theirs

    def _pair(self, term: Term, place: Place, ours: Tapped, theirs: Tapped) -> tuple[Any, Any]:
        """Return what a term compares: two tensors on the classes that both share, or two lists of tensors."""
        if term.joint:
            return [ours[path] for path in place.student], [theirs[path] for path in place.teacher]
        student, teacher = term.classes_last(ours[place.student[0]], theirs[place.teacher[0]])
        classes = self._classes(term)
        return (student, teacher) if classes is None else classes.logits(student, teacher)

    def _classes(self, term: Term) -> ClassMap | None:
        """Return the class map of a term; the distillation's own is for the models' outputs only."""
        return term.class_map or (self._class_map if term.on_outputs else None)

    def _value(self, name: str, term: Term, student: Any, teacher: Any, batch: Batch) -> Tensor:
        """Return a term's loss."""
        args: list[Any] = [student, teacher]
        for what in term.supplied:
            if what == "labels":
                labels = heads.taken(batch, self._parts.labels if term.labels is None else term.labels)
                classes = self._classes(term)
                args.append(labels if classes is None else classes.labels(labels))
            elif what == "mask":
                args.append(heads.taken(batch, self._parts.mask if term.mask is None else term.mask))
            else:
                args.append(self._adapter(name, term, student, teacher))
        value = term.function(*args, **term.options(self.progress))
        if value.dim():
            raise ShapeError(f"the loss has shape {shape(value)}; it must be one number, such as the mean over samples")
        return value

    def _weight(self, name: str, term: Term) -> float:
        if term.weight != "auto":
            return float(now(term.weight, self.progress))
        if name not in self.weights:
            raise RecipeError(
                f"the weight of {name} is to be found; call prepare(student, batch) before training, or give a weight"
            )
        return self.weights[name]

    @torch.no_grad()
    def _adapt(self, student: nn.Module, batch: Batch, seed: int) -> None:
        """Make the adapters that the terms need."""
        found = plan(self.terms, student, self.teacher)
        _, ours, theirs = self._run(student, batch, found)
        for index, (name, (term, place)) in enumerate(found.items()):
            if "adapter" in term.supplied:
                pair = self._pair(term, place, ours, theirs)
                made = make(term.function, term.options(0.0), *pair, seed=seed + index)
                if made is not None:
                    self.adapters[name], self._made_for[name] = made, sizes(*pair)

    def _adapter(self, name: str, term: Term, student: Any, teacher: Any) -> nn.Module | None:
        made, (ours, theirs) = self.adapters.get(name), sizes(student, teacher)
        if made is None and (ours != theirs or made_by(term.function)):
            raise ShapeError(
                f"the student has {_listed(ours)} features and the teacher {_listed(theirs)}; call "
                "prepare(student, batch) before training, and give parameters() to the optimizer"
            )
        if made is not None and self._made_for[name] != (ours, theirs):
            raise ShapeError(
                f"the adapter was not made for the student's {_listed(ours)} and the teacher's {_listed(theirs)} "
                "features; call prepare(student, batch) again after the student's shape has changed"
            )
        return made

    def _balance(self, norms: Mapping[str, float], found: Plan) -> None:
        """Find the weights that are to be found, and warn of terms that do next to nothing."""
        given = {name: float(now(term.weight, 0.5)) for name, (term, _) in found.items() if term.weight != "auto"}
        if "labels" in norms:
            given["labels"] = float(now(self._label_weight, 0.5))
        shares = {name: weight * norms[name] for name, weight in given.items()}
        # Where no weight is given, the first term is as it is, and the others are made as long.
        longest = sum(shares.values()) or next((value for value in norms.values() if value > 0), 1.0)
        places = Counter(id(term) for term, _ in found.values())
        for name in norms.keys() - given.keys():
            # A loss at many places weighs as much as at one.
            share = longest / places[id(found[name][0])]
            self.weights[name] = share / norms[name] if norms[name] > 0 else 1.0
            shares[name] = self.weights[name] * norms[name]
        if self.weights:
            _log.info(
                "weights by gradients: %s", ", ".join(f"{name} {value:.3g}" for name, value in self.weights.items())
            )
        balance.warn(shares)


def answers(
    teacher: nn.Module, forward: Callable[[nn.Module, Batch], Any], batch: Batch, paths: Sequence[str]
) -> dict[str, Tensor]:
    """Run a teacher and return by path what its modules put out; its output is at the empty path."""
    with teachers.frozen(teacher):
        return _outputs(teacher, forward, batch, paths, "teacher")[1]


def _outputs(
    model: nn.Module, forward: Callable[[nn.Module, Batch], Any], batch: Batch, paths: Sequence[str], role: str
) -> tuple[Any, dict[str, Tensor]]:
    inner = sorted({path for path in paths if path and heads.of_path(path) is None})
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
    for path in paths:
        head = heads.of_path(path)
        if head is not None:
            seen[path] = heads.find(output, head, f"the output of the {role}")
    return output, seen


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
