"""Blockwise: what a model's parts read, one part after the other, each behind those that have been changed already.

A part is a block, of those that follow one another, or a layer where there are no blocks. While one is watched, what is
kept is the output of the part before it, for every batch. Nothing is assumed of how blocks are called: the model's own
code calls them, and those that lie further back give out what is kept, without running. Where a part reads anything
else that parts before it have computed (a skip connection, an encoder's output), those parts run again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slivo.graph.inputs import Call, fresh
from slivo.graph.program import tensors_of
from slivo.measure.readers import Watch


@dataclass(frozen=True)
class Part:
    """A part of a model, and how it is run.

    Args:
        module: Its qualified name.
        calls: How often it is called in one run; 0 if other code uses its weights, or that is not known.
        follows: Whether what it reads of other parts' results is what the part before it gave out, and no more.
    """

    module: str
    calls: int
    follows: bool


class _DoneError(Exception):
    """Ends a run of which nothing more is asked."""


def repeated(model: nn.Module) -> list[str]:
    """Return the blocks of a model: the entries of its lists of two or more modules of one class, each made of others.

    Of lists within lists the outermost is meant: experts are no blocks.

    Example:
        >>> block = lambda: nn.TransformerEncoderLayer(8, 2)
        >>> repeated(nn.ModuleDict({"layers": nn.ModuleList([block(), block()]), "head": nn.Linear(8, 3)}))
        ['layers.0', 'layers.1']
    """
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or _within(path, found):
            continue
        entries = list(module.children())
        if len(entries) > 1 and len({type(each) for each in entries}) == 1 and all(_is_made(each) for each in entries):
            found += [f"{path}.{name}" if path else name for name, _ in module.named_children()]
    return found


def _is_made(module: nn.Module) -> bool:
    """Tell whether a module holds modules, and weights in them."""
    return any(next(each.parameters(), None) is not None for each in module.children())


def _within(path: str, parts: Iterable[str]) -> bool:
    return any(path == part or path.startswith(f"{part}.") or not part for part in parts)


def part_of(tensor: str, parts: Iterable[str]) -> str | None:
    """Return the part that holds a tensor, by name.

    Example:
        >>> part_of("h.10.fc.weight", ["h.1", "h.10"])
        'h.10'
    """
    return next((part for part in parts if _within(tensor, [part])), None)


def run_order(model: nn.Module, weights: Mapping[str, Tensor], parts: Mapping[str, str], call: Call) -> list[str]:
    """Return the parts of which a run multiplies anything with weights, in the order in which it does so first.

    Args:
        model: In evaluation mode.
        weights: The weights, by name.
        parts: Of each the part that it belongs to.
        call: The model's arguments; left untouched.
    """
    watch = Watch(weights, lambda activations: activations.new_zeros(activations.shape[0]), spread=False, stacks=True)
    with running(model, watch):
        args, kwargs = fresh(call)
        model(*args, **kwargs)
    return list(dict.fromkeys(parts[name.rpartition("[")[0]] for name in watch.found))


def run_through(model: nn.Module, names: Sequence[str], call: Call) -> list[Part]:
    """Run a model once, and tell how its parts are run.

    What each gives out is made to ask for a gradient, and nothing else does: so PyTorch tells what was computed from
    it.

    Args:
        model: In evaluation mode.
        names: Qualified names of the parts, in the order in which they run.
        call: The model's arguments; left untouched.
    """
    calls: Counter[str] = Counter()
    order: list[str] = []
    other: set[str] = set()
    last: list[tuple[Tensor, int]] = []
    entered: dict[str, list[tuple[Tensor, int]]] = {}

    def enter(name: str, args: Any, kwargs: Any) -> None:
        calls[name] += 1
        order.append(name)
        entered[name] = [(given, given._version) for given in tensors_of((args, kwargs))]
        for given, _ in entered[name]:
            passed = any(given is one and given._version == version for one, version in last)
            if given.requires_grad and not passed:
                other.add(name)

    def leave(name: str, output: Any) -> Any:
        for given, version in entered.pop(name):
            if given._version != version and given.is_leaf and given.is_floating_point():
                given.requires_grad_()  # changed in place; other code may hold it, too
        marked = pytree.tree_map_only(Tensor, _marked, output)
        last[:] = [(each, each._version) for each in tensors_of(marked)]
        if not any(each.requires_grad for each, _ in last):
            other.add(name)  # it cannot be seen what is made of it
        return marked

    with ExitStack() as stack, _asking(model, False), _unsaved():
        for name in names:
            module = model.get_submodule(name)
            stack.callback(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: enter(name, args, kwargs), with_kwargs=True
                ).remove
            )
            stack.callback(module.register_forward_hook(lambda _, __, output, name=name: leave(name, output)).remove)
        args, kwargs = fresh(call)
        try:
            with torch.enable_grad():
                model(*args, **kwargs)
        except RuntimeError:  # the model has run before: its code does what PyTorch refuses with gradients
            order.clear()
            calls.clear()
    straight = order == list(names)
    return [Part(name, calls[name], straight and name not in other) for name in names]


def _marked(tensor: Tensor) -> Tensor:
    """Return a copy that asks for a gradient, and that code may change in place."""
    found = tensor.detach().clone()
    return found.requires_grad_().clone() if found.is_floating_point() else found


class Replay:
    """Runs of a model on batches, up to one part after the other.

    Args:
        model: In evaluation mode.
        parts: Its parts, in the order in which they run.
        calls: The batches.
        hold: Where outputs are kept between parts; None for where they are.
    """

    def __init__(
        self, model: nn.Module, parts: Sequence[Part], calls: Sequence[Call], hold: torch.device | str | None = None
    ) -> None:
        self.model, self.parts, self.calls, self.hold = model, parts, calls, hold
        self.kept: list[Any] = [None] * len(calls)

    def watch(self, index: int, watch: Watch) -> None:
        """Run all batches up to a part, and have its weights watched; parts must be taken in their order."""
        for number, call in enumerate(self.calls):
            with suppress(_DoneError), ExitStack() as stack:
                if index and all(part.follows for part in self.parts[: index + 1]):
                    stack.enter_context(self._shortened(index, number))
                else:
                    self.kept[number] = None
                stack.enter_context(self._ending(self.parts[index]))
                stack.enter_context(running(self.model, watch))
                args, kwargs = fresh(call)
                self.model(*args, **kwargs)

    @contextmanager
    def _shortened(self, index: int, number: int) -> Iterator[None]:
        """Have the parts before the last one give out what is kept, and keep what the last one gives out."""
        *earlier, last = [self.model.get_submodule(part.module) for part in self.parts[:index]]

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self.kept[number] = pytree.tree_map_only(Tensor, self._copied, output)

        with ExitStack() as stack:
            for module in earlier:
                stack.enter_context(_giving(module, lambda: self._back(self.kept[number], last)))
            stack.callback(last.register_forward_hook(keep).remove)
            yield

    def _copied(self, tensor: Tensor) -> Tensor:
        """Return a copy of an output to keep: the next part may change it in place."""
        return tensor.detach().to(self.hold or tensor.device, copy=True)

    def _back(self, kept: Any, module: nn.Module) -> Any:
        """Return what is kept where a module can read it."""
        if self.hold is None:
            return kept
        device = next((each.device for each in module.parameters()), None)
        return pytree.tree_map_only(Tensor, lambda each: each.to(device or each.device), kept)

    @contextmanager
    def _ending(self, part: Part) -> Iterator[None]:
        """End a run when a part has been called for the last time."""
        calls = 0

        def leave(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == part.calls:
                raise _DoneError

        handle = self.model.get_submodule(part.module).register_forward_hook(leave)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def running(model: nn.Module, watch: Watch) -> Iterator[None]:
    """Watch what a model multiplies with weights.

    Kernels of inference alone hide it; they are not taken where weights ask for gradients.
    """
    with torch.enable_grad(), _asking(model, True), _unsaved(), watch:
        yield


@contextmanager
def _giving(module: nn.Module, value: Callable[[], Any]) -> Iterator[None]:
    """Have a module give out a value in place of what it computes."""
    held: dict[str, Any] = vars(module)
    before = {name: held[name] for name in ("forward",) if name in held}
    held["forward"] = lambda *_, **__: value()
    try:
        yield
    finally:
        del held["forward"]
        held.update(before)


@contextmanager
def _asking(model: nn.Module, asks: bool) -> Iterator[None]:
    """Have all parameters that can ask for gradients, or none."""
    before: Mapping[nn.Parameter, bool] = {each: each.requires_grad for each in model.parameters()}
    for each in before:
        each.requires_grad_(asks and each.is_floating_point())
    try:
        yield
    finally:
        for each, flag in before.items():
            each.requires_grad_(flag)


@contextmanager
def _unsaved() -> Iterator[None]:
    """Have nothing kept for gradients that nobody computes."""
    empty = torch.empty(0)
    with torch.autograd.graph.saved_tensors_hooks(lambda _: empty, lambda kept: kept):
        yield
