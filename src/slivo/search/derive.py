"""What there is to vary in a recipe that does not say it: parameters, derived from its stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slivo.quantize import WEIGHTS
from slivo.recipe.schema import Optimizer, Recipe
from slivo.recipe.text import Path
from slivo.recipe.work import optimizer

TRAININGS = ("distill", "finetune", "joint", "recover", "pressure", "aware")
"""Stages, and parts of stages, that train."""

_CRITERIA = ("l2", "taylor")
_SCOPES = ("global", "uniform", "isomorphic")
_HELD = ("prune", "sparsify", "quantize")  # by a joint stage


@dataclass(frozen=True)
class Choice:
    """A parameter that is one of some values; the first is the recipe's own, if it is among them."""

    name: str
    values: tuple[Any, ...]
    own: Any = None


@dataclass(frozen=True)
class Span:
    """A parameter that is a number between two bounds."""

    name: str
    low: float
    high: float
    log: bool = False
    own: float | None = None

    @property
    def whole(self) -> bool:
        """Whether it takes whole numbers alone."""
        return isinstance(self.low, int) and isinstance(self.high, int)


Parameter = Choice | Span


def derived(plain: Mapping[str, Any], recipe: Recipe) -> list[Parameter]:
    """Return what there is to vary in a recipe that does not say it."""
    found: list[Parameter] = []
    target = recipe.target
    openly = any(part.get("keep") is None for _, kind, part in stages_of(plain) if kind == "prune")
    for name in ("macs", "params", "latency"):
        share = getattr(target, name)
        if openly and share is not None:
            found.append(_share(f"target.{name}", share))
    for path, kind, part in stages_of(plain):
        key = ".".join(map(str, path))
        found += _OF_KIND.get(kind, _nothing)(key, part)
    return found


def _nothing(key: str, part: Mapping[str, Any]) -> Iterator[Parameter]:
    del key, part
    yield from ()


def _share(name: str, own: float) -> Span:
    return Span(name, 0.5 * own, float(own), False, float(own))


def _around(name: str, own: float, factor: float) -> Span:
    return Span(name, own / factor, own * factor, True, float(own))


def _one_of(name: str, own: Any, *others: Any) -> Choice:
    return Choice(name, tuple(dict.fromkeys((own, *others))), own)


def _kept(key: str, part: Mapping[str, Any]) -> Iterator[Parameter]:
    for name, share in (part.get("keep") or {}).items():
        if name != "latency_ms":
            yield _share(f"{key}.keep.{name}", share)


def _rounds(key: str, part: Mapping[str, Any]) -> Iterator[Parameter]:
    for name in ("macs", "params", "bytes"):
        if (part.get("until") or {}).get(name):
            yield _share(f"{key}.until.{name}", part["until"][name])


def _prune(key: str, part: Mapping[str, Any]) -> Iterator[Parameter]:
    yield from _kept(key, part)
    yield _one_of(f"{key}.criterion", part["criterion"], *_CRITERIA)
    yield _one_of(f"{key}.scope", part["scope"], *_SCOPES)


def _training(key: str, part: Mapping[str, Any]) -> Iterator[Parameter]:
    rate = optimizer(Optimizer.model_validate(part["optimizer"]), scratch=False).lr
    yield _around(f"{key}.optimizer.lr", rate, 4.0)
    for number, loss in enumerate(part.get("losses", ())):
        for name, arguments in loss.items():
            at = f"{key}.losses.{number}.{name}"
            if name == "kd" or "temperature" in arguments:
                yield Span(f"{at}.temperature", 1.0, 10.0, True, float(arguments.get("temperature", 4.0)))
            if isinstance(arguments.get("weight"), int | float):
                yield _around(f"{at}.weight", arguments["weight"], 4.0)


def _factorize(key: str, part: Mapping[str, Any]) -> Iterator[Parameter]:
    yield from _kept(key, part)
    if "energy" in part:
        lost = 1 - part["energy"]
        yield Span(f"{key}.energy", 1 - min(0.99, 4 * lost), 1 - lost / 4, False, part["energy"])
    yield _one_of(f"{key}.method", part["method"], "auto", "channel", "spatial")
    if part.get("keep") and part["samples"]:
        yield _one_of(f"{key}.by", part["by"], "loss", "sensitivity")


def _share_values(key: str, part: Mapping[str, Any]) -> Iterator[Parameter]:
    if isinstance(part["clusters"], int):
        count = part["clusters"]
        yield _one_of(f"{key}.clusters", count, 2 * count, *([count // 2] if count >= 4 and not count % 4 else []))


def _quantize(key: str, part: Mapping[str, Any]) -> Iterator[Parameter]:
    if part["scheme"] in WEIGHTS:
        own = part.get("weight_bits") or (8 if part["scheme"] == "int8-weights" else 4)
        yield _one_of(f"{key}.weight_bits", own, *(bits for bits in (8, 6, 4, 3) if bits <= own))
        yield _one_of(f"{key}.method", part.get("method") or "round", "gptq")
    else:
        yield _one_of(f"{key}.correct_bias", part["correct_bias"], False, True)


_OF_KIND = {
    "prune": _prune,
    "drop": _kept,
    "repeat": _rounds,
    "factorize": _factorize,
    "share": _share_values,
    "quantize": _quantize,
    **dict.fromkeys(TRAININGS, _training),
}


def stages_of(plain: Mapping[str, Any]) -> Iterator[tuple[Path, str, Mapping[str, Any]]]:
    """Yield all stages, and the trainings inside them: place, kind and what is said."""

    def walk(stages: Sequence[Mapping[str, Any]], path: Path) -> Iterator[tuple[Path, str, Mapping[str, Any]]]:
        for number, stage in enumerate(stages):
            for kind, part in stage.items():
                here = (*path, number, kind)
                yield here, kind, part
                for name in (*TRAININGS, *(_HELD if kind == "joint" else ())):
                    if isinstance(part.get(name), Mapping):
                        yield (*here, name), name, part[name]
                yield from walk(part.get("stages", ()), (*here, "stages"))

    yield from walk(plain["stages"], ("stages",))
