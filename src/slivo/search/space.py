"""The space: which recipes a search may try, as a few parameters of the one that it starts from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from slivo.errors import SlivoError
from slivo.recipe.load import load
from slivo.recipe.places import copied, get, put, split
from slivo.recipe.plan import plan
from slivo.recipe.schema import Range, Recipe
from slivo.recipe.shipped import shipped
from slivo.recipe.text import Path
from slivo.search.derive import TRAININGS, Choice, Parameter, Span, derived, stages_of
from slivo.search.widths import SECTIONS, Shape

OWN = "recipe"
"""The strategy that is the recipe's own."""

SHAPED = "shaped"
"""The scope in which the search sets the width of each axis."""

_CLOSING = ("quantize", "export")

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Arm:
    """One strategy, and what is varied in it.

    Args:
        name: ``recipe``, or that of a recipe that ships.
        plain: The recipe, as JSON-ready data.
        parameters: What is varied, by keys of the recipe.
        prune: Place of the prune stage whose widths the search may set, or None.
    """

    name: str
    plain: Mapping[str, Any]
    parameters: tuple[Parameter, ...]
    prune: Path | None = None

    def prefix(self, name: str) -> str:
        """Return what a parameter of this arm is called in the study."""
        return name if self.name == OWN else f"{self.name}:{name}"


@dataclass(frozen=True)
class Candidate:
    """A recipe to try, but for the widths.

    Args:
        strategy: Name of its arm.
        settings: The values chosen, by the recipe's keys.
        plain: The recipe.
        prune: Place of the prune stage whose widths ``shape`` says.
        shape: How the cut is spread; None if the recipe says it.
    """

    strategy: str
    settings: Mapping[str, Any]
    plain: dict[str, Any]
    prune: Path | None = None
    shape: Shape | None = None


