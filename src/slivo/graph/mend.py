"""Mending: find the integers in a cut model's Python objects that have to change, by running it.

The captured graph says which integers in the model's code change, in which module's code each stands, and what it
becomes. Which attribute it came from is not written anywhere; attributes of the same value are tried, all at once, and
if that is not right one after the other (`slivo.graph.search`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from slivo.graph.axes import Graph
from slivo.graph.program import Program, argument, plan_rewrites
from slivo.graph.search import Choices, Search, Setting, Trial, set_
from slivo.graph.statements import Literal


def mend_(
    live: nn.Module,
    graph: Graph,
    keep: Mapping[str, Sequence[int]],
    trial: Trial,
    part: Callable[[str], tuple[Program, fx.GraphModule] | None],
) -> tuple[list[Setting], dict[str, Program]] | None:
    """Set attributes of a cut model until it computes what it must.

    Args:
        live: The cut model; it is mended in place.
        graph: The graph of the uncut model.
        keep: For each axis that was cut, by name, the positions that stayed.
        trial: Runs the model and tells whether its outputs are right.
        part: Makes of a module's name the program and the graph that can take its place; None if there is none.

    Returns:
        The attributes that were set, and the programs of modules that were replaced; None if nothing was found that
        makes the model right.
    """
    if trial(live):
        return [], {}
    literals = changed(graph, keep)
    levels = _levels(live, literals, _instead)
    plain = [[(*place, values[0]) for place, values in level.items() if len(values) == 1] for level in levels]
    plain = [level for level in plain if level]
    trials = [[setting for level in plain[: depth + 1] for setting in level] for depth in range(len(plain))]
    trials += [[setting for level in plain[depth:] for setting in level] for depth in range(1, len(plain))]
    for settings in trials:
        before = [(name, attribute, getattr(live.get_submodule(name), attribute)) for name, attribute, _ in settings]
        set_(live, settings)
        if trial(live):
            return settings, {}
        set_(live, before)
    holders = {tuple(literal.module.split(".")) for literal in graph.inference.literals}
    sources = {".".join(parts[: end + 1]) for parts in holders for end in range(len(parts))}
    sources |= {name for name, module in live.named_modules() if isinstance(module, fx.GraphModule)}
    search = Search(live, trial, [_merged(levels), _merged(_levels(live, literals, _scaled))], sources - {""}, part)
    return search.run()


def _merged(levels: Sequence[Choices]) -> Choices:
    choices: Choices = {}
    for level in levels:
        for place, values in level.items():
            found = choices.setdefault(place, [])
            found.extend(value for value in values if value not in found)
    return choices


def changed(graph: Graph, keep: Mapping[str, Sequence[int]]) -> list[tuple[Literal, int]]:
    """Return the integers of the captured graph that change, each with its new value."""
    rewrites = {(r.node, r.path): r.value for r in plan_rewrites(graph, keep)}
    return [
        (literal, rewrites[literal.node.name, literal.path])
        for literal in graph.inference.literals
        if (literal.node.name, literal.path) in rewrites
    ]


def _levels(
    live: nn.Module, literals: Sequence[tuple[Literal, int]], instead: Callable[[Any, int, int], Any]
) -> list[Choices]:
    """Attributes that hold a changed integer: of the modules whose code used it, then of those around them, and on."""
    levels: list[Choices] = []
    seen: dict[tuple[str, str], int] = {}
    lists = _lists(literals)
    for literal, new in literals:
        old = argument(literal.node, literal.path)
        parts = literal.module.split(".") if literal.module else []
        for level in range(len(parts) + 1):
            levels.extend({} for _ in range(len(levels), level + 1))
            name = ".".join(parts[: len(parts) - level])
            module = live.get_submodule(name)
            for attribute, value in () if isinstance(module, fx.GraphModule) else vars(module).items():
                whole, after = lists.get((literal.node, literal.path[:-1]), (None, []))
                same = type(value) in (tuple, list) and list(value) == whole
                wanted = type(value)(after) if same else instead(value, old, new)
                if wanted is None or attribute in _NEVER or seen.setdefault((name, attribute), level) < level:
                    continue
                values = levels[level].setdefault((name, attribute), [])
                if wanted not in values:
                    values.append(wanted)
    return levels


def _lists(literals: Sequence[tuple[Literal, int]]) -> dict[tuple[fx.Node, tuple[int, ...]], tuple[Any, list[Any]]]:
    """Return the lists of integers among arguments, as they are and with all changes, such as the sizes of a split."""
    found: dict[tuple[fx.Node, tuple[int, ...]], tuple[Any, list[Any]]] = {}
    for literal, new in literals:
        if len(literal.path) > 1:
            place = literal.node, literal.path[:-1]
            whole = list(argument(*place))
            found.setdefault(place, (whole, list(whole)))[1][literal.path[-1]] = new
    return found


_NEVER = frozenset({"training", "_version"})


def _instead(value: Any, old: int, new: int) -> Any:
    """Return what an attribute's value becomes if its integer changes; None if it does not hold that integer."""
    if type(value) is int:
        return new if value == old else None
    if type(value) in (tuple, list) and value.count(old) == 1 and all(type(each) is int for each in value):
        return type(value)(new if each == old else each for each in value)
    return None


def _scaled(value: Any, old: int, new: int) -> Any:
    """Return what an integer becomes of which the code uses a small multiple or part, as in ``3 * self.dim``."""
    if type(value) is not int or value < 2 or value == old:
        return None
    if old % value == 0 and old // value <= _MOST_TIMES and new % (old // value) == 0:
        return new // (old // value)
    if value % old == 0 and value // old <= _MOST_TIMES:
        return new * (value // old)
    return None


_MOST_TIMES = 4
