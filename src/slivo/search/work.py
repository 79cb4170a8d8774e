"""Workers: each takes one trial after another until there are enough, and makes good what others left."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from slivo.errors import SlivoError
from slivo.recipe import Watch
from slivo.search import store
from slivo.search.front import front
from slivo.search.ground import Ground
from slivo.search.record import Row
from slivo.search.space import first_guesses, suggest
from slivo.search.trial import TRIALS, Stop, attempt, tidy

if TYPE_CHECKING:
    import optuna

MOST_FAILURES = 5
"""Trials that may fail one after another before the search gives up."""

_SURPLUS = "another worker was first"


@dataclass(frozen=True)
class Limits:
    """When a worker ends.

    Args:
        trials: How many there are to be, over all workers.
        deadline: On the clock of `time.monotonic`, or None.
        stopped: Whether somebody else wants it to end.
    """

    trials: int
    deadline: float | None = None
    stopped: Callable[[], bool] = lambda: False

    def over(self) -> bool:
        """Whether no more is to be done, whatever the trials."""
        return self.stopped() or (self.deadline is not None and time.monotonic() >= self.deadline)


def begin(study: optuna.Study, ground: Ground) -> None:
    """Put first guesses into a study that is new."""
    if study.get_trials(deepcopy=False):
        return
    with store.quiet():
        for guess in first_guesses(ground.arms):
            study.enqueue_trial(guess)


def labor(
    study: optuna.Study, ground: Ground, limits: Limits, *, watch: Watch, tell: Callable[[Row], None], poll: float = 1.0
) -> None:
    """Take trials until there are enough.

    Once the last has begun, waits for those that other workers run: one that dies is made good.

    Args:
        study: From `slivo.search.store.open_study`.
        ground: What all trials share.
        limits: When to end.
        watch: Hears of each run.
        tell: Hears of each trial that is over.
        poll: Seconds between looks at what others do.

    Raises:
        SlivoError: If `MOST_FAILURES` trials failed one after another.
    """
    failures: list[Row] = []
    while not limits.over():
        store.revive(study)
        known = store.rows(study)
        if len(known) >= limits.trials:
            if all(row.state != "running" for row in known):
                return
            time.sleep(poll)
            continue
        row = _one(study, ground, limits, watch)
        if row is None:
            continue
        tell(row)
        failures = [*failures, row] if row.state == "failed" else []
        if len(failures) >= MOST_FAILURES:
            raise SlivoError(
                f"{len(failures)} trials in a row failed, the last one because: {row.reason}; all is in {ground.out}"
            )


def _one(study: optuna.Study, ground: Ground, limits: Limits, watch: Watch) -> Row | None:
    """Take one trial; None if it came to nothing because the search is over or there were enough."""
    import optuna

    taken: list[Row] = []

    def objective(trial: optuna.Trial) -> Sequence[float]:
        row = _started(ground, trial)
        if sum(each.number < trial.number for each in store.rows(study)) >= limits.trials:
            store.keep(trial, replace(row, state=store.LOST, reason=_SURPLUS))
            raise _Failed
        store.keep(trial, row)
        candidate = suggest(trial, ground.arms)
        found = attempt(
            ground, candidate, row, lambda: store.rows(study), watch=watch, stopping=limits.over
        )  # fmt: skip
        store.keep(trial, found)
        taken.append(found)
        if found.state == "failed":
            raise _Failed
        if not found.values:
            raise optuna.TrialPruned(found.reason)
        return found.values

    with store.quiet():
        try:
            study.optimize(objective, n_trials=1, catch=(_Failed,))
        except KeyboardInterrupt as interrupt:
            last = study.get_trials(deepcopy=False)
            mine = [each for each in last if store.row_of(each).worker == store.worker()]
            if mine and store.row_of(mine[-1]).state == store.LOST and not store.row_of(mine[-1]).reason:
                store.requeue(study, mine[-1])
            if not isinstance(interrupt, Stop):
                raise
            return None
    clean(ground, store.rows(study))
    return taken[0] if taken else None


class _Failed(Exception):  # noqa: N818
    """A trial failed; why is in its row."""


def _started(ground: Ground, trial: optuna.Trial) -> Row:
    """Return the row of a trial that begins; the folder of the one that it goes on with becomes its own."""
    name = f"{trial.number:04}"
    before, here = trial.user_attrs.get(store.CONTINUES), ground.out / TRIALS / name
    if before is not None and not here.exists():
        theirs = ground.out / TRIALS / before
        if theirs.is_dir():  # moved, so that whoever had it cannot disturb
            theirs.rename(here)
    elif here.is_dir():
        shutil.rmtree(here)
    return Row(trial.number, "running", folder=name, worker=store.worker())


def clean(ground: Ground, known: Sequence[Row]) -> None:
    """Remove the students of trials that are not on the front any more."""
    ahead = {row.folder for row in front(known)}
    for row in known:
        if row.state == "done" and row.folder not in ahead:
            tidy(ground.out / TRIALS / row.folder, student=False)


def waiting(study: optuna.Study) -> int:
    """Return how many trials were broken off and wait to be taken up."""
    import optuna

    states = (optuna.trial.TrialState.WAITING,)
    found: Sequence[Any] = study.get_trials(deepcopy=False, states=states)
    return sum(store.CONTINUES in each.user_attrs for each in found)