class Suggest(Protocol):
    """What chooses values: a trial of Optuna."""

    def suggest_categorical(self, name: str, choices: Sequence[Scalar]) -> Scalar:
        """Choose one of some values."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Choose a number."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """Choose a whole number."""


def arms(recipe: Recipe) -> list[Arm]:
    """Return the strategies of a search and what is varied in each; the recipe's own is the first.

    What the recipe's ``search`` does not say is derived from its stages.
    """
    said, plain = recipe.search, recipe.plain()
    plain.pop("search", None)
    free = said is None or said.vary is None
    place = shapeable(recipe)
    shaped = place if (said.widths if said is not None and said.widths is not None else free) else None
    given = derived(plain, recipe) if free else _said(plain, said.vary or {} if said is not None else {})
    found = [Arm(OWN, plain, _with_shape(given, plain, shaped), shaped)]
    names = said.strategies if said is not None else None
    for name in names if names is not None else [*shipped()] if free else []:
        arm = _strategy(name, recipe, plain)
        if arm is not None:
            found.append(arm)
    return found


def shapeable(recipe: Recipe) -> Path | None:
    """Return the place of the prune stage whose widths can be set one by one; None if there is none.

    It must be the recipe's only one, cut the whole student once and for all to MACs or parameters, and see the network
    that the run starts from.
    """
    stages = recipe.stages
    others = ("repeat", "layers", "joint", "drop", "teach")
    if any(name in stage.given for stage in stages for name in others):
        return None
    cuts = [number for number, stage in enumerate(stages) if stage.prune is not None]
    if len(cuts) != 1 or any(stage.factorize is not None for stage in stages[: cuts[0]]):
        return None
    part = stages[cuts[0]].prune
    assert part is not None
    if part.controlled is not None or (part.pressure is not None and part.pressure.kind == "hspg"):
        return None
    level = recipe.target if part.keep is None else part.keep
    if level.macs is None and level.params is None:
        return None
    return ("stages", cuts[0], "prune")


def suggest(trial: Suggest, found: Sequence[Arm]) -> Candidate:
    """Let a trial choose a recipe."""
    names = [arm.name for arm in found]
    chosen = trial.suggest_categorical("strategy", names) if len(found) > 1 else OWN
    arm = found[names.index(str(chosen))]
    settings: dict[str, Any] = {}
    data, shape = copied(arm.plain), None
    for parameter in arm.parameters:
        value = _value(trial, arm.prefix(parameter.name), parameter)
        settings[parameter.name] = value
        if value == SHAPED and arm.prune is not None and split(parameter.name) == (*arm.prune, "scope"):
            shape = _shape(trial, arm, settings)
        else:
            put(data, split(parameter.name), value)
    return Candidate(arm.name, settings, data, arm.prune if shape is not None else None, shape)


def first_guesses(found: Sequence[Arm]) -> Iterator[dict[str, Scalar]]:
    """Yield parameters to start with: the recipe as it is, the same with uniform and with shaped widths."""
    arm = found[0]
    own: dict[str, Scalar] = {"strategy": OWN} if len(found) > 1 else {}
    for parameter in arm.parameters:
        if parameter.own is not None:
            own[arm.prefix(parameter.name)] = _coded(parameter.own)
    yield own
    scope = _scope(arm)
    if scope is not None:
        for value in ("uniform", SHAPED):
            if value in scope.values and own.get(scope.name) != value:
                yield own | {scope.name: value}


def _scope(arm: Arm) -> Choice | None:
    for parameter in arm.parameters:
        if parameter.name.endswith("prune.scope") and isinstance(parameter, Choice):
            return parameter
    return None


def _value(trial: Suggest, name: str, parameter: Parameter) -> Any:
    if isinstance(parameter, Choice):
        coded = [_coded(value) for value in parameter.values]
        return parameter.values[coded.index(trial.suggest_categorical(name, coded))]
    if parameter.whole:
        return trial.suggest_int(name, int(parameter.low), int(parameter.high), log=parameter.log)
    return trial.suggest_float(name, parameter.low, parameter.high, log=parameter.log)


def _coded(value: Any) -> Scalar:
    """Return a value as a study keeps it: lists and mappings as JSON."""
    return value if value is None or isinstance(value, str | int | float | bool) else json.dumps(value)


def _shape(trial: Suggest, arm: Arm, settings: dict[str, Any]) -> Shape:
    assert arm.prune is not None
    base = ".".join(map(str, (*arm.prune, "widths")))
    powers = [trial.suggest_float(arm.prefix(f"{base}.{name}"), 0.0, 0.5) for name in ("sensitivity", "cost")]
    tilt = [
        trial.suggest_float(arm.prefix(f"{base}.section_{number}"), 0.5, 2.0, log=True)
        for number in range(2, SECTIONS + 1)
    ]
    named = ("sensitivity", "cost", *(f"section_{number}" for number in range(2, SECTIONS + 1)))
    settings |= {f"{base}.{name}": value for name, value in zip(named, [*powers, *tilt], strict=True)}
    return Shape(powers[0], powers[1], tuple(tilt))


def _with_shape(given: Sequence[Parameter], plain: Mapping[str, Any], prune: Path | None) -> tuple[Parameter, ...]:
    """Add the shaped scope to what is varied."""
    if prune is None:
        return tuple(given)
    name = ".".join(map(str, (*prune, "scope")))
    known = [each for each in given if each.name == name]
    own = get(plain, (*prune, "scope"))
    scopes = known[0].values if known and isinstance(known[0], Choice) else (own,)
    # The last to be chosen: what it needs of the others is chosen then.
    rest = [each for each in given if each.name != name]
    return (*rest, Choice(name, (*dict.fromkeys(scopes), SHAPED), own))


def _said(plain: Mapping[str, Any], vary: Mapping[str, list[Any] | Range]) -> list[Parameter]:
    """Return what a recipe says is varied."""
    found: list[Parameter] = []
    for key, given in vary.items():
        own = get(plain, split(key))
        if isinstance(given, Range):
            inside = isinstance(own, int | float) and given.low <= own <= given.high
            found.append(Span(key, given.low, given.high, given.log, own if inside else None))
        else:
            found.append(Choice(key, tuple(given), own if own in given else None))
    return found


def epochs(recipe: Recipe) -> int:
    """Return how many epochs a run trains the student for."""
    found = 0
    for step in plan(recipe):
        if step.kind not in ("teacher", "member"):
            parts = (step.part, getattr(step.part, "pressure", None), getattr(step.part, "aware", None))
            found += sum(getattr(part, "epochs", 0) for part in parts)
    return found


def _strategy(name: str, recipe: Recipe, plain: Mapping[str, Any]) -> Arm | None:
    """Return a recipe that ships, for the task, networks, target and epochs of another; None if it cannot be had."""
    theirs = load(name).recipe
    data = copied(plain)
    own = [stage for stage in data["stages"] if next(iter(stage)) in _CLOSING]
    level = next((part["keep"]["macs"] for _, kind, part in stages_of(plain) if kind in ("prune", "factorize")
                  and (part.get("keep") or {}).get("macs")), get(plain, ("target", "macs")))  # fmt: skip
    stages = [stage for stage in theirs.plain()["stages"] if next(iter(stage)) not in _CLOSING]
    if any((stage.get("joint") or {}).get("quantize") for stage in stages):  # in one training, if at all
        whole = [stage for stage in own if "quantize" not in stage]
        if len(whole) == len(own):
            stages = [{kind: {name: value for name, value in part.items() if kind != "joint" or name != "quantize"}
                       for kind, part in stage.items()} for stage in stages]  # fmt: skip
        own = whole
    data["stages"] = [*stages, *own]
    if level is not None:
        data["target"].setdefault("macs", level)
    budget, trained = epochs(recipe), epochs(theirs)
    size = next((part["batch_size"] for _, kind, part in stages_of(plain) if kind in TRAININGS), None)
    for _, kind, part in stages_of(data):
        assert isinstance(part, dict)
        if kind in TRAININGS:
            part["epochs"] = max(1, part["epochs"] * budget // max(1, trained))
            part |= {} if size is None else {"batch_size": size}
        if kind == "factorize" and part.get("keep") and level is not None:
            part["keep"] = {"macs": level}
        if (part.get("until") or {}).get("macs") and level is not None:
            part["until"]["macs"] = level
    try:
        valid = load(data).recipe
    except SlivoError:
        return None
    return Arm(name, data, tuple(derived(data, valid)))
