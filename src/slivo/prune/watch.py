"""Watch: what layers are given while a model runs, what they make of it, and what that is added to."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from slivo.graph.inputs import Call, fresh

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that are linear in what they read. Subclasses may compute something else."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

_ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}


@dataclass
class Pass:
    """One call of a layer.

    Args:
        x: What it was given.
        y: What it gave out, a copy.
        norm: The batch norm that took the output itself, if one did.
        other: What the output, or the batch norm's, was added to, a copy; None if it was added to nothing, or to what
            came after it: that may be computed from it.
    """

    x: Tensor
    y: Tensor
    norm: str | None = None
    other: Tensor | None = None
    now: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class End:
    """When a layer has been seen enough of: after so many calls, and the addition that follows them if there is one."""

    calls: int
    added: bool


class _DoneError(Exception):
    """Ends a run of which nothing more is asked."""


class _Additions(TorchFunctionMode):
    """Tells of additions of two tensors of one shape, before they are made: they may be made in place.

    Of each addition the later summand is told, and the earlier one.
    """

    def __init__(self, tell: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.tell = tell
        self.clock = itertools.count()
        self.made: MutableMapping[Tensor, int] = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ADDITIONS and not kwargs and all(isinstance(each, Tensor) for each in args[:2]):
            one, other = args[:2]
            if one.shape == other.shape and one is not other:
                self.tell(*sorted((one, other), key=lambda each: -self.made.get(each, -1)))
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, Tensor):
                self.made[each] = next(self.clock)
        return found


def watch(
    model: nn.Module, names: Iterable[str], call: Call, ends: Mapping[str, End] | None = None
) -> dict[str, list[Pass]]:
    """Run a model and return what passes through some of its layers, in order of execution.

    Args:
        model: In evaluation mode; it is run without gradients by the caller.
        names: The layers.
        call: The model's arguments; left untouched.
        ends: When each has been seen enough of, to end the run early; None to run to the end.
    """
    seen: dict[str, list[Pass]] = {}
    norms: Counter[str] = Counter()

    def stop_if_done() -> None:
        if ends is not None and all(_is_done(seen.get(name, []), end) for name, end in ends.items()):
            raise _DoneError

    def note_layer(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            seen.setdefault(name, []).append(Pass(x, output.clone(), now=output))
            stop_if_done()

        return hook

    def note_norm(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            norms[name] += 1
            for one in _who_gave(seen, args[0] if args else kwargs["input"]):
                # Subclasses may have an activation behind the norm.
                one.norm, one.now = name, output if type(modules[name]) in NORMS else None

        return hook

    def note_addition(one: Tensor, other: Tensor) -> None:
        for each in _who_gave(seen, one):
            each.other = other.clone()
            stop_if_done()

    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for name in names:
            stack.callback(modules[name].register_forward_hook(note_layer(name), with_kwargs=True).remove)
        for name, module in modules.items():
            if isinstance(module, NORMS) and module.running_mean is not None:
                stack.callback(module.register_forward_hook(note_norm(name), with_kwargs=True).remove)
        args, kwargs = fresh(call)
        stack.enter_context(suppress(_DoneError))
        with _Additions(note_addition):
            model(*args, **kwargs)
    for passes in seen.values():
        for each in passes:
            if each.norm is not None and norms[each.norm] != len(passes):
                each.norm = None  # others go through it, too
    return seen


def _who_gave(seen: Mapping[str, list[Pass]], tensor: Tensor) -> list[Pass]:
    """Return the latest calls whose output a tensor is."""
    return [passes[-1] for passes in seen.values() if passes[-1].now is tensor]


def _is_done(passes: list[Pass], end: End) -> bool:
    return len(passes) >= end.calls and (not end.added or passes[end.calls - 1].other is not None)
