"""Search: a cut model that runs further with an attribute set than without is on the right way.

Where a run ends, attributes of the modules that it ended in are tried; where none helps, the innermost of these modules
whose code holds sizes is replaced by its own graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import inf
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from slivo.graph.capture import quiet
from slivo.graph.copies import stand_for_
from slivo.graph.parts import put_
from slivo.graph.program import Program
from slivo.graph.survey import OnShapes, Survey

Setting = tuple[str, str, Any]
"""A module, an attribute of it, and the value to set."""

Choices = dict[tuple[str, str], list[Any]]
"""For attributes of modules the values that they may have to take, in the order in which the code uses them."""

_MOST_RUNS = 400
"""Runs after which a search gives up; most end at their first wrong size."""

_MOST_PASSED = 8
"""Of the attributes of modules that a run got through, how many are tried."""


@dataclass(frozen=True)
class Trial:
    """How a model is tried.

    Args:
        run: Runs a model; returns what it gives out, or the exception it raises.
        right: Tells whether that is right.
        seen: Runs the model before the cut, and says what it shows.
    """

    run: Callable[[nn.Module], Sequence[Tensor] | Exception]
    right: Callable[[Sequence[Tensor] | Exception], bool]
    seen: Callable[[], Survey]

    def __call__(self, model: nn.Module) -> bool:
        """Run a model and tell whether it is right."""
        return self.right(self.run(model))


class _Progress(TorchFunctionMode):
    """Counts the operators that a run gets through, and knows in which modules it ended."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.stack: list[str] = []
        self.passed: list[str] = []

    def watch(self, model: nn.Module, prefix: str = "") -> None:
        """Follow the calls of a model's modules."""

        def enter(name: str) -> Callable[[nn.Module, Any], None]:
            return lambda _module, _inputs: self.stack.append(name)

        def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            self.passed.append(self.stack.pop())

        for name, module in model.named_modules():
            module.register_forward_pre_hook(enter(f"{prefix}.{name}".strip(".")))
            module.register_forward_hook(leave)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.count += 1
        return result


@dataclass
class Search:
    """A search for what makes a cut model right.

    Args:
        live: The cut model; it is changed in place, and of no use afterwards.
        trial: Tells whether it is right.
        choices: Attributes to try, the likeliest first.
        sources: Modules whose code, or that of modules in them, holds sizes.
        part: As in `slivo.graph.mend.mend_`.
    """

    live: nn.Module
    trial: Trial
    choices: Sequence[Choices]
    sources: Collection[str]
    part: Callable[[str], tuple[Program, fx.GraphModule] | None]
    done: dict[tuple[str, str], Any] = field(default_factory=dict)
    programs: dict[str, Program] = field(default_factory=dict)
    runs: int = 0
    progress: _Progress = field(default_factory=_Progress)
    shapes: bool = False

    def run(self) -> tuple[list[Setting], dict[str, Program]] | None:
        """Return what has to be set, and what takes the places of modules; None if nothing makes the model right."""
        seen = self.trial.seen()
        self.shapes = seen.shapes
        # Attributes that no code reads would be set for nothing, each at the price of a run.
        self.choices = [{at: values for at, values in each.items() if at in seen.reads} for each in self.choices]
        self.progress.watch(self.live)
        reached = self._attempt()
        while reached < inf and self.runs < _MOST_RUNS:
            stack, passed = list(self.progress.stack), list(self.progress.passed)
            if not self._set(reached, stack, passed) and not self._replace(stack):
                return None
            reached = self._attempt()
        return ([(*place, value) for place, value in self.done.items()], self.programs) if reached == inf else None

    def _attempt(self) -> float:
        """Run the model; return how far it came, infinitely far if it is right.

        It is run on shapes alone first, which is quick, unless its code asks for values.
        """
        self.runs += 1
        for shapes in (True, False) if self.shapes else (False,):
            self.progress.count, self.progress.stack, self.progress.passed = 0, [], []
            found = self._run(self.live, shapes=shapes)
            if isinstance(found, Exception):
                return self.progress.count
        return inf if self.trial.right(found) else self.progress.count

    def _run(self, model: nn.Module, *, shapes: bool) -> Sequence[Tensor] | Exception:
        with quiet(), OnShapes() if shapes else nullcontext(), self.progress:
            return self.trial.run(model)

    def _set(self, reached: float, stack: Sequence[str], passed: Sequence[str]) -> bool:
        """Set the attribute with which the model runs furthest, and the same one of modules alike."""
        for choices in self.choices:
            best, furthest, through = None, reached, False
            for place in _near(choices, stack, passed, self.done, self.programs):
                before = getattr(self.live.get_submodule(place[0]), place[1])
                for value in choices[place]:
                    set_(self.live, [(*place, value)])
                    got = self._attempt()
                    if got > furthest:
                        best, furthest = (*place, value), got
                        through = bool(stack) and stack[-1] not in self.progress.stack
                set_(self.live, [(*place, before)])
                if through:
                    break  # the module that was in the way is passed
            if best is not None:
                for setting in _alike(self.live, choices, best, self.done):
                    self.done[setting[:2]] = setting[2]
                    set_(self.live, [setting])
                return True
        return False

    def _replace(self, stack: Sequence[str]) -> bool:
        """Replace the innermost module that the model then gets through, and all of its class, by their own graphs."""
        for name in reversed(stack):
            module = self.live.get_submodule(name)
            if name not in self.sources or not self._put(name):
                continue
            if self._attempt() < inf and name not in self.progress.passed:
                parent, _, child = name.rpartition(".")
                setattr(self.live.get_submodule(parent), child, module)
                del self.programs[name]
                continue
            for other, each in list(self.live.named_modules()):
                if type(each) is type(module) and other in self.sources:
                    self._put(other)
            return True
        return False

    def _put(self, name: str) -> bool:
        """Put a module's graph in its place, if it has one."""
        found = self.part(name)
        if found is None:
            return False
        stand_for_(found[1], self.live.get_submodule(name))
        put_(self.live, name, found[1])
        self.progress.watch(found[1], name)
        self.programs[name] = found[0]
        return True


def set_(model: nn.Module, settings: Sequence[Setting]) -> None:
    """Set attributes of modules."""
    for module, attribute, value in settings:
        setattr(model.get_submodule(module), attribute, value)


def _near(
    choices: Choices,
    stack: Sequence[str],
    passed: Sequence[str],
    done: Mapping[tuple[str, str], Any],
    programs: Mapping[str, Program],
) -> list[tuple[str, str]]:
    """Attributes not yet set: of the modules in which the run ended, or else of those that it passed last."""
    replaced = tuple(f"{name}." for name in programs)
    choices = {place: values for place, values in choices.items() if not f"{place[0]}.".startswith(replaced)}
    inner = [place for name in reversed(stack) for place in choices if place[0] == name and place not in done]
    if inner:
        return inner
    recent = list(dict.fromkeys(reversed(passed)))
    return [place for name in recent for place in choices if place[0] == name and place not in done][:_MOST_PASSED]


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
