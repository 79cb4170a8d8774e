"""Control: cut and recover in turns, by a schedule, as far as validation allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from slivo.edits.follow import follow
from slivo.errors import SlivoError, TargetError
from slivo.graph import ExampleInputs, trace
from slivo.measure.budget import Budget, check_budget
from slivo.options import is_count, is_number, said
from slivo.prune.budget import count
from slivo.prune.schedule import Kind, share
from slivo.prune.width import prune

Cutter = Callable[..., nn.Module]
"""``prune(model, example_inputs, keep=budget)`` returns a smaller model and leaves the model untouched."""

Recover = Callable[..., nn.Module | None]
"""``recover(model)``, or ``recover(model, optimizer)``; trains in place, or returns what takes the model's place."""


@dataclass(frozen=True)
class Trial:
    """One cut and the training after it.

    Args:
        keep: What the cut was to leave of the whole, as counts.
        score: What validation said afterwards; NaN if nobody asked.
        held: Whether that was within the allowance. What was not has been thrown away.
    """

    keep: Budget
    score: float
    held: bool


@dataclass(frozen=True)
class Iterated:
    """What `iterate` gives.

    Args:
        model: The smallest that held the allowance; the caller's own model if none did.
        met: Whether it is as small as asked.
        trials: What was tried, in order.
        optimizer: The one that trains the model, if there is one.
    """

    model: nn.Module
    met: bool
    trials: tuple[Trial, ...]
    optimizer: Optimizer | None = None


def iterate(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    keep: Budget,
    recover: Recover,
    validate: Callable[[nn.Module], float] | None = None,
    max_drop: float | None = None,
    kind: Kind = "cubic",
    steps: int = 5,
    halvings: int = 3,
    optimizer: Optimizer | None = None,
    prune: Cutter = prune,
) -> Iterated:
    """Prune in several steps with training between, and stop where validation says so.

    With an allowance the rate is controlled: a step after which the score is too low is taken back, and half of it is
    tried from the last model that held, and so on from there at the lower rate. When the rate has been halved so often
    that it is no use, the smallest model that held is what there is.

    Args:
        model: The trained model; it is left untouched.
        example_inputs: As for `slivo.prune`.
        keep: What may stay in the end, in MACs, parameters or bytes.
        recover: Your own training: called with a model after each cut, and with an optimizer if there is one. Trains in
            place and returns nothing, or returns a model that takes the place.
        validate: Your own measure of a model, higher is better. Without ``max_drop`` it is only noted.
        max_drop: How much lower than the uncut model's the score may be, in its unit, after each recovery.
        kind: Schedule, as in `slivo.prune.steps`: cubic cuts most at first, when the network can spare it.
        steps: In how many steps, if all goes well; 1 is one shot, and best if the training after each would be short.
        halvings: How often the rate may be halved: 3 ends at an eighth of a step.
        optimizer: Of the model; after each cut one that goes on with what it remembers of the slices that stay
            (`slivo.edits.follow`) is given to ``recover``, which then trains in place.
        prune: What cuts; `functools.partial` of `slivo.prune` for a criterion, batches or a scope.

    Returns:
        The model with the record of all its cuts, and what was tried.

    Raises:
        TargetError: If the budget cannot be met (told before anything is trained), or speaks of latency.
        SlivoError: If an argument is out of range, or a function of yours returns what it should not.

    Source: steps with recovery, Han, Pool, Tran, Dally 2015, arXiv:1506.02626; the control is ours.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> def width(net):  # as if accuracy were gone below a width of 9
        ...     return 0.9 if net[0].out_features >= 9 else 0.1
        >>> found = iterate(
        ...     net, torch.randn(2, 4), keep=Budget(macs=0.25), recover=lambda net: None, validate=width, max_drop=0.05,
        ...     kind="linear", steps=3,
        ... )
        >>> found.model[0].out_features, found.met, [each.held for each in found.trials]
        (9, False, [True, False, True, False, True, False, False])
    """
    _check(recover, validate, max_drop, steps, halvings)
    whole = _whole(model, example_inputs, keep)
    _cut(prune, model, example_inputs, keep)
    floor = -math.inf if validate is None or max_drop is None else _number(validate(model)) - max_drop
    # Time and rate in the smallest fractions of a step that there may be.
    rate, end, time = 2**halvings, steps * 2**halvings, 0
    best, trials = model, list[Trial]()
    while time < end and rate:
        goal = min(end, time + rate)
        budget = Budget(**{name: _count(kind, goal / end, share, whole[name]) for name, share in _shares(keep, whole)})
        small = _cut(prune, best, example_inputs, budget)
        following = None if optimizer is None else follow(optimizer, best, small)
        small = _recovered(recover, small, following)
        score = math.nan if validate is None else _number(validate(small))
        held = score >= floor or max_drop is None
        trials.append(Trial(budget, score, held))
        if held:
            best, optimizer, time = small, following, goal
        else:
            rate //= 2
    return Iterated(best, time == end, tuple(trials), optimizer)


def _check(recover: object, validate: object, max_drop: object, steps: object, halvings: object) -> None:
    """Look at the arguments that are no part of a cut."""
    for what, value in (("recover", recover), ("validate", validate)):
        if not callable(value) and not (what == "validate" and value is None):
            raise SlivoError(f"{what} is {said(value)}; give a function that is called with a model")
    if max_drop is not None:
        if not is_number(max_drop) or not 0 <= max_drop < math.inf:
            raise SlivoError(f"max_drop is {said(max_drop)}; 0 or more, in the unit of the score")
        if validate is None:
            raise SlivoError("max_drop says how much the score may fall; give validate=…, which tells the score")
    for what, value, least in (("steps", steps, 1), ("halvings", halvings, 0)):
        if not is_count(value, least=least):
            raise SlivoError(f"{what} is {said(value)}; an int of at least {least}")


def _whole(model: nn.Module, example_inputs: ExampleInputs, keep: Budget) -> dict[str, int]:
    """Return what shares are shares of."""
    check_budget(keep)
    if keep.timed:
        raise TargetError("a budget of latency has no steps; give macs=…, params=… or bytes=…")
    return count(trace(model, example_inputs), {}, keep)


def _shares(keep: Budget, whole: dict[str, int]) -> list[tuple[str, float]]:
    """Return what is to stay in the end as shares."""
    return [(name, min(1.0, limit / max(1, whole[name]))) for name, limit in keep.limits(whole).items()]


def _count(kind: Kind, time: float, keep: float, whole: int) -> int:
    return max(1, int(share(kind, time, keep) * whole + 1e-6))


def _cut(prune: Cutter, model: nn.Module, example_inputs: ExampleInputs, keep: Budget) -> nn.Module:
    small = prune(model, example_inputs, keep=keep)
    if not isinstance(small, nn.Module) or small is model:
        raise SlivoError(f"prune returned {said(small)}; it must return a new model")
    return small


def _recovered(recover: Recover, small: nn.Module, optimizer: Optimizer | None) -> nn.Module:
    found = recover(small) if optimizer is None else recover(small, optimizer)
    if found is not None and not isinstance(found, nn.Module):
        raise SlivoError(f"recover returned {said(found)}; it must return a model, or nothing if it trains in place")
    return small if found is None else found


def _number(score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError):
        raise SlivoError(f"validate returned {said(score)}; it must return a number, higher for better") from None
