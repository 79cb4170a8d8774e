"""Taps: what modules inside a model put out, by their path, without a change of the model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from slivo.distill._tensors import first_tensor
from slivo.errors import SlivoError


@contextmanager
def tap(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of modules while a model runs.

    The hooks are there only inside the ``with``, also if it ends by an error, so that the model can be copied, saved,
    and its modules replaced in between. A copy that is made inside collects nothing. What `torch.compile` made of the
    model, or of modules in it, runs uncompiled inside, for compiled code passes hooks by.

    Args:
        model: The model; also compiled, or wrapped for data-parallel training. Paths are those of the model itself.
        paths: Qualified names of modules, as in ``model.named_modules()``, or patterns as in `match`.

    Yields:
        A dict that fills as the model runs: by path the module's output, or the first tensor in it. It is a copy,
        which operations in place (such as ``ReLU(inplace=True)`` behind the module) do not change. A module that runs
        more than once gives its last output.

    Raises:
        SlivoError: If there is no module of a path (names the nearest), or a module puts out no tensor.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
        >>> with tap(net, ["0"]) as seen:
        ...     _ = net(torch.ones(1, 2))
        >>> seen["0"].shape
        torch.Size([1, 3])
    """
    seen: dict[str, Tensor] = {}
    handles = []
    try:
        for path in dict.fromkeys(found for pattern in paths for found in match(model, pattern)):
            module = _find(model, path)
            assert module is not None  # for it was matched
            handles.append(module.register_forward_hook(_keeper(path, module, seen)))
        with _uncompiled(model) if handles else nullcontext():
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def match(model: nn.Module, pattern: str, *, role: str = "model") -> list[str]:
    """Return the paths of the modules that a pattern matches, in the model's order.

    Args:
        model: The model.
        pattern: A path such as ``"layer1.0"``, in which ``*`` stands for any part of one name and ``**`` for any part
            of the path. ``""`` is the model itself.
        role: How to call the model in messages.

    Raises:
        SlivoError: If nothing matches; names the nearest paths.

    Example:
        >>> match(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "*")
        ['0', '1']
    """
    pattern = _bare(pattern)
    if "*" not in pattern and _find(model, pattern) is not None:
        return [pattern]
    model = unwrapped(model)
    # A compiled module and what it was made of have one path.
    names = list(dict.fromkeys(_bare(name) for name, _ in model.named_modules(remove_duplicate=False)))
    parts = re.split(r"(\*\*|\*)", pattern)
    expression = "".join({"**": ".*", "*": "[^.]*"}.get(part, re.escape(part)) for part in parts)
    found = [name for name in names if re.fullmatch(expression, name) and (name or not pattern)]
    if not found:
        raise SlivoError(f"the {role} ({type(model).__name__}) has no module {pattern!r}; {_near(names, pattern)}")
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model itself, of one that `torch.compile` or data-parallel training wraps.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> unwrapped(nn.DataParallel(net)) is net
        True
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif _COMPILED in model._modules:
            model = model.get_submodule(_COMPILED)
        else:
            return model


_COMPILED = "_orig_mod"
"""What `torch.compile` calls the module that it wraps."""


def _bare(path: str) -> str:
    """Return a path without what `torch.compile` puts into it."""
    return ".".join(part for part in path.split(".") if part != _COMPILED)


def _find(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module of a path, not compiled, or None if there is none."""
    module = unwrapped(model)
    for part in path.split(".") if path else ():
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            return None
        module = child.get_submodule(_COMPILED) if _COMPILED in child._modules else child
    return module


def _compiled(module: nn.Module) -> bool:
    """Tell whether `torch.compile` made something of a module: another one, its call, or its forward."""
    forward = vars(module).get("forward")
    called = module._compiled_call_impl is not None or hasattr(forward, "_torchdynamo_orig_callable")
    return called or _COMPILED in module._modules


def _uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """Run what is compiled in a model as the Python that it was made of; looked for, as it loads the compiler."""
    if any(map(_compiled, model.modules())):
        eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return eager
    return nullcontext()


def _keeper(path: str, tapped: nn.Module, seen: dict[str, Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    def keep(module: nn.Module, _: Any, output: Any) -> None:
        # A deep copy of a model takes its hooks along.
        if module is not tapped:
            return
        tensor = first_tensor(output)
        if tensor is None:
            raise SlivoError(f"module {path!r} puts out {type(output).__name__} without a tensor; tap another module")
        seen[path] = tensor.clone()

    return keep


def _near(names: list[str], pattern: str) -> str:
    """Return a hint at paths like one that is not there."""
    last = pattern.rpartition(".")[2]
    same = [name for name in names if name and name.rpartition(".")[2] == last]
    near = [*dict.fromkeys([*same[:3], *difflib.get_close_matches(pattern, names, n=3)])]
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    top = [name for name in names if name and "." not in name]
    return f"at the top there are {', '.join(top[:8])}{' ...' if len(top) > 8 else ''}" if top else "it has none"
