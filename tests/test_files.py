"""A file is the old one or the new one, never a part."""

from __future__ import annotations

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


def test_what_a_kill_left_behind_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".letter.partial").write_bytes(b"half")
    files.write(tmp_path / "letter", b"whole")
    assert [file.name for file in tmp_path.iterdir()] == ["letter"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "inner", tmp_path / ("n" * 300)):
        with pytest.raises(ArtifactError, match=r"cannot be written: (Not a directory|File exists|File name too long)"):
            files.write(path, b"")
