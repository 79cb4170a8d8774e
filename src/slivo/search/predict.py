"""What a recipe will cost before anything is trained, and which recipes cannot be worth their training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slivo.recipe.plan import cut_of, plan
from slivo.recipe.schema import Drop, Factorize, Joint, Quantize, Recipe
from slivo.search.record import Row

_DENSE_BITS, _INT8, _INT4 = 32, 8, 4
_TIMING = 1.1
"""How much a latency that was measured on an untrained network may be off."""


def predict(
    recipe: Recipe, start: Mapping[str, float], teacher: Mapping[str, float], known: Mapping[str, float]
) -> dict[str, float]:
    """Return what a run of a recipe leaves, as shares of the teacher's; costs that cannot be told are left out.

    Args:
        recipe: The recipe.
        start: MACs and parameters of the network that is made smaller.
        teacher: Those of the teacher.
        known: What is known better than from the recipe's shares: counts of a network with the widths that it sets, and
            its latency, a share.
    """
    counts: dict[str, float | None] = {"macs": start["macs"], "params": start["params"]}
    before: list[dict[str, float | None]] = []
    bits = _DENSE_BITS
    for step in plan(recipe):
        before.append(dict(counts))
        part, cut = step.part, cut_of(step.part)
        if step.turn is not None or step.kind == "teach":  # how many rounds there are, or what is cut then, is open
            return {}
        if isinstance(part, Joint) and part.quantize is not None:
            bits = part.quantize.weight_bits or _INT8
        if cut is not None and step.goal is not None:
            whole = dict(teacher) if step.goal.since is None else before[step.goal.since]
            shares = {"macs": step.goal.macs, "params": step.goal.params}
            counts = {name: _left(whole.get(name), shares[name]) for name in counts}
            if cut.controlled is not None:  # it may stop before its goal
                return {}
        elif isinstance(part, Factorize | Drop):
            keep = part.keep
            shares = {"macs": keep.macs if keep else None, "params": keep.params if keep else None}
            counts = {name: _left(counts[name], shares[name]) for name in counts}
        elif isinstance(part, Quantize):
            bits = part.weight_bits or (_INT4 if part.scheme.startswith("int4") else _INT8)
    found = {name: known.get(name, value) for name, value in counts.items()}
    shares = {name: None if value is None else value / max(1, teacher[name]) for name, value in found.items()}
    shares["bytes"] = None if shares["params"] is None else shares["params"] * bits / _DENSE_BITS
    shares["latency"] = known.get("latency")
    return {name: value for name, value in shares.items() if value is not None}


def _left(whole: float | None, share: float | None) -> float | None:
    return None if whole is None or share is None else whole * share


def refused(
    predicted: Mapping[str, float],
    recipe: Recipe,
    asked: Mapping[str, Any],
    teacher: Mapping[str, float],
    metric: str,
    rows: Sequence[Row],
    costs: Sequence[str],
) -> str:
    """Say why a recipe need not be tried; empty if it should be.

    A recipe is refused whose costs are known to miss the target, and one that costs at least as much as a trial that
    is as good already as the best network there is, the teacher included: nothing is left for it to win.

    Args:
        predicted: From `predict`.
        recipe: The recipe.
        asked: The target that does not vary: shares, and ``latency_ms``.
        teacher: What was measured of it.
        metric: The task's.
        rows: The trials so far.
        costs: The objectives.
    """
    for name in ("macs", "params"):  # bytes are predicted without headers and scales
        if name in asked and name in predicted and predicted[name] > asked[name] * 1.001:
            return f"it would keep {predicted[name]:.1%} of the {name}, the target is {asked[name]:.1%}"
    final = any(stage.quantize is not None or stage.export is not None for stage in recipe.stages)
    here = not final and asked.get("runtime", "eager") == "eager"
    if "latency" in asked and "latency" in predicted and here and predicted["latency"] > asked["latency"] * _TIMING:
        found = f"{predicted['latency']:.1%} of the time"
        return f"a network of its widths takes {found}, the target is {asked['latency']:.1%}"
    if "latency_ms" in asked and "latency" in predicted and here:
        expected = predicted["latency"] * teacher["latency_ms"]
        if expected > asked["latency_ms"] * _TIMING:
            return f"a network of its widths takes {expected:.3g} ms, the target is {asked['latency_ms']:g} ms"
    done = [row for row in rows if row.values]
    top = max([teacher[metric], *(row.values[0] for row in done)])
    for row in done:
        if row.values[0] >= top and no_dearer(row.predicted, predicted, costs):
            return f"trial {row.number} costs no more, and nothing is better"
    return ""


def no_dearer(one: Mapping[str, float], other: Mapping[str, float], costs: Sequence[str]) -> bool:
    """Tell whether one is known to cost at most as much as another in all respects."""
    return all(name in one and name in other and one[name] <= other[name] for name in costs)


def behind(
    curve: Sequence[tuple[float, float]], predicted: Mapping[str, float], rows: Sequence[Row], costs: Sequence[str],
    margin: float,
) -> str:  # fmt: skip
    """Say why a trial that is being trained is hopeless; empty if it is not.

    It is if a trial that is done costs no more, was better by the margin when it had done no larger a share of its
    epochs, and ended better by the margin, too.

    Args:
        curve: Pairs of the share of the epochs that are done, and the metric then.
        predicted: What it will cost.
        rows: The trials so far.
        costs: The objectives.
        margin: In the metric's units.
    """
    if not curve:
        return ""
    done, ours = curve[-1]
    for row in rows:
        earlier = [quality for share, quality in row.curve if share <= done + 1e-9]
        if not row.values or not earlier or not no_dearer(row.predicted, predicted, costs):
            continue
        if earlier[-1] > ours + margin and row.values[0] > ours + margin:
            theirs = f"trial {row.number}, which costs no more, at {earlier[-1]:.4g}"
            return f"after {done:.0%} of its epochs it was at {ours:.4g}, {theirs}"
    return ""
