"""The course of a run: from which student a step starts, at which pace, or why it is left out.

All of it follows from what the steps before have measured, so that a run that was killed goes the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slivo.recipe.plan import Round, Step
from slivo.recipe.text import Path

Records = Sequence[Mapping[str, Any]]
"""What ``run.json`` holds of the steps that are done."""

SKIPPED = "left out"
"""Detail of a step that was not done: why."""


@dataclass(frozen=True)
class Start:
    """How a step begins.

    Args:
        source: The step that left the student; 0 if there is none yet.
        pace: 1, or what halvings have left of it.
        skip: Why the step is left out; "" if it is not.
    """

    source: int
    pace: float = 1.0
    skip: str = ""


@dataclass(frozen=True)
class Verdict:
    """What became of a round.

    Args:
        held: Whether it lost no more than it may.
        reached: Whether all costs are where they should be.
        why: The figures.
    """

    held: bool
    reached: bool
    why: str


@dataclass
class _Walk:
    """What became of the steps before one: those whose work is in the student, and of rounds, by their place."""

    line: list[int] = field(default_factory=list)
    failed: dict[Path, int] = field(default_factory=dict)
    over: dict[Path, str] = field(default_factory=dict)


def start(steps: Sequence[Step], records: Records, index: int, primary: str) -> Start:
    """Return how a step begins, given the records of those before it.

    Args:
        steps: Of the run.
        records: At least ``index`` of them.
        index: Of the step; their number for what the run ends with.
        primary: Name of the metric.
    """
    walk = _walk(steps, records, index, primary)
    source = walk.line[-1] if walk.line else 0
    here = steps[index].turn if index < len(steps) else None
    if here is None:
        return Start(source)
    return Start(source, 0.5 ** walk.failed.get(here.place, 0), walk.over.get(here.place, ""))


def line(steps: Sequence[Step], records: Records, index: int, primary: str) -> list[int]:
    """Return the steps whose work is in the student that a step starts from: none that was taken back."""
    return _walk(steps, records, index, primary).line


def _walk(steps: Sequence[Step], records: Records, index: int, primary: str) -> _Walk:
    walk = _Walk()
    for number in range(index):
        turn = steps[number].turn
        if SKIPPED in records[number]["details"]:
            continue
        if steps[number].kind == "teach":
            walk.line.clear()
        else:
            walk.line.append(number)
        if turn is None or not ends(steps, number):
            continue
        found = judge(turn, records, number, primary)
        if not found.held:
            walk.line = [done for done in walk.line if done < turn.since]
            walk.failed[turn.place] = walk.failed.get(turn.place, 0) + 1
            if walk.failed[turn.place] > turn.until.halvings:
                walk.over[turn.place] = "the pace has been halved as often as it may"
        elif found.reached:
            walk.over[turn.place] = "the rounds before reached what was asked"
    return walk


def ends(steps: Sequence[Step], index: int) -> bool:
    """Tell whether a step is the last of its round."""
    return steps[index].turn is not None and (index + 1 == len(steps) or steps[index + 1].turn != steps[index].turn)


def judge(turn: Round, records: Records, index: int, primary: str) -> Verdict:
    """Judge a round by what its last step left.

    Args:
        turn: The round.
        records: Of the steps, that of the round's last one included.
        index: Of that.
        primary: Name of the metric.
    """
    until, teacher, after = turn.until, records[0]["after"], records[index]["after"]
    drop = teacher[primary] - after[primary]
    held = until.max_drop is None or drop <= until.max_drop + 1e-6
    limits = {name: share for name in ("macs", "params", "bytes") if (share := getattr(until, name)) is not None}
    reached = bool(limits) and all(after[name] <= share * teacher[name] for name, share in limits.items())
    said = [
        f"{name} {after[name] / teacher[name]:.1%} of the teacher's, {share:.1%} asked"
        for name, share in limits.items()
    ]
    if until.max_drop is not None:
        said.insert(0, f"{primary} {100 * drop:.2f} points below the teacher's, {100 * until.max_drop:.2f} allowed")
    return Verdict(held, reached, "; ".join(said))


def decision(steps: Sequence[Step], records: Records, index: int, primary: str) -> dict[str, str] | None:
    """Return what ``run.json`` says of a round that a step ended; None if it ended none."""
    turn = steps[index].turn
    if turn is None or not ends(steps, index):
        return None
    found = judge(turn, records, index, primary)
    if not found.held:
        pace = start(steps, records, index + 1, primary)
        left = (
            "" if index + 1 == len(steps) or steps[index + 1].turn is None else f"; the next goes at pace {pace.pace:g}"
        )
        return {
            "stage": steps[index].label,
            "what": "took the round back",
            "why": found.why + ("" if pace.skip else left),
        }
    what = "ended the rounds" if found.reached else "went on"
    return {"stage": steps[index].label, "what": what, "why": found.why}
