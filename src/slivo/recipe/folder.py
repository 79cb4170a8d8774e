"""The files of a run: each is whole at any instant, whatever happens to the process or the machine."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from slivo import files
from slivo.errors import ArtifactError, OutputError

FORMAT = 1
"""Version of the run folder."""

RUN = "run.json"
EPOCHS = "metrics.jsonl"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
COACH = "coach"
"""Holds a student that became the teacher."""

MEMBERS = "teachers"
LOCK = ".lock"
"""Held by the process that runs in the folder."""

_LITTER = (
    f".{RUN}.*.partial",
    f".{EPOCHS}.*.partial",
    f".{SUMMARY}.*.partial",
    ".teacher-*",
    ".student-*",
    ".coach-*",
    LOCK,
)
"""What a process that was killed while it wrote may leave beside what it wrote."""


@contextmanager
def making(path: Path) -> Iterator[None]:
    """Say of a folder that it cannot be made or written to, where that is so."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written to: {error.strerror or error}; give another folder (--out)"
        ) from error


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep a folder for one process at a time; the lock of a process that is gone counts for nothing.

    Args:
        path: The folder; made with its parents.

    Raises:
        OutputError: If another process runs in it, or it cannot be made or written to.
    """
    with making(path):
        made = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path / LOCK)
    if descriptor is None:
        raise OutputError(f"{path} is in use by process {_holder(path)}; wait until its run is done, or stop it")
    try:
        yield
    finally:
        with suppress(OSError):
            (path / LOCK).unlink()
        os.close(descriptor)
        if made:
            with suppress(OSError):  # it stays unless it is empty
                path.rmdir()


def _locked(file: Path) -> int | None:
    """Return a descriptor of the file, locked, or None if another has locked it."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _lock(descriptor):
                os.close(descriptor)
                return None
            # Who held it may have removed it meanwhile, and then a lock on it keeps nobody out.
            if file.exists() and os.fstat(descriptor).st_ino == file.stat().st_ino:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # of POSIX; elsewhere nobody is kept out
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(path: Path) -> str:
    with suppress(OSError):
        return (path / LOCK).read_text(encoding="utf-8").strip() or "unknown"
    return "unknown"


def begun(path: Path) -> bool:
    """Tell whether a run that is to be resumed has written anything down; a kill may have come before."""
    return (path / RUN).is_file() or not _bare(path)


def open_new(path: Path) -> None:
    """Take a folder for a run; the process holds it already.

    Args:
        path: The folder. It must be empty but for what killed processes may have left.

    Raises:
        OutputError: If it is not empty.
    """
    if not _bare(path):
        hint = "add --resume to go on with its run" if (path / RUN).is_file() else "it is not the folder of a run"
        raise OutputError(f"{path} exists and is not empty; {hint}, or give another folder (--out)")


def sweep(path: Path) -> None:
    """Remove what killed processes left half written in the folder of a run; for who holds it."""
    for left in [*path.iterdir(), *path.glob(f"{MEMBERS}/.*")]:
        if left.parent != path or _litter(left):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            elif left.name != LOCK:
                left.unlink(missing_ok=True)


def member(path: Path, index: int) -> Path:
    """Return the folder of one that teaches beside the teacher."""
    return path / MEMBERS / str(index + 2)


def kept(path: Path, index: int) -> Path:
    """Return the folder that holds the student after a step, as long as a step may start from it."""
    return path / CHECKPOINTS / f"{index:03}"


def _bare(path: Path) -> bool:
    """Tell whether there is nothing in a folder that anybody would miss."""
    return all(map(_litter, path.iterdir()))


def _litter(file: Path) -> bool:
    return any(file.match(pattern) for pattern in _LITTER)


def read_json(path: Path) -> dict[str, Any]:
    """Read an object.

    Raises:
        ArtifactError: If the file is missing or damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path.parent} is not the folder of a run: it has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}; restore it, or start again in another folder") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} is damaged: it holds no object; restore it, or start again in another folder")
    return found


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write an object, atomically; what is no finite number becomes null."""
    files.write(path, json.dumps(_plain(data), indent=2, allow_nan=False) + "\n")


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line with an object to a file."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(row), allow_nan=False) + "\n")
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a file, one a line; a last line that is cut off, as a kill may leave it, is left out."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write objects, one a line, atomically."""
    files.write(path, "".join(json.dumps(_plain(row), allow_nan=False) + "\n" for row in rows))


def _plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
