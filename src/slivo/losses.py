"""The losses of distillation by name: ``slivo.losses.kd(temperature=4, weight=0.9)`` is a term of an objective.

What there is, and with which options, comes from the functions themselves: every public function of
`slivo.distill.logits`, `slivo.distill.features`, `slivo.distill.maps`, `slivo.distill.relations`,
`slivo.distill.contrast` and `slivo.distill.tokens` is a loss. Each builder takes the function's options, and besides
what `slivo.distill.Term` has: ``weight``, ``at`` (needed by all but the losses on logits, which compare the models'
outputs unless told otherwise) or ``head``, for logits ``class_map`` and ``class_dim``, and for those that need them
``labels`` and ``mask``. A number may be a `slivo.distill.Ramp`, in recipes ``{start: 0, end: 0.9, until: 0.5}``. Losses
on activations are weighted automatically (``"auto"``) unless told otherwise, because their scales differ by orders of
magnitude.

Example:
    >>> from slivo import losses
    >>> term = losses.hint(at="layer1", weight=100)
    >>> term.name, term.at, term.weight
    ('hint', 'layer1', 100.0)
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, get_type_hints

import torch

from slivo.distill import contrast, features, logits, maps, relations, tokens
from slivo.distill.adapt import make
from slivo.distill.classes import ClassMap
from slivo.distill.schedule import Ramp, now
from slivo.distill.terms import Term, joint, supplied
from slivo.errors import RecipeError, ShapeError

__all__ = ["Loss", "build", "describe", "names"]

_REQUIRED = object()
_OF_TERMS = ("weight", "at", "head", "class_map", "class_dim", "labels", "mask")


@dataclass(frozen=True)
class Loss:
    """What there is to say of a loss.

    Attributes:
        name: Its name in recipes and in this module.
        summary: The first line of its documentation.
        parameters: Its options, as ``"temperature: float = 4.0"``; those without a default must be given.
    """

    name: str
    summary: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class _Option:
    kind: str
    default: object

    def __str__(self) -> str:
        return self.kind if self.default is _REQUIRED else f"{self.kind} = {self.default!r}"


def names() -> list[str]:
    """Return the names of the losses.

    Example:
        >>> "kd" in names()
        True
    """
    return sorted(_functions())


def describe() -> list[Loss]:
    """Return name, first line and options of each loss, in the order of `names`.

    Example:
        >>> next(loss for loss in describe() if loss.name == "kd").parameters[:3]
        ('temperature: float = 4.0', 'weight: weight = 1.0', "at: path = ''")
    """
    found = []
    for name, function in sorted(_functions().items()):
        options = tuple(f"{option}: {value}" for option, value in _options(function).items())
        found.append(Loss(name, (inspect.getdoc(function) or "").partition("\n")[0], options))
    return found


def build(spec: Mapping[str, Mapping[str, Any] | None]) -> Term:
    """Make a term of what a recipe says.

    Args:
        spec: One name with its options, such as ``{"kd": {"temperature": 4, "weight": 0.9}}``; None for no options.

    Returns:
        The term.

    Raises:
        RecipeError: If there is no such loss or option, or a value is of the wrong type or out of range.

    Example:
        >>> build({"kd": {"temperature": 2}}).params
        {'temperature': 2.0}
    """
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise RecipeError(f"a loss is {spec!r}; write one name with its options, as {{kd: {{weight: 0.9}}}}")
    name, options = next(iter(spec.items()))
    if name not in _functions():
        raise RecipeError(f"no loss is called {name!r}; {_near(str(name), names())}")
    if not isinstance(options, Mapping | None):
        raise RecipeError(f"options of loss {name} are {options!r}; write names with values, as {{weight: 0.9}}")
    return _term(_functions()[name], dict(options or {}))


def __getattr__(name: str) -> Callable[..., Term]:
    if name.startswith("_") or name not in _functions():
        raise AttributeError(f"module 'slivo.losses' has no loss {name!r}; {_near(name, names())}")
    function = _functions()[name]

    def builder(**options: Any) -> Term:
        return _term(function, options)

    builder.__name__ = builder.__qualname__ = name
    builder.__doc__ = inspect.getdoc(function)
    return builder


def __dir__() -> list[str]:
    return sorted([*__all__, *names()])


def _functions() -> dict[str, FunctionType]:
    """Return the public functions of the modules that hold losses, by name."""
    return {
        name: value
        for module in (logits, features, maps, relations, contrast, tokens)
        for name, value in vars(module).items()
        if isinstance(value, FunctionType) and value.__module__ == module.__name__ and not name.startswith("_")
    }


def _of(function: FunctionType, module: ModuleType) -> bool:
    return function.__module__ == module.__name__


def _options(function: FunctionType) -> dict[str, _Option]:
    """Return the options of a builder: the function's keyword-only parameters, and a term's own."""
    hints = get_type_hints(function)
    options = {
        name: _Option(hints[name].__name__, parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    options["weight"] = _Option("weight", 1.0 if _of(function, logits) else "auto")
    options["at"] = _Option("path", "" if _of(function, logits) else _REQUIRED)
    options["head"] = _Option("head", None)
    if _of(function, logits):
        options |= {"class_map": _Option("indices", None), "class_dim": _Option("dimension", None)}
    return options | {name: _Option("part", None) for name in supplied(function) if name in ("labels", "mask")}


def _term(function: FunctionType, given: Mapping[str, Any]) -> Term:
    options = _options(function)
    place = function.__name__
    for name in given:
        if name not in options:
            raise RecipeError(f"loss {place} has no option {name!r}; {_near(str(name), list(options))}")
    missing = [name for name, option in options.items() if option.default is _REQUIRED and name not in given]
    if missing and given.get("head") is None:
        raise RecipeError(
            f"loss {place} needs {missing[0]!r}: the path of the module to compare, such as at='layer1', or a head"
        )
    values = {name: _value(f"{place}.{name}", options[name].kind, value) for name, value in given.items()}
    own: dict[str, Any] = {"weight": options["weight"].default}
    own |= {name: values.pop(name) for name in _OF_TERMS if name in values}
    for progress in (0.0, 1.0):
        _try(function, {name: now(value, progress) for name, value in values.items()})
    return Term(function, values, **own)


def _value(place: str, kind: str, value: Any) -> Any:
    """Return a value in its type, or say which it must have."""
    if kind in ("float", "weight") and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in ("float", "weight") and isinstance(value, Ramp | Mapping):
        return _ramp(place, value)
    if kind == "weight" and value == "auto":
        return value
    if kind == "dimension" and value is None:
        return value
    if kind in ("int", "dimension") and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind in ("head", "part"):
        return value  # which the term looks through
    if kind == "path":
        if isinstance(value, str):
            return value
        if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(path, str) for path in value):
            return tuple(value)
        if (
            isinstance(value, Mapping)
            and value
            and all(isinstance(path, str) for pair in value.items() for path in pair)
        ):
            return dict(value)
    if kind == "indices":
        if value is None or isinstance(value, ClassMap):
            return value
        said = value if isinstance(value, Mapping) else {"teacher": value}
        if set(said) <= {"teacher", "unmapped"} and isinstance(said.get("teacher"), list | tuple):
            try:
                return ClassMap(**said)
            except ShapeError as error:
                raise RecipeError(f"{place}: {error}") from error
    wanted = {
        "float": "a number, or a ramp {start: …, end: …}",
        "weight": "a number, auto, or a ramp {start: …, end: …}",
        "int": "a whole number",
        "dimension": "the number of a dimension, such as 1 or -1, or null",
        "path": "a module's path, two (student, teacher), or a mapping {student: teacher}",
        "indices": "a list with the teacher's class for each of the student's, {teacher: […], unmapped: …}, or null",
    }
    raise RecipeError(f"{place} is {value!r}; it must be {wanted.get(kind, kind)}")


def _ramp(place: str, value: Ramp | Mapping[str, Any]) -> Ramp:
    if isinstance(value, Ramp):
        return value
    try:
        return Ramp(**value)
    except TypeError as error:
        raise RecipeError(
            f"{place} is {dict(value)!r}; a ramp has start and end, and may have begin, until, shape"
        ) from error
    except RecipeError as error:
        raise RecipeError(f"{place}: {error}") from error


def _try(function: FunctionType, params: Mapping[str, Any]) -> None:
    """Call a loss on a few numbers, so that it refuses options out of range now and not after hours."""
    tensor = torch.eye(4).expand(4, 4, 4, 4)
    given = [tensor, tensor] if joint(function) else tensor
    extra: dict[str, Any] = {"labels": torch.zeros(4, 4, 4, dtype=torch.int64), "mask": None}
    try:
        if "adapter" in supplied(function):
            extra["adapter"] = make(function, params, given, given, seed=0)
        function(given, given, *(extra[name] for name in supplied(function)), **params)
    except RecipeError as error:
        raise RecipeError(f"loss {function.__name__}: {error}") from error
    except ShapeError:
        return  # An option may be right for other widths than of these few numbers, such as a number of heads.


def _near(name: str, known: list[str]) -> str:
    """Return a hint at the nearest names, or all."""
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
