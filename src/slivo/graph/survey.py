"""Survey: run a model once, and see what its modules are called with and which of their attributes its code reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slivo.graph.capture import evaluating, quiet
from slivo.graph.copies import duplicate
from slivo.graph.inputs import Call, fresh


@dataclass(frozen=True)
class Survey:
    """What one run of a model shows.

    Args:
        calls: What each module is called with, if it is called once; of tensors no more counts than shape and dtype.
        reads: The attributes of modules, by name of the module, that the code read.
        shapes: Whether the model runs on shapes alone (`OnShapes`), and keeps nothing of that run for the next.
    """

    calls: Mapping[str, Call]
    reads: frozenset[tuple[str, str]]
    shapes: bool


class OnShapes(TorchFunctionMode):
    """Has every tensor that an operator is given, or makes, on the meta device: a run that computes no values."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        named = {name: "meta" if name == "device" else _on_meta(value) for name, value in (kwargs or {}).items()}
        with torch.device("meta"):  # for what makes tensors and says nothing of a device
            return function(*_on_meta(args), **named)


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if value.is_meta else value.to("meta")
    if isinstance(value, torch.device):
        return torch.device("meta")
    return type(value)(map(_on_meta, value)) if type(value) in (tuple, list) else value


def survey(model: nn.Module, example_inputs: Call) -> Survey:
    """Run a copy of a model in evaluation: on shapes alone, which is quick, unless its code asks for values.

    Args:
        model: The model; it is left untouched, and so are the inputs.
        example_inputs: What it runs on.

    Example:
        >>> found = survey(nn.Sequential(nn.Linear(2, 3)), Call((torch.zeros(4, 2),)))
        >>> found.calls["0"].args[0].shape, ("0", "weight") in found.reads, ("0", "in_features") in found.reads
        (torch.Size([4, 2]), True, False)
    """
    for shapes in (True, False):
        copied = duplicate(model, share=True)
        args, kwargs = fresh(example_inputs)
        try:
            mode = OnShapes() if shapes else nullcontext()
            with quiet(), mode, evaluating(copied), torch.no_grad(), _watching(copied) as (calls, reads):
                copied(*args, **kwargs)
        except Exception:
            if shapes:
                continue
            raise
        if not (shapes and _keeps_shapes(copied)):
            break
    return Survey(
        {name: several[0] for name, several in calls.items() if len(several) == 1},
        frozenset(
            (name, attribute)
            for name, module in copied.named_modules(remove_duplicate=False)
            for attribute in reads.get(id(module), ())
        ),
        shapes,
    )


@contextmanager
def _watching(model: nn.Module) -> Iterator[tuple[dict[str, list[Call]], dict[int, set[str]]]]:
    """Note down the calls of modules, and the attributes read of modules, by their ids."""
    calls: dict[str, list[Call]] = {}
    reads: dict[int, set[str]] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, args, kwargs: calls.setdefault(name, []).append(Call(args, kwargs))

    def read(self: nn.Module, attribute: str) -> Any:
        reads.setdefault(id(self), set()).add(attribute)
        return object.__getattribute__(self, attribute)

    hooks = [
        module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in model.named_modules() if name
    ]
    try:
        with patch.object(nn.Module, "__getattribute__", read):
            yield calls, reads
    finally:
        for hook in hooks:
            hook.remove()


def _keeps_shapes(model: nn.Module) -> bool:
    held = (value for module in model.modules() for each in (vars(module), module._buffers) for value in each.values())
    return any(isinstance(value, Tensor) and value.is_meta for value in held)
