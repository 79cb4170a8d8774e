"""Schedules: options and weights of losses that change in the course of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from slivo.errors import RecipeError

Shape = Literal["linear", "cosine"]


@dataclass(frozen=True)
class Ramp:
    """A number that goes from one value to another while the training runs, in the place of any option of a loss.

    Attributes:
        start: The value up to ``begin``.
        end: The value from ``until`` on.
        begin: Share of the training, from 0 to 1, at which it begins to change.
        until: Share of the training at which it has changed.
        shape: ``linear``, or ``cosine``: slow at both ends.

    Raises:
        RecipeError: If the shares are no such, or a value is no number.

    Example:
        >>> warm_up = Ramp(0.0, 0.9, until=0.5)
        >>> warm_up(0.0), warm_up(0.25), warm_up(1.0)
        (0.0, 0.45, 0.9)
    """

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        numbers = (self.start, self.end, self.begin, self.until)
        if not all(isinstance(each, int | float) and math.isfinite(each) for each in numbers):
            raise RecipeError(f"{self} must be made of numbers: start, end, begin and until")
        if not 0 <= self.begin < self.until <= 1:
            raise RecipeError(
                f"begin is {self.begin} and until {self.until}; of the training's shares, 0 <= begin < until <= 1 hold"
            )
        if self.shape not in get_args(Shape):
            raise RecipeError(f"shape is {self.shape!r}; allowed: {', '.join(get_args(Shape))}")

    def __call__(self, progress: float) -> float:
        """Return the value at a share of the training that is done."""
        done = min(max((progress - self.begin) / (self.until - self.begin), 0.0), 1.0)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


def now(value: Any, progress: float) -> Any:
    """Return what an option is at a share of the training that is done; most are always the same.

    Example:
        >>> now(Ramp(8.0, 2.0), 0.5), now(4.0, 0.5)
        (5.0, 4.0)
    """
    return value(progress) if isinstance(value, Ramp) else value
