"""The files of a run: each is whole at any instant, whatever happens to the process or the machine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slivo import files
from slivo.errors import ArtifactError, OutputError

FORMAT = 1
"""Version of the run folder."""

RUN = "run.json"
EPOCHS = "metrics.jsonl"
SUMMARY = "summary.json"


def open_new(path: Path) -> None:
    """Make a folder for a run.

    Args:
        path: The folder; made with its parents. One that is there must be empty.

    Raises:
        OutputError: If it is there and not empty, or cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            hint = "add --resume to go on with its run" if (path / RUN).is_file() else "it is not the folder of a run"
            raise OutputError(f"{path} exists and is not empty; {hint}, or give another folder (--out)")
        probe = path / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written to: {error.strerror or error}; give another folder (--out)"
        ) from error


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
