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
    return [share(kind, index / count, keep) for index in range(1, count + 1)]


def share(kind: Kind, time: float, keep: float) -> float:
    """Return the share of the original that stays at a time, from 1 at time 0 to ``keep`` itself at time 1.

    Arguments, formulas and errors are those of `steps`; the time t is from 0 to 1.

    Example:
        >>> share("linear", 0.25, 0.2), share("cubic", 1.0, 0.2)
        (0.8, 0.2)
    """
    if not 0 < keep <= 1:
        raise RecipeError(f"a schedule keeps {keep}; a share above 0 and up to 1")
    if kind not in get_args(Kind):
        raise RecipeError(f"no schedule is called {kind!r}; there are {', '.join(get_args(Kind))}")
    if time >= 1:
        return keep
    if kind == "linear":
        return 1 - (1 - keep) * time
    if kind == "exponential":
        return float(keep**time)
    return keep + (1 - keep) * (1 - time) ** 3
