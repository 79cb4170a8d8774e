"""Lay a recipe out as a list of steps: rounds, parts and schedules spelled out, each prune step with its goal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from slivo.prune import steps as shares
from slivo.recipe.schema import Joint, Keep, Layers, Part, Prune, Recipe, Stage, Teacher, Until
from slivo.recipe.text import Path


@dataclass(frozen=True)
class Goal:
    """What a prune step may leave.

    Args:
        since: The step before which the student's cost is the whole; None for the teacher's cost.
        macs: Share of the whole's multiply-accumulates that may stay, or None.
        params: Share of its parameters, or None.
        bytes: Share of its bytes, or None.
        latency: Share of its latency, or None.
        latency_ms: Milliseconds that one call may take, or None.
    """

    since: int | None
    macs: float | None
    params: float | None
    bytes: float | None = None
    latency: float | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class Piece:
    """One part of the network among several that are treated one after the other.

    Args:
        layers: What says how the network is parted.
        index: Which part, from 0.
        since: The step at which the parting starts.
    """

    layers: Layers
    index: int
    since: int

    @property
    def count(self) -> int:
        """How many parts there are."""
        return self.layers.groups if self.layers.modules is None else len(self.layers.modules)  # type: ignore[return-value]


@dataclass(frozen=True)
class Round:
    """One round of several that end where validation or costs say so.

    Args:
        until: What says so.
        place: Where the rounds are in the recipe.
        index: Which round, from 0.
        since: The round's first step.
    """

    until: Until
    place: Path
    index: int
    since: int


@dataclass(frozen=True)
class Step:
    """One thing that a run does; what it leaves is kept before the next begins.

    Args:
        kind: ``teacher``, ``member`` (of a committee), ``recover``, or the kind of a stage.
        label: What to call it.
        path: Where in the recipe it is said.
        part: What the recipe says.
        goal: Of a step that cuts.
        piece: The part of the network, inside ``layers``.
        turn: The round, inside a ``repeat`` with ``until``.
    """

    kind: str
    label: str
    path: Path
    part: Part
    goal: Goal | None = None
    piece: Piece | None = None
    turn: Round | None = None


@dataclass(frozen=True)
class _Cut:
    """A step that cuts, before its goal is known: one of several of the prune stage ``stage``."""

    step: Step
    stage: tuple[object, ...]
    keep: Keep | None


def plan(recipe: Recipe) -> list[Step]:
    """Return what a run of a recipe does, in order; the first step makes the teacher.

    A prune stage with ``keep`` leaves that share of what the student had when the stage began, however many steps it
    takes. Prune stages without share what the target asks: each of n leaves the n-th root of the target's share, so
    that the last one reaches it.

    Example:
        >>> from slivo.recipe.load import load
        >>> settings = ["stages.0.prune.schedule.steps=2"]
        >>> for step in plan(load("prune-then-distill", settings).recipe)[:4]:
        ...     print(step.label)
        teacher
        prune 1/2
        recover 1/2
        prune 2/2
    """
    teacher = recipe.teacher if recipe.teacher is not None else Teacher(model="")
    found: list[Step | _Cut] = [Step("teacher", "teacher", ("teacher",), teacher)]
    others = recipe.committee.others if recipe.committee is not None else []
    for index, other in enumerate(others):
        found.append(Step("member", f"teacher {index + 2}", ("committee", "others", index), other))
    for index, stage in enumerate(recipe.stages):
        _lay(found, stage, ("stages", index), "")
    return _with_goals(found, recipe)


def _lay(found: list[Step | _Cut], stage: Stage, path: Path, suffix: str, piece: Piece | None = None) -> None:
    """Add the steps of a stage."""
    kind, part = next(iter(stage.given.items()))
    if stage.repeat is not None:
        for number in range(stage.repeat.times):
            since, until = len(found), stage.repeat.until
            for index, inner in enumerate(stage.repeat.stages):
                _lay(found, inner, (*path, kind, "stages", index), f", round {number + 1}/{stage.repeat.times}")
            if until is not None:
                found[since:] = [_turned(item, Round(until, path, number, since)) for item in found[since:]]
    elif stage.layers is not None:
        first = Piece(stage.layers, 0, len(found))
        for number in range(first.count):
            for index, inner in enumerate(stage.layers.stages):
                of = f"{suffix}, part {number + 1}/{first.count}"
                _lay(found, inner, (*path, kind, "stages", index), of, replace(first, index=number))
    elif isinstance(part, Prune):
        # The parts of one network have one goal; anything else that prunes is a stage of its own.
        stage_id = ("layers", piece.since) if piece is not None else ("prune", len(found))
        for number in range(part.cuts):
            of = f" {number + 1}/{part.cuts}{suffix}" if part.cuts > 1 else suffix
            found.append(_Cut(Step("prune", f"prune{of}", (*path, kind), part, piece=piece), stage_id, part.keep))
            if part.recover is not None and part.controlled is None:
                found.append(Step("recover", f"recover{of}", (*path, kind, "recover"), part.recover))
    else:
        step = Step(kind, f"{kind}{suffix}", (*path, kind), part, piece=piece)
        cut = cut_of(part)
        found.append(step if cut is None else _Cut(step, (kind, len(found)), cut.keep))


def _turned(item: Step | _Cut, turn: Round) -> Step | _Cut:
    return replace(item, turn=turn) if isinstance(item, Step) else replace(item, step=replace(item.step, turn=turn))


def taught(steps: Sequence[Step]) -> int:
    """Return the step at which the student becomes the teacher; -1 if none is."""
    return next((index for index, step in enumerate(steps) if step.kind == "teach"), -1)


def cut_of(part: Part) -> Prune | None:
    """Return what a part says of a cut, if it cuts."""
    if isinstance(part, Joint):
        return part.prune
    return part if isinstance(part, Prune) else None


def _with_goals(found: Sequence[Step | _Cut], recipe: Recipe) -> list[Step]:
    """Give each prune step its goal."""
    steps = [item.step if isinstance(item, _Cut) else item for item in found]
    cuts = [(index, item) for index, item in enumerate(found) if isinstance(item, _Cut)]
    stages = [list(group) for _, group in groupby(cuts, key=lambda pair: pair[1].stage)]
    openly = [stage for stage in stages if stage[0][1].keep is None]
    for stage in stages:
        keep = stage[0][1].keep
        if keep is not None:
            shares = (keep.macs, keep.params, keep.bytes, keep.latency)
            goals = _goals(stage, since=stage[0][0], start=(1.0,) * len(shares), end=shares)
        else:
            target, rank, count = recipe.target, openly.index(stage), len(openly)
            asked = (target.macs, target.params, None, target.latency)
            before, after = (
                tuple(None if share is None else share ** (number / count) for share in asked)
                for number in (rank, rank + 1)
            )
            goals = _goals(stage, since=None, start=before, end=after)
        for (index, _), goal in zip(stage, goals, strict=True):
            steps[index] = replace(steps[index], goal=replace(goal, latency_ms=keep.latency_ms if keep else None))
    return steps


def _goals(
    stage: Sequence[tuple[int, _Cut]],
    *,
    since: int | None,
    start: tuple[float | None, ...],
    end: tuple[float | None, ...],
) -> Iterator[Goal]:
    """Yield the goals of a stage's steps, from some shares (of MACs, parameters, …) to others."""
    part = cut_of(stage[0][1].step.part)
    assert part is not None
    parted = stage[0][1].step.piece is not None

    def shared(first: float | None, last: float | None) -> list[float | None]:
        if first is None or last is None:
            return [None] * len(stage)
        if parted:  # the budget is of the whole network; each part is cut to what the whole plan leaves of it
            return [last] * len(stage)
        return [first * share for share in shares(part.schedule.kind, len(stage), last / first)]

    for each in zip(*(shared(first, last) for first, last in zip(start, end, strict=True)), strict=True):
        yield Goal(since, *each)
