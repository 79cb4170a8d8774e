"""Sizes: graphs that take inputs of other sizes than the example's, and refuse those for which they would be wrong.

`torch.export` keeps the sizes of inputs symbolic: the graph reads them off its inputs and computes with them. Where
code takes a way that depends on a size (``if length > 512``), the graph has the way that the example takes. What was
asked is noted down while the code runs, and the graph asks it again whenever it is called: sizes for which the code
would take another way are refused. The same goes for sizes that the code made numbers of (a loop in Python).

What operators ask within themselves, such as which kernel to use, is not asked again: it changes no result.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any
from unittest.mock import patch

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses import fake_tensor
from torch.fx.experimental import _config, sym_node
from torch.fx.proxy import GraphAppendingTracer
from torch.utils import _pytree as pytree
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis
from torch.utils._sympy.symbol import SymT, symbol_is_type

from slivo.errors import CaptureError, ShapeError
from slivo.graph.samples import trying_sizes

Number = int | float | bool
Answers = list[tuple[sym_node.SymNode, bool]]
"""What the code asked about sizes, and what it was told."""


def symbolic_shapes(tensors: Any, dims: int | None) -> torch.export.ShapesCollection:
    """Return for `torch.export` that sizes of inputs stay symbolic, unless the code makes numbers of them.

    Args:
        tensors: The inputs, in any containers.
        dims: Of how many dimensions of each, from the first; None for all.
    """
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in pytree.tree_leaves(tensors):
        if isinstance(tensor, Tensor):
            shapes[tensor] = dict.fromkeys(range(tensor.dim())[:dims], torch.export.Dim.AUTO)
    return shapes


@contextmanager
def listening() -> Iterator[Answers]:
    """Note down what Python code asks about symbolic sizes; a size of 1 is one like any other (from PyTorch 2.7 on)."""
    from torch._dynamo import config  # which takes a second to import, and which export imports anyway

    answers: Answers = []
    plain = sym_node.SymNode.bool_

    def answer(self: sym_node.SymNode) -> bool:
        told = plain(self)
        if not _in_operator(sys._getframe(1)):
            answers.append((self, told))
        return told

    with ExitStack() as stack:
        stack.enter_context(patch.object(sym_node.SymNode, "bool_", answer))
        # What is kept of operators for their next call takes longer to keep, with symbols, than to find out again.
        stack.enter_context(config.patch(fake_tensor_cache_enabled=False))
        if hasattr(_config, "backed_size_oblivious"):
            stack.enter_context(_config.patch(backed_size_oblivious=True))  # type: ignore[attr-defined]
        stack.enter_context(trying_sizes())
        yield answers


def _in_operator(frame: FrameType | None) -> bool:
    """Tell whether code runs on behalf of an operator, of which only the output's shape is found out."""
    while frame is not None:
        if frame.f_code is _OPERATOR:
            return True
        frame = frame.f_back
    return False


_OPERATOR = inspect.unwrap(fake_tensor.FakeTensorMode.__torch_dispatch__).__code__


def number(value: Any) -> Any:
    """Return a symbolic number as the example's, and all else as it is; one that depends on values has none.

    Example:
        >>> number(3)
        3
    """
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        hint = value.node.hint if value.node.has_hint() else None
        return value if hint is None else hint
    return value


def has_size(tensor: Tensor, dim: int, size: int, name: str) -> None:
    """Refuse an input of a graph whose dimension has another size than the graph is for.

    Raises:
        ShapeError: If so.

    Example:
        >>> has_size(torch.zeros(2, 3), 1, 3, "x")
    """
    if tensor.shape[dim] != size:
        raise ShapeError(
            f"dimension {dim} of the input {name} is {int(tensor.shape[dim])}, but the captured graph that stands for "
            f"this module's code is for {size} alone. Prune with example inputs of the size to use"
        )


def holds(condition: bool, told: str) -> None:
    """Refuse inputs of sizes for which the code that a graph stands for would take another way.

    Raises:
        ShapeError: If the condition does not hold.

    Example:
        >>> holds(True, "x.shape[0] > 1")
    """
    if not condition:
        raise ShapeError(
            f"the captured graph that stands for this module's code is for inputs with {told} alone; the code takes "
            "another way otherwise. Prune with example inputs of the sizes to use"
        )


def check_sizes_(module: fx.GraphModule, answers: Iterable[tuple[sym_node.SymNode, bool]] = ()) -> None:
    """Have a captured graph refuse what it is not for, before anything else.

    Args:
        module: The graph; its placeholders know the symbolic shapes of inputs.
        answers: What the code asked about sizes, if they are symbolic.

    Raises:
        CaptureError: If a size that was asked about cannot be read off the inputs.
    """
    given = [node for node in module.graph.nodes if node.op == "placeholder"]
    known: dict[sympy.Symbol, tuple[fx.Node, int]] = {}
    conditions: dict[sympy.Basic, None] = {}
    with module.graph.inserting_before(given[-1].next if given else None):
        for node, dim, size in _sizes(given):
            if not isinstance(size, torch.SymInt):
                # Named after what it checks, so that edits find it whatever else is checked.
                name, args = f"size_{node.name}_{dim}", (node, dim, size, str(node.target))
                module.graph.create_node("call_function", has_size, args, name=name)
            elif isinstance(size.node.expr, sympy.Symbol):
                known.setdefault(size.node.expr, (node, dim))
        sizes = {symbol: _size_of(node, dim) for symbol, (node, dim) in known.items()}
        names = {symbol: sympy.Symbol(f"{node.target}.shape[{dim}]") for symbol, (node, dim) in known.items()}
        for node, dim, size in _sizes(given):
            if isinstance(size, torch.SymInt) and known.get(size.node.expr) != (node, dim):
                own = sympy.Symbol(f"{node.target}.shape[{dim}]")
                sizes[own], names[own] = _size_of(node, dim), own
                conditions[sympy.Eq(own, size.node.expr)] = None
        for asked, told in answers:
            found = sympy.sympify(asked.expr)
            conditions[found if told else sympy.Not(found)] = None
        for condition in conditions:
            if condition not in (sympy.true, sympy.false):
                _check_(module.graph, condition, sizes, names)
    for node in [node for node in module.graph.nodes if node.target is torch.ops.aten.sym_size.int and not node.users]:
        module.graph.erase_node(node)
    module.recompile()


def _check_(graph: fx.Graph, condition: sympy.Basic, sizes: dict[sympy.Symbol, fx.Proxy], names: Any) -> None:
    asked = condition.free_symbols
    if any(symbol_is_type(each, (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)) for each in asked):
        return  # of a size that depends on values nothing is told but what always holds
    if not asked <= sizes.keys():
        raise CaptureError(f"{condition} cannot be read off the inputs")
    holding = sympy_interp(PythonReferenceAnalysis, sizes, condition)
    graph.call_function(holds, (holding.node, str(condition.subs(names))))


def _sizes(given: list[fx.Node]) -> Iterator[tuple[fx.Node, int, int | torch.SymInt]]:
    for node in given:
        value = node.meta.get("val")
        for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Integer:
                size = int(size.node.expr)  # the code made a number of it
            yield node, dim, size


def _size_of(node: fx.Node, dim: int) -> fx.Proxy:
    graph = node.graph
    return fx.Proxy(graph.call_function(torch.ops.aten.sym_size.int, (node, dim)), GraphAppendingTracer(graph))
