"""The fast slice of the coverage benchmark: all small networks of it, each in a process of its own, pass all checks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def coverage(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "benchmarks/coverage.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def test_small_networks_pass(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    found = coverage("--only", "small/*", "stress/*", "--limit", "120", "--json", str(file))
    assert found.returncode == 0, found.stdout + found.stderr
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert len(rows) >= 43
    assert all(row["permutation"] <= 1e-9 and not row["failures"] for row in rows)
    assert "missed" not in found.stdout


def test_a_glob_that_matches_nothing_says_what_there_is() -> None:
    found = coverage("--only", "smal/*")
    assert found.returncode == 1
    assert "no network matches smal/*; there are " in found.stderr
