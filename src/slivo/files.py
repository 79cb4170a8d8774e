"""Files that are whole at any instant, whatever happens to the process or the machine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from slivo.errors import ArtifactError


def write(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part, and so that it survives a power cut.

    Args:
        path: The file; its folder is made if need be, a file that is there is replaced.
        content: Bytes, or text, which is written as UTF-8.

    Raises:
        ArtifactError: If it cannot be written; the file that was there stays.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "new" / "letter.txt"
        >>> write(file, "dear")
        >>> file.read_text(), [each.name for each in file.parent.iterdir()]
        ('dear', ['letter.txt'])
    """
    # One name for all attempts: what a kill leaves behind is overwritten by the next.
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
