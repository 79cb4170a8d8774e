"""Files that are whole at any instant, whatever happens to the process or the machine."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from contextlib import suppress
from glob import escape
from pathlib import Path

from slivo.errors import ArtifactError

_STALE = 3600.0  # seconds; who writes touches the file all the while, and a dead process never again


def write(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part, and so that it survives a power cut.

    Several may write the same file at once: it is then the whole of what one of them wrote, the last to finish.

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
    # A name of its own for each attempt: of two writers of one file neither must take the other's half for its own.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:  # whatever went wrong, an interrupt included; what was written in full is not there under this name
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def copy(path: Path, to: Path) -> None:
    """Have a file under a second name, too, where it stays when the first is written anew; atomic as `write`.

    Args:
        path: A file that is only ever replaced as a whole.
        to: The other name, in the same folder; a file of that name is replaced.

    Raises:
        OSError: If the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "letter.txt"
        >>> write(file, "dear")
        >>> copy(file, file.with_name("old.txt"))
        >>> write(file, "my dear")
        >>> file.with_name("old.txt").read_text()
        'dear'
    """
    temporary = to.with_name(f".{to.name}.{secrets.token_hex(6)}.partial")
    try:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without links, or no room: then the copy says so
            shutil.copyfile(path, temporary)
        temporary.replace(to)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove what attempts at a file left behind that were killed long ago."""
    for left in path.parent.glob(f".{escape(path.name)}.*.partial"):
        with suppress(OSError):  # another may remove it, too
            if time.time() - left.stat().st_mtime > _STALE:
                left.unlink()


def sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
