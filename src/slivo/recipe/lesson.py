"""What a distillation of a recipe is given: who teaches, by memory or not, and where activations are compared."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slivo import losses
from slivo.distill import Cached, Term, Views, cached, committee, fill, learn_voices, propose
from slivo.distill.objective import second
from slivo.distill.records import identify
from slivo.distill.terms import plan
from slivo.distill.views import KEY, keys_of
from slivo.errors import RecipeError, SlivoError
from slivo.recipe.schema import Cache, Committee, Distill
from slivo.tasks import Task, forward, loader

PROPOSED = "proposed"
"""In the place of a path: compare where the networks say alike (`slivo.distill.propose`)."""

_BLOCK = 64
"""Samples that a teacher with a memory is asked at once."""

_PROBES = 32
"""Samples by which augmentation is noticed; one that changes every tenth is missed once in thirty times."""


@dataclass(frozen=True)
class Lesson:
    """What `slivo.distill` is called with.

    Args:
        teacher: One network, or a committee; or either with a memory.
        task: The task; its training data carry keys if the teacher has a memory.
        terms: What is compared.
        details: What is worth telling of it.
    """

    teacher: nn.Module | Cached
    task: Task
    terms: list[Term]
    details: dict[str, Any]


def lesson(
    part: Distill,
    task: Task,
    student: nn.Module,
    teachers: Sequence[nn.Module],
    *,
    voices: Committee | None,
    seed: int,
    folder: Path,
    progress: Callable[[int, int], None],
) -> Lesson:
    """Return what a distillation is given; a teacher with a memory has answered all questions by then.

    Args:
        part: What the recipe says.
        task: Data, loss and metrics.
        student: As it is before the training.
        teachers: The recipe's teacher, and those beside it.
        voices: How several teachers speak with one voice.
        seed: Of the batch by which places are proposed.
        folder: Where answers are kept.
        progress: Gets ``(answers that are there, answers in all)``.

    Raises:
        SlivoError: If a place does not exist, or nothing can be proposed.
        ArtifactError: If answers cannot be kept.
    """
    details: dict[str, Any] = {"losses": [next(iter(loss)) for loss in part.losses], "epochs": part.epochs}
    specs = part.losses
    if any(_proposed(loss) for loss in specs):
        at = _places(task, student, teachers[0], seed)
        specs = [_placed(loss, at) if _proposed(loss) else loss for loss in specs]
        details["at"] = [f"{ours} - {theirs}" for ours, theirs in at.items()]
    terms = [losses.build(loss) for loss in specs]
    whole = teachers[0]
    if voices is not None:
        terms = of_first(terms, student, whole)
        whole = voice(voices, teachers, task)
        details["voices"] = voices.voices if voices.voices == "confidence" else _rounded(whole)
    if part.cache is None:
        return Lesson(whole, task, terms, details)
    paths = {"", *(path for _, place in plan(terms, student, whole).values() for path in place.teacher)}
    views = _views(task, part.cache.views)
    details["cached_answers"] = len(views) * views.count
    task = _keyed(task, views)
    return Lesson(_remembered(whole, part.cache, task, views, sorted(paths), folder, progress), task, terms, details)


def check(part: Distill, task: Task, student: nn.Module, teacher: nn.Module, *, several: bool) -> None:
    """Find out, with networks that may not be trained yet, whether a distillation can be given what it asks for.

    Raises:
        SlivoError: If a path does not exist in one of the networks.
        RecipeError: If a cache would change what is learned.
    """
    terms = [losses.build(loss) for loss in part.losses if not _proposed(loss)]
    if several:
        terms = [term for term in terms if not _names_member(term)]
    plan(terms, student, teacher)
    if part.cache is None:
        return
    classes = len(task.classes)
    if part.cache.top_k is not None and 0 < classes <= part.cache.top_k:
        raise RecipeError(f"top_k is {part.cache.top_k} and there are {classes} classes; keep fewer, or leave it out")
    if part.cache.views == 1 and _augmented(task):
        raise RecipeError(
            "the training data are augmented, and one view of each sample would be the same in every epoch; keep "
            f"several, {{views: {part.epochs}}} for a new one in each"
        )


def voice(part: Committee, teachers: Sequence[nn.Module], task: Task) -> nn.Module:
    """Return one teacher of several."""
    given = part.voices
    found = committee(teachers, "equal" if given == "learned" else given, temperature=part.temperature)
    if given != "learned":
        return found
    return learn_voices(found, loader(task, "val", batch_size=_BLOCK), partial(forward, task), second)


def of_first(terms: Sequence[Term], student: nn.Module, teacher: nn.Module) -> list[Term]:
    """Return terms for a committee: activations are those of its first member, where paths do not name another."""
    found = []
    for term in terms:
        if not (term.on_outputs or _names_member(term)):
            places = [place for _, place in plan([term], student, teacher).values()]
            at = {
                ours: f"teachers.0.{theirs}" if theirs else ""
                for place in places
                for ours, theirs in zip(place.student, place.teacher, strict=True)
            }
            term = replace(term, at=at)
        found.append(term)
    return found


def on_sizes(term: Term) -> bool:
    """Tell whether a loss on the output changes if all logits of a teacher grow alike, so that it needs them whole.

    Example:
        >>> on_sizes(losses.mse()), on_sizes(losses.kd())
        (True, False)
    """
    if not term.on_outputs:
        return False
    student, teacher, labels = torch.eye(4)[:, [1, 2, 3, 0]], 3 * torch.eye(4), torch.arange(4)
    supplied = [labels if name == "labels" else None for name in term.supplied]
    plain, grown = (term.function(student, logits, *supplied, **term.options(0.0)) for logits in (teacher, teacher + 1))
    return not torch.allclose(plain, grown, rtol=1e-4, atol=1e-6)


def _proposed(loss: Mapping[str, Mapping[str, Any]]) -> bool:
    return any(options.get("at") == PROPOSED for options in loss.values())


def _placed(loss: Mapping[str, Mapping[str, Any]], at: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    return {name: {**options, "at": dict(at)} for name, options in loss.items()}


def _places(task: Task, student: nn.Module, teacher: nn.Module, seed: int) -> dict[str, str]:
    """Return where to compare, from a batch of the training data."""
    batch = next(iter(loader(task, "train", batch_size=_BLOCK, seed=seed)))
    found = propose(student, teacher, batch, forward=partial(forward, task)).at
    if not found:
        raise SlivoError("no places of student and teacher say alike; name some in the place of 'at: proposed'")
    return found


def _names_member(term: Term) -> bool:
    """Tell whether a place is said to be in one of several teachers."""
    if isinstance(term.at, str):
        return False
    theirs = term.at.values() if isinstance(term.at, Mapping) else [term.at[1]]
    return any(path.startswith("teachers.") for path in theirs)


def _rounded(members: nn.Module) -> list[float]:
    return [round(float(share), 4) for share in members.get_buffer("shares")]


def _views(task: Task, count: int) -> Views:
    return Views(task.train, count=count, collate=task.collate)


def _augmented(task: Task) -> bool:
    """Tell whether training data are another in each view."""
    views = _views(task, 2)
    probes = range(min(_PROBES, len(views)))
    first, other = (keys_of(views.batch([place + start for place in probes])) for start in (0, len(views)))
    assert first is not None
    assert other is not None
    return not torch.equal(first[:, 2], other[:, 2])


def _remembered(
    teacher: nn.Module,
    part: Cache,
    task: Task,
    views: Views,
    paths: Sequence[str],
    folder: Path,
    progress: Callable[[int, int], None],
) -> Cached:
    """Return a teacher that has answered all questions, in the same blocks whether it was interrupted or not."""
    where = folder / identify({"paths": list(paths), **part.model_dump()}, {})
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[part.features]

    def opened() -> Cached:
        return cached(teacher, views, where, taps=paths, top_k=part.top_k, feature_dtype=dtype)

    found = opened()
    missing = found.missing()
    total = len(views) * views.count
    # An answer may differ in the last bit by what else was asked with it. A block of which some are missing, as a kill
    # in the midst of writing it leaves, would not be asked as it was.
    if len(missing) and not (missing[0] % _BLOCK == 0 and len(missing) == total - missing[0]):
        shutil.rmtree(where)
        found = opened()
    fill(found, partial(forward, task), batch_size=_BLOCK, progress=progress)
    return found


def _keyed(task: Task, views: Views) -> Task:
    """Return the task on views; its own functions get batches as they know them, without keys."""

    def bare(batch: Any) -> Any:
        keys = keys_of(batch)
        if keys is None or not views.holds(keys):
            return batch
        return (
            {name: value for name, value in batch.items() if name != KEY} if isinstance(batch, Mapping) else batch[:-1]
        )

    return replace(
        task,
        train=views,
        inputs=lambda batch: task.inputs(bare(batch)),
        loss=lambda output, batch: task.loss(output, bare(batch)),
    )
