"""Searches that are interrupted, killed, shared, out of luck or out of time: nothing is lost, and all is said."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import toys
from toys import Killed, Killer

from slivo.errors import RecipeError, SlivoError
from slivo.recipe import Watch
from slivo.search import search, store, trial, work


class Interrupter(Watch):
    """Interrupts the n-th training, once it is going on."""

    def __init__(self, which: int) -> None:
        self.left = which

    def progress(self, label: str, done: int, *_: object) -> None:
        if label.startswith(f"trial {self.left}: distill") and done == 3:
            raise KeyboardInterrupt


def test_an_interrupt_loses_nothing(tmp_path: Path) -> None:
    whole = search(toys.searched(), tmp_path / "whole", trials=2)
    with pytest.raises(KeyboardInterrupt):
        search(toys.searched(), tmp_path / "s", trials=2, watch=Interrupter(1))
    assert json.loads((tmp_path / "s" / "trials" / "0001" / "run.json").read_text())["error"] == "interrupted"
    seen: list[str] = []

    class Seeing(Watch):
        def started(self, label: str, *_: object) -> None:
            seen.append(label)

    again = search(toys.searched(), tmp_path / "s", trials=2, watch=Seeing())
    # The trial goes on under a number of its own with what it had chosen and done.
    assert [row.settings for row in again.rows] == [row.settings for row in whole.rows]
    assert [row.values for row in again.rows] == [row.values for row in whole.rows]
    assert seen == ["trial 2: distill", "trial 2: measure"]
    assert not (tmp_path / "s" / "trials" / "0001").exists()
    assert again.waiting == 0


def test_the_trial_of_a_worker_that_died_is_taken_over(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        search(toys.searched(), tmp_path / "s", trials=2, watch=Killer("progress", "trial 1: distill", 2), heartbeat=1)
    found = search(toys.searched(), tmp_path / "s", trials=2, heartbeat=1)
    assert [row.state for row in found.rows] == ["done", "done"]
    assert [row.number for row in found.rows] == [0, 2]
    whole = search(toys.searched(), tmp_path / "whole", trials=2)
    assert [row.values for row in found.rows] == [row.values for row in whole.rows]


def test_workers_that_join_share_the_trials(tmp_path: Path) -> None:
    found = search(toys.searched(), tmp_path / "s", trials=2, jobs=2)
    counting = [row for row in found.rows if row.state != "running"]
    assert len(counting) == 2
    assert all(row.reason or row.values for row in counting)
    assert {row.worker.partition(":")[0] for row in counting} == {counting[0].worker.partition(":")[0]}


def test_time_that_is_up_breaks_off_and_the_next_start_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = toys.recipe({"finetune": {"epochs": 500, "batch_size": 16}}, teacher=toys.searched()["teacher"], target={})
    long["search"] = {"vary": {"stages.0.finetune.epochs": [500]}}
    found = search(long, tmp_path / "s", trials=1, timeout=0.001)
    assert found.rows == ()
    steps: list[int] = []

    class Counting(Watch):
        def progress(self, label: str, done: int, *_: object) -> None:
            steps.extend([done] * label.startswith("trial"))

    # The clock strikes in the middle of the training, however long the way to it was.
    monkeypatch.setattr(work.Limits, "over", lambda limits: len(steps) > 9)
    found = search(long, tmp_path / "s", trials=1, watch=Counting())
    assert found.rows == ()
    assert found.best is None
    assert found.recipe is None
    assert found.waiting == 1


def test_a_trial_that_fails_says_why_and_the_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trial.run

    def failing(loaded: Any, folder: Any, **options: Any) -> Any:
        if loaded.recipe.stages[0].prune.criterion == "l1":
            raise RuntimeError("out of luck\nin many lines")
        return real(loaded, folder, **options)

    monkeypatch.setattr(trial, "run", failing)
    vary = {"stages.0.prune.criterion": ["l1", "l2"], "target.macs": {"low": 0.3, "high": 0.5}}
    found = search(toys.searched(vary), tmp_path / "s", trials=4)
    failed = [row for row in found.rows if row.settings["stages.0.prune.criterion"] == "l1" and row.state != "refused"]
    assert failed
    assert {(row.state, row.reason) for row in failed} == {("failed", "out of luck")}
    assert found.best is not None
    only = toys.searched({"stages.0.prune.criterion": ["l1"], "target.macs": {"low": 0.3, "high": 0.5}})
    with pytest.raises(SlivoError, match=r"5 trials in a row failed, the last one because: out of luck; all is in"):
        search(only, tmp_path / "t", trials=9)
    assert len(json.loads((tmp_path / "t" / "search.json").read_text())["trials"]) == 5


def test_what_is_far_behind_is_stopped_and_what_cannot_be_had_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "refused", lambda *_: "")
    vary = {"stages.1.distill.optimizer.lr": [0.05, 1e-9], "stages.0.prune.criterion": ["random"], "target.macs": [0.2]}
    stages = [{"prune": {}}, {"distill": {**toys.KD, "epochs": 2, "optimizer": {"lr": 0.05}}}]
    spec = {**toys.searched(), "stages": stages, "search": {"vary": vary, "margin": 0.01}}
    found = search(spec, tmp_path / "s", trials=5)
    assert found.rows[0].state == "done"
    stopped = [row for row in found.rows if row.state == "stopped"]
    assert stopped
    assert "trial 0, which costs no more" in stopped[0].reason
    assert stopped[0].settings["stages.1.distill.optimizer.lr"] == 1e-9
    assert {row.state for row in found.rows if row.settings == stopped[0].settings} <= {"stopped", "refused"}
    assert [row for row in found.rows if row.reason.startswith("it is the same as trial")]
    assert not (found.folder / "trials" / stopped[0].folder / "student").exists()
    # No network is that small.
    tiny = search(toys.searched({"target.macs": [0.5, 0.001]}), tmp_path / "t", trials=5)
    assert [row for row in tiny.rows if row.state == "refused" and "cannot be met" in row.reason]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trials": 0}, SlivoError, "trials is 0; a whole number, 1 or more"),
        ({"jobs": 1.5}, SlivoError, "jobs is 1.5; a whole number"),
        ({"timeout": 0}, SlivoError, "timeout is 0; seconds, a number above 0"),
        ({"costs": ["mac"]}, RecipeError, "the cost mac is none, .* Did you mean macs"),
        ({"costs": ["macs", "macs"]}, RecipeError, "the cost macs is none, or there twice"),
        ({"storage": "nothing://x"}, SlivoError, "storage nothing://x cannot be opened: "),
        ({"storage": "sqlite:////no/such/folder/x.db"}, SlivoError, "storage sqlite:////no.* cannot be opened: "),
        ({"storage": "mysql://me:secret@host/x"}, SlivoError, "storage mysql://host/x needs its database's driver"),
    ],
)
def test_options_that_are_wrong_are_said_in_a_line(
    options: dict[str, Any], error: type[SlivoError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        search(toys.searched(), tmp_path / "s", **{"trials": 1, **options})
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_folder_that_is_damaged_or_a_storage_that_goes_is_said(tmp_path: Path) -> None:
    search(toys.searched(), tmp_path / "s", trials=1)
    (tmp_path / "s" / "search.db").write_text("no database")
    with pytest.raises(SlivoError, match=r"cannot be opened: .*not a database"):
        search(toys.searched(), tmp_path / "s", trials=2)


def test_a_trial_whose_worker_died_before_a_sign_of_life_is_taken_up(tmp_path: Path) -> None:
    with store.quiet():
        opened = store.open_study(f"sqlite:///{tmp_path / 's.db'}", "toy", ["macs"], seed=0, heartbeat=1)
        opened.enqueue_trial({"x": 0.5})
        opened.ask()
        store.revive(opened)
        assert [each.state.name for each in opened.trials] == ["RUNNING"]
        time.sleep(3.1)
        store.revive(opened)
        assert [each.state.name for each in opened.trials] == ["FAIL", "WAITING"]
        assert store.rows(opened) == []
        assert opened.ask().suggest_float("x", 0, 1) == 0.5
