"""What a search keeps of its trials: rows, ``search.json``, and recipes that can be run again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml

FILE = "search.json"
BEST = "best.yaml"
RECIPE = "recipe.yaml"
FORMAT = 1


@dataclass(frozen=True)
class Row:
    """What is known of a trial.

    Args:
        number: Of the trial in its study, from 0.
        state: ``done``, ``stopped`` (hopeless while it trained), ``refused`` (hopeless before), ``failed`` or
            ``running``.
        strategy: ``recipe``, or the name of a recipe that ships.
        settings: What was chosen, by the recipe's keys.
        values: If it is done: the task's metric on the validation data, and each objective as a share of the teacher's.
        measured: ``macs``, ``params``, ``bytes``, ``latency_ms`` and ``latency`` (of the teacher's, measured side by
            side), the metric on the validation data, and on the ``test`` data.
        misses: In what it misses the recipe's target, judged on validation data.
        reason: Why it stopped, was refused or failed.
        seconds: How long it took.
        predicted: Costs known before it was trained.
        curve: Pairs of the share of its epochs that were done, and the metric then.
        recipe: What `slivo.recipe.run` was given.
        folder: Name of its folder under ``trials``.
        worker: Who ran it: machine and process.
    """

    number: int
    state: str
    strategy: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    values: tuple[float, ...] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)
    misses: tuple[str, ...] = ()
    reason: str = ""
    seconds: float = 0.0
    predicted: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[tuple[float, float], ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    folder: str = ""
    worker: str = ""

    def plain(self) -> dict[str, Any]:
        """Return it as JSON has it, without the recipe, which is in the trial's folder."""
        found = asdict(self)
        del found["recipe"], found["curve"]
        return found


def text(recipe: Mapping[str, Any], *, comment: str = "") -> str:
    """Return a recipe as YAML, each line of the comment above it."""
    above = "".join(f"# {line}\n" for line in comment.splitlines())
    return above + yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100)
