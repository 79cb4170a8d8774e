"""Mending: find the integers in a cut model's Python objects that have to change, by running it.

The captured graph says which integers in the model's code change, in which module's code each stands, and what it
becomes. Which attribute it came from is not written anywhere; attributes of the same value are tried. A model that runs
further with an attribute set than without is on the right way; one that computes what the cut graph computes is mended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from slivo.graph.axes import Graph
from slivo.graph.capture import evaluating
from slivo.graph.infer import Literal
from slivo.graph.program import argument, plan_rewrites, tensors_of

Setting = tuple[str, str, Any]
"""A module, an attribute of it, and the value to set."""

Choices = dict[tuple[str, str], list[Any]]
"""For attributes of modules the values that they may have to take, in the order in which the code uses them."""

_MOST_RUNS = 400
"""Runs after which a search gives up; most end at their first wrong size."""


def mend_(
    live: nn.Module,
    graph: Graph,
    keep: Mapping[str, Sequence[int]],
    agrees: Callable[[Sequence[Tensor] | Exception], bool],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> list[Setting] | None:
    """Set attributes of a cut model until it computes what it must.

    Args:
        live: The cut model; it is mended in place.
        graph: The graph of the uncut model.
        keep: For each axis that was cut, by name, the positions that stayed.
        agrees: Tells whether outputs are right.
        args: Positional inputs to run it on.
        kwargs: Keyword inputs.

    Returns:
        The attributes that were set, or None if no attributes were found that make the model right.
    """
    if agrees(run(live, args, kwargs)):
        return []
    levels = _levels(live, changed(graph, keep))
    plain = [[(*place, values[0]) for place, values in level.items() if len(values) == 1] for level in levels]
    plain = [level for level in plain if level]
    trials = [[setting for level in plain[: depth + 1] for setting in level] for depth in range(len(plain))]
    trials += [[setting for level in plain[depth:] for setting in level] for depth in range(1, len(plain))]
    for trial in trials:
        before = [(module, attribute, getattr(live.get_submodule(module), attribute)) for module, attribute, _ in trial]
        _set_(live, trial)
        if agrees(run(live, args, kwargs)):
            return trial
        _set_(live, before)
    choices: Choices = {}
    for level in levels:
        for place, values in level.items():
            choices.setdefault(place, []).extend(value for value in values if value not in choices.get(place, []))
    return _search_(live, choices, agrees, args, kwargs)


def changed(graph: Graph, keep: Mapping[str, Sequence[int]]) -> list[tuple[Literal, int]]:
    """Return the integers of the captured graph that change, each with its new value."""
    rewrites = {(r.node, r.path): r.value for r in plan_rewrites(graph, keep, any_batch=False)}
    return [
        (literal, rewrites[literal.node.name, literal.path])
        for literal in graph.inference.literals
        if (literal.node.name, literal.path) in rewrites
    ]


def _levels(live: nn.Module, literals: Sequence[tuple[Literal, int]]) -> list[Choices]:
    """Attributes that hold a changed integer: of the modules whose code used it, then of those around them, and on."""
    levels: list[Choices] = []
    seen: dict[tuple[str, str], int] = {}
    for literal, new in literals:
        old = argument(literal.node, literal.path)
        parts = literal.module.split(".") if literal.module else []
        for level in range(len(parts) + 1):
            levels.extend({} for _ in range(len(levels), level + 1))
            name = ".".join(parts[: len(parts) - level])
            for attribute, value in vars(live.get_submodule(name)).items():
                wanted = _instead(value, old, new)
                if wanted is None or attribute in _NEVER or seen.setdefault((name, attribute), level) < level:
                    continue
                values = levels[level].setdefault((name, attribute), [])
                if wanted not in values:
                    values.append(wanted)
    return levels


_NEVER = frozenset({"training", "_version"})


def _instead(value: Any, old: int, new: int) -> Any:
    """Return what an attribute's value becomes if its integer changes; None if it does not hold that integer."""
    if type(value) is int:
        return new if value == old else None
    if type(value) in (tuple, list) and value.count(old) == 1 and all(type(each) is int for each in value):
        return type(value)(new if each == old else each for each in value)
    return None


def _set_(model: nn.Module, settings: Sequence[Setting]) -> None:
    for module, attribute, value in settings:
        setattr(model.get_submodule(module), attribute, value)


@dataclass
class _Progress(TorchFunctionMode):
    """Counts the operators that a run gets through, and knows in which modules it ended."""

    count: int = 0
    stack: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def watch(self, model: nn.Module) -> list[RemovableHandle]:
        """Follow the calls of a model's modules."""

        def enter(name: str) -> Callable[[nn.Module, Any], None]:
            return lambda _module, _inputs: self.stack.append(name)

        def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            self.passed.append(self.stack.pop())

        hooks = [module.register_forward_pre_hook(enter(name)) for name, module in model.named_modules()]
        return hooks + [module.register_forward_hook(leave) for module in model.modules()]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.count += 1
        return result


def _search_(
    live: nn.Module,
    choices: Choices,
    agrees: Callable[[Sequence[Tensor] | Exception], bool],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> list[Setting] | None:
    """Set one attribute after the other, each time the one with which the model runs furthest."""
    progress = _Progress()
    hooks = progress.watch(live)
    done: dict[tuple[str, str], Any] = {}
    runs = 0

    def attempt() -> tuple[float, bool]:
        nonlocal runs
        runs += 1
        progress.count, progress.stack, progress.passed = 0, [], []
        with progress:
            found = run(live, args, kwargs)
        right = not isinstance(found, Exception) and agrees(found)
        return inf if right else progress.count, right

    reached, right = attempt()
    while not right and runs < _MOST_RUNS:
        best, furthest = None, reached
        for place in _near(choices, progress.stack, progress.passed, done):
            before = getattr(live.get_submodule(place[0]), place[1])
            for value in choices[place]:
                _set_(live, [(*place, value)])
                got, right = attempt()
                if got > furthest:
                    best, furthest = (*place, value), got
            _set_(live, [(*place, before)])
        if best is None:
            break
        for setting in _alike(live, choices, best, done):
            done[setting[:2]] = setting[2]
            _set_(live, [setting])
        reached, right = attempt()
    for hook in hooks:
        hook.remove()
    return [(*place, value) for place, value in done.items()] if right else None


def _near(
    choices: Choices, stack: Sequence[str], passed: Sequence[str], done: Mapping[tuple[str, str], Any]
) -> list[tuple[str, str]]:
    """Attributes not yet set: of the modules in which the run ended, or else of those that it passed last."""
    inner = [place for name in reversed(stack) for place in choices if place[0] == name and place not in done]
    if inner:
        return inner
    recent = list(dict.fromkeys(reversed(passed)))
    return [place for name in recent for place in choices if place[0] == name and place not in done][:32]


def _alike(live: nn.Module, choices: Choices, setting: Setting, done: Mapping[tuple[str, str], Any]) -> list[Setting]:
    """The setting, and the same one of all modules of that class that have the same choice to make."""
    module, attribute, value = setting
    values = choices[module, attribute]
    kind, number = type(live.get_submodule(module)), values.index(value)
    return [setting] + [
        (name, other, found[number])
        for (name, other), found in choices.items()
        if other == attribute
        and name != module
        and (name, other) not in done
        and len(found) == len(values)
        and type(live.get_submodule(name)) is kind
    ]


def run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor] | Exception:
    """Run a model in evaluation; return the tensors it gives out, or the exception it raises."""
    try:
        with evaluating(model), torch.no_grad():
            return tensors_of(model(*args, **kwargs))
    except Exception as error:
        return error
