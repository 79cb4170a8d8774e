"""What of an interrupted run can be relied on: damage is found before it is used, and what it spoiled is done again."""

from __future__ import annotations

from pathlib import Path

from slivo import artifact, files
from slivo.errors import ArtifactError
from slivo.recipe import course
from slivo.recipe.folder import CHECKPOINTS, COACH, kept, member
from slivo.recipe.prepare import Job
from slivo.train import checkpoint
from slivo.train.resume import places


def sound(folder: Path, job: Job, records: course.Records) -> tuple[int, list[str]]:
    """Return how many of the steps that are done need not be done again, and what was found to be damaged.

    Steps are functions of what came before them, so that one that is done again leaves what it left.

    Args:
        folder: Of the run. Checkpoints of trainings that are damaged are replaced or removed.
        job: What is run.
        records: Of the steps that are done.
    """
    found = list[str]()
    done = _others(folder, job, len(records), found)
    while done and (damaged := _damaged(folder, job, records, done)):
        done -= 1
        found.append(f"{damaged}: {job.steps[done].label} is done again")
    for file in sorted((folder / CHECKPOINTS).glob("*.fit")):
        _mend(file, found)
    return done, found


def _others(folder: Path, job: Job, done: int, found: list[str]) -> int:
    """Return the number of steps before the first that left a teacher which is damaged."""
    for index, step in enumerate(job.steps[:done]):
        places = {"teacher": folder / "teacher", "teach": folder / COACH}
        if step.kind == "member":
            places["member"] = member(folder, int(step.path[-1]))
        if step.kind in places and (damaged := _fault(places[step.kind])):
            found.append(f"{damaged}: {step.label} is done again")
            return index
    return done


def _damaged(folder: Path, job: Job, records: course.Records, done: int) -> str:
    """Say what is wrong with the students that the next step may start from; "" if nothing is."""
    sources = {course.start(job.steps, records, done, job.task.primary).source}
    turn = job.steps[done].turn if done < len(job.steps) else None
    if turn is not None and turn.since <= done:
        sources.add(course.start(job.steps, records, turn.since, job.task.primary).source)
    return next((fault for source in sorted(sources - {0}) if (fault := _fault(kept(folder, source)))), "")


def _fault(place: Path) -> str:
    try:
        artifact.verify(place)
    except ArtifactError as error:
        return str(error)
    return ""


def _mend(file: Path, found: list[str]) -> None:
    """Put the checkpoint of the epoch before in the place of a damaged one."""
    newest, previous, inside = places(file)
    damaged = {place for place in (newest, previous, inside) if place.exists() and not _readable(place)}
    for place in damaged - {newest}:
        place.unlink()
    if newest in damaged and previous.exists():
        files.copy(previous, newest)
        found.append(f"checkpoint {newest} is damaged: the training goes on from the one before")
    elif newest in damaged:
        for place in (newest, inside):
            place.unlink(missing_ok=True)
        found.append(f"checkpoint {newest} is damaged: the training begins again")
        return
    found += [f"checkpoint {place} is damaged: the training goes on from another" for place in damaged - {newest}]


def _readable(place: Path) -> bool:
    try:
        checkpoint.read(place)
    except ArtifactError:
        return False
    return True
