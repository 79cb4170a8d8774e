"""The study: what Optuna keeps for all workers, and how trials become rows of ours."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slivo.errors import SlivoError, require
from slivo.search.record import Row

if TYPE_CHECKING:
    import optuna

HEARTBEAT = 60
"""Seconds between signs of life of a worker; a trial whose worker gave none for three times as long is taken over."""

ROW = "row"
CONTINUES = "continues"
LOST = "lost"


def digest(*parts: object) -> str:
    """Return what tells one search from another."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def default_url(out: Path) -> str:
    """Return where a search is kept if nothing else is said."""
    return f"sqlite:///{out / 'search.db'}"


@contextmanager
def saying(url: str) -> Iterator[None]:
    """Say in a line what is wrong with a database that fails while it is used."""
    lib = _optuna()
    try:
        yield
    except lib.exceptions.StorageInternalError as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise SlivoError(
            f"storage {_safe(url)} failed: {cause}; the same command goes on once it is there again"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna from printing, and from warning that what is used here is new."""
    lib, log = _optuna(), logging.getLogger("optuna")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="optuna.*")
            warnings.filterwarnings("ignore", category=lib.exceptions.ExperimentalWarning)
            yield
    finally:
        log.setLevel(level)


def open_study(url: str, name: str, costs: Sequence[str], *, seed: int, heartbeat: int = HEARTBEAT) -> optuna.Study:
    """Open a study, or make it.

    Args:
        url: Of a database, as SQLAlchemy has it.
        name: Of the study; several share a database.
        costs: The objectives beside the task's metric.
        seed: Of what is tried.
        heartbeat: Seconds between signs of life.

    Raises:
        SlivoError: If the database cannot be opened.
    """
    lib = _optuna()
    try:
        storage = lib.storages.RDBStorage(
            url,
            engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {},
            heartbeat_interval=heartbeat,
            grace_period=3 * heartbeat,
            heartbeat_stale_trial_callback=requeue,
        )
        study: optuna.Study = lib.create_study(
            storage=storage,
            study_name=name,
            directions=["maximize", *("minimize" for _ in costs)],
            load_if_exists=True,
            sampler=_sampler_class()(seed),
        )
        return study
    except ImportError as error:
        raise SlivoError(
            f"storage {_safe(url)} needs its database's driver, which is not installed; for PostgreSQL: pip install "
            "'slivo[scale]'"
        ) from error
    except Exception as error:  # of whatever database and driver
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SlivoError(
            f"storage {_safe(url)} cannot be opened: {told}; give a URL as sqlite:///search.db or "
            "postgresql+psycopg://user@host/name"
        ) from error


def requeue(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Let a trial that was broken off be taken up by the next worker, with the same choices."""
    lib = _optuna()
    folder = row_of(trial).folder or trial.user_attrs.get(CONTINUES)
    chosen = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    with quiet():
        study.add_trial(
            lib.create_trial(
                state=lib.trial.TrialState.WAITING,
                user_attrs={} if folder is None else {CONTINUES: folder},
                system_attrs={"fixed_params": chosen},
            )
        )


def revive(study: optuna.Study) -> None:
    """Let trials be taken up whose workers gave no sign of life for long."""
    lib = _optuna()
    interval = study._storage.get_heartbeat_interval()  # type: ignore[attr-defined]
    with quiet():
        lib.storages.fail_stale_trials(study)
        # A worker that dies between taking a trial and its first sign of life is not found by that.
        for trial in study.get_trials(deepcopy=False, states=(lib.trial.TrialState.RUNNING,)):
            begun = trial.datetime_start
            silent = 0.0 if begun is None else (datetime.now() - begun).total_seconds()
            if ROW not in trial.user_attrs and silent > 3 * interval:
                study.tell(trial.number, state=lib.trial.TrialState.FAIL)
                requeue(study, trial)


def row_of(trial: optuna.trial.FrozenTrial) -> Row:
    """Return what is known of a trial."""
    kept: dict[str, Any] = dict(trial.user_attrs.get(ROW, {}))
    for name in ("values", "misses"):
        kept[name] = tuple(kept.get(name, ()))
    kept["curve"] = tuple((share, value) for share, value in kept.get("curve", ()))
    kept |= {"number": trial.number}
    if not trial.state.is_finished():
        kept["state"] = "running"
    elif kept.get("state", "running") == "running":
        kept["state"] = LOST
    return Row(**kept)


def rows(study: optuna.Study) -> list[Row]:
    """Return the trials of a study that count: those that were broken off, or wait to be taken up, do not."""
    states = _optuna().trial.TrialState
    found = [row_of(each) for each in study.get_trials(deepcopy=False) if each.state != states.WAITING]
    return [row for row in found if row.state != LOST]


def keep(trial: optuna.Trial, row: Row) -> None:
    """Write what is known of a trial to the study."""
    trial.set_user_attr(ROW, asdict(row))


def worker() -> str:
    """Return the name of this worker: its machine and its process."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _safe(url: str) -> str:
    """Return a URL without the password in it."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if "@" in rest else url


def _optuna() -> Any:
    return require("optuna", extra="search", why="slivo search")


def _sampler_class() -> Any:
    """Return a sampler whose choices are a function of the seed, the trial's number and the trials that are done."""
    lib = _optuna()

    class Numbered(lib.samplers.BaseSampler):  # type: ignore[misc, name-defined]
        """The tree-structured Parzen estimator, seeded anew for each trial: many workers do not repeat one another."""

        def __init__(self, seed: int) -> None:
            self.seed, self.inner = seed, lib.samplers.TPESampler(seed=seed)

        def before_trial(self, study: Any, trial: Any) -> None:
            entropy = np.random.SeedSequence([self.seed % 2**63, trial.number]).generate_state(1)[0]
            with quiet():
                self.inner = lib.samplers.TPESampler(
                    seed=int(entropy),
                    multivariate=True,
                    group=True,
                    constant_liar=True,
                    warn_independent_sampling=False,
                )
            self.inner.before_trial(study, trial)

        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return self.inner.infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            return self.inner.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return self.inner.sample_independent(study, trial, param_name, param_distribution)

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            self.inner.after_trial(study, trial, state, values)

    return Numbered
