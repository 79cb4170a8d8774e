"""Watch a run from outside: what it tells as it goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Watch:
    """Hears what a run does, and does nothing about it; override what you care for."""

    def started(self, label: str, index: int, count: int) -> None:
        """A step begins: the index-th (from 0) of so many."""

    def progress(self, label: str, done: int, total: int, fields: Mapping[str, float]) -> None:
        """A training has done so many of its steps; fields are figures worth showing."""

    def finished(self, record: Mapping[str, Any]) -> None:
        """A step is done; its record is what ``run.json`` holds of it."""
