"""Sparing: what PyTorch and Python do while graphs are made, and need not."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import fx
from torch.fx.experimental import proxy_tensor


@contextmanager
def collecting_rarely() -> Iterator[None]:
    """Have Python look for garbage rarely while graphs are made, of whose many objects next to none is any.

    It looks at all objects that there are again and again, which takes a sixth of the time.
    """
    before = gc.get_threshold()
    if 0 < before[0] < _RARELY:
        gc.set_threshold(_RARELY, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


_RARELY = 200_000
"""Objects made until Python looks for garbage; graphs of the largest networks have some millions."""


@contextmanager
def sparing() -> Iterator[None]:
    """Have PyTorch leave out, while it exports, what is of no use here and takes half of the time.

    That is where in the code each operator stands, how each result lies in memory, what was assumed of sizes (the graph
    asks that by itself: `slivo.graph.sizes`), and the Python code of every graph module on the way, which nobody runs:
    those that come out are to be compiled again.
    """
    from torch.export import _trace  # which takes a second to import, and which export imports anyway

    with ExitStack() as stack:
        stack.enter_context(collecting_rarely())
        if hasattr(_trace, "produce_guards_and_solve_constraints"):
            stack.enter_context(patch.object(_trace, "produce_guards_and_solve_constraints", lambda *_, **__: None))
        stack.enter_context(patch.object(fx.config, "do_not_emit_stack_traces", True, create=True))
        if hasattr(proxy_tensor, "_extract_tensor_metadata"):
            stack.enter_context(patch.object(proxy_tensor, "_extract_tensor_metadata", lambda *_: None))
        stack.enter_context(patch.object(fx.GraphModule, "recompile", compile_when_called))
        yield


def compile_when_called(module: fx.GraphModule) -> None:
    """Take the place of `torch.fx.GraphModule.recompile`: note what the graph takes and gives out, and no more."""
    codegen = module.graph._codegen
    if isinstance(codegen, fx.graph._PyTreeCodeGen):
        module._in_spec, module._out_spec = codegen.pytree_info.in_spec, codegen.pytree_info.out_spec

    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        _compile(self)
        return self(*args, **kwargs)

    type(module).forward = forward


_compile = fx.GraphModule.recompile
