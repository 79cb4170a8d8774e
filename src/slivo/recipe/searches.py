"""What can be wrong with what a recipe says of a search: keys and values that make no valid recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import isfinite
from typing import Any

from pydantic import ValidationError

from slivo.errors import RecipeError
from slivo.recipe.places import copied, put, split
from slivo.recipe.schema import Range, Recipe, Search
from slivo.recipe.shipped import shipped
from slivo.recipe.text import Path, Source, from_validation, spell, unknown

Problem = tuple[Path, str]
Check = Callable[[Recipe], Iterator[Problem]]


def problems(recipe: Recipe, part: Search, check: Check) -> Iterator[Problem]:
    """Yield what is wrong with the search that a recipe asks for.

    Args:
        recipe: The recipe, valid otherwise.
        part: What it says of the search.
        check: Yields what is wrong with a recipe whose keys and types are right.
    """
    for number, name in enumerate(part.strategies or []):
        if name not in (names := [*shipped()]):
            yield ("search", "strategies", number), unknown(name, names, "one of those that ship")
    for name in part.objectives:
        if part.objectives.count(name) > 1:
            yield ("search", "objectives"), f"has {name} twice; once"
            break
    plain = recipe.plain()
    del plain["search"]
    for key, given in (part.vary or {}).items():
        if split(key)[0] in ("search", "task", "teacher", "name", "committee"):
            yield ("search", "vary", key), "cannot be varied; trials share task and teacher: vary target or stages"
        elif isinstance(given, Range):
            yield from _range(plain, key, given, check)
        else:
            for number, value in enumerate(given):
                if text := _wrong(plain, key, value, check):
                    yield ("search", "vary", key, number), text


def _range(plain: Mapping[str, Any], key: str, given: Range, check: Check) -> Iterator[Problem]:
    path: Path = ("search", "vary", key)
    if not (isfinite(given.low) and isfinite(given.high) and given.low < given.high):
        yield path, f"is from {given.low} to {given.high}; low must be below high"
    elif given.log and given.low <= 0:
        yield (*path, "low"), f"is {given.low}; above 0 where log is true"
    else:
        for name, bound in (("low", given.low), ("high", given.high)):
            if text := _wrong(plain, key, bound, check):
                yield (*path, name), text


def _wrong(plain: Mapping[str, Any], key: str, value: object, check: Check) -> str:
    """Say what is wrong with the recipe once a value is in it; empty if nothing is. Goes on after the value's name."""
    data = copied(plain)
    try:
        put(data, split(key), value)
        changed = Recipe.model_validate(data)
    except KeyError as error:
        return f"is no key of this recipe: {error.args[0]}"
    except ValidationError as error:
        return f"makes no valid recipe: {_said(from_validation(error, data, Source('')))}"
    found = next(check(changed), None)
    return "" if found is None else f"makes no valid recipe: {spell(found[0])} {found[1]}"


def _said(error: RecipeError) -> str:
    return str(error).removeprefix(": ")
