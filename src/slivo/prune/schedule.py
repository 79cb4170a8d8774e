"""Schedules: how a budget is approached over several steps."""

from __future__ import annotations

from typing import Literal, get_args

from slivo.errors import RecipeError

Kind = Literal["linear", "exponential", "cubic"]


def steps(kind: Kind, count: int, keep: float) -> list[float]:
    """Return the share of the original that stays after each of several steps; the last is ``keep`` itself.

    Args:
        kind: ``linear`` removes equal amounts a step; ``exponential`` keeps an equal share of what is left a step;
            ``cubic`` removes most at first, when the network can spare it, and little at the end.
        count: Number of steps, at least 1.
        keep: Share that stays in the end, in (0, 1].

    Returns:
        Falling shares, one for each step: with t = i/count, ``1 − (1−keep)·t``, ``keep^t`` or
        ``keep + (1−keep)·(1−t)³``.

    Raises:
        RecipeError: If an argument is out of range.

    Source: cubic: Zhu, Gupta 2017, "To prune, or not to prune", arXiv:1710.01878, eq. 1.

    Example:
        >>> steps("linear", 2, 0.5)
        [0.75, 0.5]
        >>> [round(share, 3) for share in steps("cubic", 3, 0.4)]
        [0.578, 0.422, 0.4]
    """
    if count < 1:
        raise RecipeError(f"a schedule has {count} steps; at least 1")
    if not 0 < keep <= 1:
        raise RecipeError(f"a schedule keeps {keep}; a share above 0 and up to 1")
    times = [index / count for index in range(1, count + 1)]
    if kind == "linear":
        shares = [1 - (1 - keep) * t for t in times]
    elif kind == "exponential":
        shares = [keep**t for t in times]
    elif kind == "cubic":
        shares = [keep + (1 - keep) * (1 - t) ** 3 for t in times]
    else:
        raise RecipeError(f"no schedule is called {kind!r}; there are {', '.join(get_args(Kind))}")
    return [*shares[:-1], keep]
