"""The command line as tests call it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from slivo import cli


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in an empty folder; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        code = caught.value.code
        found = capsys.readouterr()
        return (code if isinstance(code, int) else 0), found.out, found.err

    return run
