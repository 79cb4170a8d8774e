"""A file is the old one or the new one, never a part."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from slivo import files
from slivo.errors import ArtifactError


@pytest.mark.parametrize("fault", ["fsync", "replace"])
def test_the_old_file_stays_whole_until_the_new_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    path = tmp_path / "letter"
    files.write(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*(("os.fsync", fail) if fault == "fsync" else (Path, "replace", fail)))
        with pytest.raises(ArtifactError, match="letter cannot be written: No space left on device"):
            files.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["letter"]
    files.write(path, "neu – ü")
    assert path.read_text(encoding="utf-8") == "neu – ü"


def test_what_a_kill_left_behind_goes_once_nobody_can_be_writing_it(tmp_path: Path) -> None:
    dead, alive, other = (tmp_path / name for name in (".a[1].00.partial", ".a[1].11.partial", ".a1.22.partial"))
    for left in (dead, alive, other):
        left.write_bytes(b"half")
    os.utime(dead, times=(time.time() - 7200,) * 2)
    os.utime(other, times=(time.time() - 7200,) * 2)
    files.write(tmp_path / "a[1]", b"whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == [other.name, alive.name, "a[1]"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_nothing_is_left_behind_by_what_is_no_fault_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def fail(*_: object) -> None:
        raise error

    files.write(tmp_path / "letter", b"old")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(error):
        files.write(tmp_path / "letter", b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("letter", b"old")]


def test_a_file_may_be_read_by_whom_the_process_lets_read(tmp_path: Path) -> None:
    files.write(tmp_path / "letter", b"dear")
    (tmp_path / "plain").write_bytes(b"dear")
    assert (tmp_path / "letter").stat().st_mode == (tmp_path / "plain").stat().st_mode


WRITER = """
import sys
from pathlib import Path
from slivo import files
for _ in range(25):
    files.write(Path(sys.argv[1]), sys.argv[2].encode() * int(sys.argv[3]))
"""


def test_of_several_writers_each_reader_sees_one_whole_version(tmp_path: Path) -> None:
    path, versions = tmp_path / "letter", [b"a" * 40_000, b"b" * 70_000, b"c" * 100_000]
    files.write(path, versions[0])
    failed: list[Exception] = []

    def write(version: bytes) -> None:
        try:
            for _ in range(25):
                files.write(path, version)
        except Exception as error:
            failed.append(error)

    command = [sys.executable, "-c", WRITER, str(path), "a", "40000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    threads = [threading.Thread(target=write, args=(version,)) for version in versions]
    for thread in threads:
        thread.start()
    seen = set()
    while process.poll() is None or any(thread.is_alive() for thread in threads):
        seen.add(path.read_bytes())
    for thread in threads:
        thread.join()
    assert process.communicate()[1] == ""
    assert process.returncode == 0
    assert not failed
    assert seen <= set(versions)
    assert [file.name for file in tmp_path.iterdir()] == ["letter"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "inner", tmp_path / ("n" * 300)):
        with pytest.raises(ArtifactError, match=r"cannot be written: (Not a directory|File exists|File name too long)"):
            files.write(path, b"")
