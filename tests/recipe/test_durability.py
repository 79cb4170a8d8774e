"""Runs that meet full disks, damaged files, lost data, other processes and signals: said in a line, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor
from torch.utils.data import Dataset
from toys import Killed, Killer, read, same, timeless

import slivo
from slivo.errors import ArtifactError, OutputError, SlivoError
from slivo.recipe import Result, Watch, folder, load, run, stop
from slivo.tasks import Task

FIT = {"epochs": 2, "batch_size": 16}
SHORT = toys.recipe({"prune": {}}, {"finetune": FIT}, {"distill": {**toys.KD, "epochs": 1}})
TOUCHY = toys.recipe(
    {"finetune": {"epochs": 1, "batch_size": 16, "optimizer": {"lr": 40.0, "momentum": 0.0}}},
    task={"kind": "image-classification", "data": "toys:touchy_task"},
    target={},
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(load(SHORT), tmp_path_factory.mktemp("runs") / "whole")


def assert_like(whole: Result, path: Path, result: Result) -> None:
    """What was mended is among the decisions; all else is as if nothing had happened."""
    assert same(result.model, whole.model)
    (book, *found), (expected, *others) = (timeless(read(each)) for each in (path, whole.folder))
    book["decisions"] = [each for each in book["decisions"] if each["what"] != "recovered"]
    assert [book, *found] == [expected, *others]
    names = [sorted(str(file.relative_to(each)) for file in each.rglob("*")) for each in (path, whole.folder)]
    assert names[0] == names[1]


def broken_off(path: Path, *moment: Any) -> None:
    with pytest.raises(Killed):
        run(load(SHORT), path, watch=Killer(*moment))


def one_line(error: BaseException) -> bool:
    return len(str(error).splitlines()) == 1


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file grows beyond a size: what a full disk says, at real writes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [0, 4000])
def test_a_full_disk_is_said_in_a_line_and_the_run_goes_on_once_there_is_room(
    size: int, whole: Result, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    with disk_of(size), pytest.raises(SlivoError, match=r"cannot be written.*: .*[Ff]ile too large") as caught:
        run(load(SHORT), path)
    assert one_line(caught.value)
    assert not list(path.rglob("*.partial"))
    assert_like(whole, path, run(load(SHORT), path, resume=path.exists()))


@pytest.mark.parametrize(("fault", "call"), [(errno.ENOSPC, 1), (errno.EROFS, 6), (errno.ENOSPC, 17)])
def test_a_disk_that_fails_in_the_midst_of_a_run_loses_nothing(
    fault: int, call: int, whole: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls, fsync = tmp_path / "run", count(1), os.fsync

    def full(descriptor: int) -> None:
        if next(calls) >= call:
            raise OSError(fault, os.strerror(fault))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ArtifactError, match=f"cannot be written: {os.strerror(fault)}") as caught:
            run(load(SHORT), path)
    assert one_line(caught.value)
    assert_like(whole, path, run(load(SHORT), path, resume=path.exists()))


def test_a_folder_that_cannot_be_made_or_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written to: Not a directory; give another folder"):
        run(load(SHORT), tmp_path / "file" / "run")

    def refused(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:  # permissions do not stop root, as whom tests may run
        patch.setattr(os, "open", refused)
        with pytest.raises(OutputError, match="cannot be written to: Permission denied; give another folder"):
            run(load(SHORT), tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


class Files(Dataset[tuple[Tensor, Tensor]]):
    """Samples that are files, which may go."""

    def __init__(self, folder: Path, data: Dataset[Any]) -> None:
        self.places = [folder / f"{index}.pt" for index in range(96)]
        for index, place in enumerate(self.places):
            torch.save(data[index], place)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        return torch.load(self.places[index])


def test_data_that_vanish_are_named_and_the_run_goes_on_once_they_are_back(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    task: Task = replace(toys.task(), train=Files(tmp_path / "data", toys.task().train))
    lost = tmp_path / "data" / "17.pt"
    content = lost.read_bytes()

    class Loses(Watch):
        def progress(self, label: str, done: int, *_: Any) -> None:
            if (label, done) == ("finetune", 3):
                lost.unlink(missing_ok=True)

    expected = run(load(SHORT), tmp_path / "whole", task=task)
    with pytest.raises(SlivoError, match=r"^finetune: .*No such file or directory: .*17\.pt.*go on with --resume") as e:
        run(load(SHORT), tmp_path / "run", task=task, watch=Loses())
    assert one_line(e.value)
    assert "17.pt" in json.loads((tmp_path / "run" / "run.json").read_text())["error"]
    lost.write_bytes(content)
    assert_like(expected, tmp_path / "run", run(load(SHORT), tmp_path / "run", task=task, resume=True))


def test_a_folder_is_one_process_at_a_time_and_the_lock_dies_with_it(whole: Result, tmp_path: Path) -> None:
    path = tmp_path / "run"
    broken_off(path, "progress", "finetune", 2)
    code = (
        "import fcntl, os, sys, time\nd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(d, fcntl.LOCK_EX)\nos.write(d, f'{os.getpid()}\\n'.encode())\nprint(flush=True)\ntime.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, path / folder.LOCK], stdout=subprocess.PIPE)
    with other:
        assert other.stdout is not None
        other.stdout.readline()
        before = (path / "run.json").read_text()
        for resume in (False, True):
            with pytest.raises(OutputError, match=f"run is in use by process {other.pid}; wait until .*, or stop it"):
                run(load(SHORT), path, resume=resume)
        assert (path / "run.json").read_text() == before
        other.kill()
    assert (path / folder.LOCK).exists()
    assert_like(whole, path, run(load(SHORT), path, resume=True))


def test_a_lock_that_another_removes_as_it_ends_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the file and locking it, its holder may remove it: the next one must not lock what is gone."""
    lock, gone = folder._lock, iter([True, False])

    def removed(descriptor: int) -> bool:
        if next(gone):
            (tmp_path / folder.LOCK).unlink()
        return lock(descriptor)

    monkeypatch.setattr(folder, "_lock", removed)
    with folder.held(tmp_path):
        monkeypatch.setattr(folder, "_lock", lock)
        with pytest.raises(OutputError, match=f"process {os.getpid()}"), folder.held(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_killed_before_it_wrote_anything_begins(whole: Result, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    for name in (folder.LOCK, ".run.json.0f.partial"):
        (path / name).write_text("123")
    assert_like(whole, path, run(load(SHORT), path, resume=True))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "cut": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
}


@pytest.mark.parametrize(
    ("damage", "files", "why"),
    [
        ("flipped", ["checkpoints/002.fit"], "goes on from the one before"),
        ("cut", ["checkpoints/002.fit.previous"], "goes on from another"),
        ("emptied", ["checkpoints/002.fit.inside"], "goes on from another"),
        ("emptied", ["checkpoints/002.fit", "checkpoints/002.fit.previous"], "the training begins again"),
        ("cut", ["checkpoints/001/model.safetensors"], "prune is done again"),
        ("flipped", ["teacher/model.safetensors", "checkpoints/002.fit"], "teacher is done again"),
    ],
)
def test_damage_is_found_before_it_is_used(
    damage: str, files: list[str], why: str, whole: Result, tmp_path: Path
) -> None:
    path, asked = tmp_path / "run", count()
    with pytest.raises(KeyboardInterrupt):
        run(load(SHORT), path, stop=lambda: next(asked) == 28)  # in the second epoch of the finetuning
    for name in files:
        content = (path / name).read_bytes()
        (path / name).write_bytes(DAMAGES[damage](content))
    assert_like(whole, path, run(load(SHORT), path, resume=True))
    decisions = json.loads((path / "run.json").read_text())["decisions"]
    told = [each["why"] for each in decisions if each["what"] == "recovered"]
    assert why in " ".join(told)
    assert len(told) == (1 if why == "the training begins again" else len(files))


def test_of_two_stages_that_are_kept_the_older_serves_if_the_newer_is_damaged(whole: Result, tmp_path: Path) -> None:
    path = tmp_path / "run"
    broken_off(path, "started", "distill")
    assert sorted(file.name for file in (path / "checkpoints").iterdir()) == ["001", "002"]
    (path / "checkpoints" / "002" / "slivo.json").write_text("{}")
    seen = list[str]()

    class Sees(Watch):
        def started(self, label: str, *_: Any) -> None:
            seen.append(label)

    assert_like(whole, path, run(load(SHORT), path, resume=True, watch=Sees()))
    assert seen == ["finetune", "distill", "measure"]
    done = path / "student" / "model.safetensors"
    done.write_bytes(done.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="is damaged"):
        run(load(SHORT), path, resume=True)


def test_a_lost_loss_goes_back_and_is_told_and_that_survives_interruptions(tmp_path: Path) -> None:
    expected = run(load(TOUCHY), tmp_path / "whole")
    book, rows, _ = read(expected.folder)
    backs = [each for each in book["decisions"] if each["what"] == "rolled back"]
    assert [each["why"].rpartition(", ")[2] for each in backs] == ["20", "10"]
    assert all("loss is not finite at epoch 1, step" in each["why"] for each in backs)
    assert len(rows[-1]["rolled_back"]) == 2
    for calls in (20, 23):
        path, asked = tmp_path / str(calls), count()
        with pytest.raises(KeyboardInterrupt):
            run(load(TOUCHY), path, stop=lambda asked=asked, calls=calls: next(asked) == calls)  # type: ignore[misc]
        assert_like(expected, path, run(load(TOUCHY), path, resume=True))


def test_a_hopeless_loss_gives_up_with_the_reason(tmp_path: Path) -> None:
    hopeless = {"finetune": {**FIT, "optimizer": {"lr": 1e6, "momentum": 0.0}}}
    recipe = {**TOUCHY, "stages": [hopeless]}
    with pytest.raises(SlivoError, match=r"the loss is not finite .* went back 3 times .* in vain") as caught:
        run(load(recipe), tmp_path / "run")
    assert one_line(caught.value)
    assert "in vain" in json.loads((tmp_path / "run" / "run.json").read_text())["error"]


@pytest.mark.parametrize("calls", [0, 9, 19])
def test_a_run_that_is_asked_to_stop_does_so_within_the_epoch(calls: int, whole: Result, tmp_path: Path) -> None:
    path, asked = tmp_path / "run", count()
    with pytest.raises(KeyboardInterrupt):
        run(load(SHORT), path, stop=lambda: next(asked) == calls)
    assert json.loads((path / "run.json").read_text())["error"] == "interrupted"
    assert_like(whole, path, run(load(SHORT), path, resume=True))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_asks_then_breaks_off(number: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "SOFT", 0.05)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    ends = list[stop.Stop]()
    with pytest.raises(KeyboardInterrupt), stop.stopping(ends.append) as asked:  # noqa: PT012
        assert not asked()
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert asked()
        assert asked.code == code
        time.sleep(30)
    assert asked.late
    assert not ends
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_signal_or_one_that_nothing_heeds_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def end(_: stop.Stop) -> None:
        ended.set()

    with stop.stopping(end) as asked:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        assert not ended.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert ended.wait(10)
    assert asked.code == 130
    ended.clear()
    monkeypatch.setattr(stop, "SOFT", 0.05)
    monkeypatch.setattr(stop, "HARD", 0.2)
    with stop.stopping(end):
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            time.sleep(30)
        except KeyboardInterrupt:
            assert ended.wait(10)  # swallowed, as code of others may


def test_one_that_stops_in_time_is_left_alone() -> None:
    ends = list[stop.Stop]()
    with stop.stopping(ends.append) as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert asked()
    with stop.stopping(ends.append) as asked:
        assert not asked()
    found = list[bool]()

    def elsewhere() -> None:
        with stop.stopping(ends.append) as asked:
            found.append(asked())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [False]
    assert not ends


def test_what_is_left_of_a_kill_while_the_result_is_written_is_finished(whole: Result, tmp_path: Path) -> None:
    path = tmp_path / "run"
    broken_off(path, "started", "measure")
    (path / ".student-x1").mkdir()
    (path / ".student-x1" / "model.safetensors").write_text("half")
    assert_like(whole, path, run(load(SHORT), path, resume=True))
    (path / "checkpoints" / "003").mkdir(parents=True)  # killed while these were removed
    assert_like(whole, path, run(load(SHORT), path, resume=True))
    assert slivo.load(path / "student") is not None
