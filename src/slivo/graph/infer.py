"""Inference: walk a captured graph, apply each operator's rule, and collect what is known of every dimension."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from slivo.graph.capture import Capture
from slivo.graph.decompose import decompose, numbers, tensor_inputs
from slivo.graph.dims import UNIT, Term, fix, head, leaves, unify, var
from slivo.graph.sizes import number
from slivo.graph.statements import Cost, Fact, Limit, Literal, Mark

Dims = tuple[Term, ...]
Rule = Callable[..., "Dims | list[Dims | None]"]

_MISFITS = (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError)
"""What a rule raises on arguments of a form that it does not read, such as a size that is itself computed."""

RULES: dict[object, Rule] = {}
"""The rule of each operator, filled by `rule` where the rules are defined."""


def rule(*operators: object) -> Callable[[Rule], Rule]:
    """Register a function as the rule of operators; those of other libraries are given by their qualified names.

    A rule is called with the `Inference` and the operator's own arguments (nodes stand for tensors), states what is
    equal to what, and returns the dimensions of the output: a tuple of terms, or a list of them for several outputs.
    """

    def register(function: Rule) -> Rule:
        for operator in operators:
            RULES[operator] = function
        return function

    return register


@dataclass
class Inference:
    """What is known while a graph is walked; rules read and extend it.

    With a boundary, the inputs and outputs of the graph keep their sizes, but for outputs (by number) that are free; a
    part of a network has none.
    """

    capture: Capture
    dims: dict[fx.Node, Any] = field(default_factory=dict)
    tensors: dict[str, Dims] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    literals: list[Literal] = field(default_factory=list)
    ties: list[Dims] = field(default_factory=list)
    roles: list[tuple[Term, str, str]] = field(default_factory=list)
    reads: set[Term] = field(default_factory=set)
    unknown: dict[str, int] = field(default_factory=dict)
    limits: list[Limit] = field(default_factory=list)
    marks: dict[tuple[fx.Node, int], Mark] = field(default_factory=dict)
    ordered: dict[Term, Term] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    boundary: bool = True
    free: frozenset[int] = frozenset()
    node: fx.Node = field(init=False)
    read_marks: set[fx.Node] = field(default_factory=set)

    def of(self, argument: Any) -> Dims:
        """Return the dimensions of an argument; a number has none."""
        if isinstance(argument, fx.Node):
            dims = self.dims[argument]
            if isinstance(dims, tuple):
                return dims
        return ()

    def shape(self, argument: Any) -> tuple[int, ...]:
        """Return the sizes of an argument's dimensions."""
        return tuple(term.size for term in self.of(argument))

    @property
    def module(self) -> str:
        """The name of the innermost module whose code made the current node."""
        return module_of(self.node)

    @property
    def place(self) -> str:
        """The current node in words, for reasons."""
        where = f" in {self.module}" if self.module else ""
        return f"{operator_name(self.node.target)}{where}"

    def unify(self, left: Term, right: Term) -> None:
        """State that two dimensions are the same."""
        unify(left, right, self.place)

    def fix(self, terms: Sequence[Term], reason: str) -> None:
        """Forbid cuts in dimensions."""
        for term in terms:
            fix(term, f"{self.place}: {reason}")

    def fresh(self, sizes: Sequence[int], reason: str | None = None) -> Dims:
        """Return new dimensions, fixed if a reason is given."""
        return tuple(var(size, None if reason is None else f"{self.place}: {reason}") for size in sizes)

    def outputs(self) -> list[tuple[int, ...] | None]:
        """Return the shapes of the current node's outputs; None for one that is no tensor."""
        return _shapes(self.node.meta.get("val"))

    def output(self) -> tuple[int, ...]:
        """Return the shape of the current node's only output."""
        shape = self.outputs()[0]
        return () if shape is None else shape

    def cost(self, constant: int, *terms: Term) -> None:
        """Count multiply-accumulates: the constant times the product of the dimensions."""
        if all(term.size > 0 for term in terms):
            self.costs.append(Cost(constant, terms))

    def fact(self, attribute: str, *terms: Term) -> None:
        """Say which attribute of the current module, if it has it, holds a dimension's size."""
        self.facts.append(Fact(self.module, attribute, terms))

    def literal(self, path: Sequence[int], term: Term, shift: int = 0) -> None:
        """Say which integer among the current node's arguments stands for a dimension, plus a number."""
        self.literals.append(Literal(self.node, self.module, tuple(path), term, shift))

    def limit(self, term: Term, *, multiple: int = 1, least: int = 1, routed: bool = False) -> None:
        """Say what the size of a dimension has to be."""
        self.limits.append(Limit(term, multiple, least, routed))

    def mark(self, kind: str, term: Term, output: int = 0) -> None:
        """Say what the values of an output of the current node are."""
        self.marks[self.node, output] = Mark(kind, term)

    def marked(self, argument: Any, *kinds: str) -> Term | None:
        """Return the dimension that the values of an argument are about, if they are of one of these kinds.

        Whoever asks does with it what the values say.
        """
        found = self.marks.get((argument, 0)) if isinstance(argument, fx.Node) else None
        if found is None or found.kind not in kinds:
            return None
        self.read_marks.add(argument)
        return found.term

    def tie(self, terms: Sequence[Term]) -> None:
        """Say that dimensions stay of equal size, though they are not the same."""
        self.ties.append(tuple(terms))

    def read(self, *terms: Term) -> None:
        """Say that a dimension of a weight is contracted with an activation: it reads what another weight wrote."""
        self.reads.update(terms)

    def role(self, term: Term, role: str) -> None:
        """Give a dimension a name for people: the current module's, and what it is there."""
        self.roles.append((term, self.module, role))

    def run(self) -> None:
        """Walk the whole graph."""
        for node in self.capture.graph.graph.nodes:
            self.node = node
            if node.op == "placeholder":
                self.dims[node] = self._given(node, "an input of the network" if self.boundary else None)
            elif node.op == "get_attr":
                self.dims[node] = self._fetched(node)
            elif node.op == "output":
                self._give_out(node)
            else:
                self.dims[node] = self._call(node) if node.op == "call_function" else None
        for rows, term in self.ordered.items():
            if any(leaf.fixed is not None for leaf in leaves(rows)):
                fix(term, "orders what depends on the order")

    def _give_out(self, node: fx.Node) -> None:
        """Fix what leaves the network, or a part: the sizes of the one, and the order in what is told by number."""
        outputs = list(flatten_leaves(node.args)) if self.boundary else []
        for position, each in enumerate(outputs):
            for dims in _tensors(self.dims[each]) if isinstance(each, fx.Node) and position not in self.free else ():
                for term in dims:
                    fix(term, "an output of the network")
        self._fix_told(node)

    def inline(self, module: Any, arguments: Sequence[Any]) -> list[Dims | None]:
        """Walk the graph of a sub-module (a ``no_grad`` block, say) as if it stood at the current node."""
        owner = self.node.graph.owning_module
        assert owner is not None
        return self._walk(getattr(owner, module.target).graph, arguments)

    def _walk(self, graph: fx.Graph, arguments: Sequence[Any]) -> list[Dims | None]:
        given, outer, result = iter(arguments), self.node, list[Dims | None]()
        for node in graph.nodes:
            self.node = node
            if node.op == "placeholder":
                argument = next(given)
                self.dims[node] = self.dims[argument] if isinstance(argument, fx.Node) else None
            elif node.op == "get_attr":
                self.dims[node] = self._given(node, "a constant of the network")
            elif node.op == "output":
                self._fix_told(node)
                returned = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
                result = [self.dims[each] if isinstance(each, fx.Node) else None for each in returned]
            else:
                self.dims[node] = self._call(node) if node.op == "call_function" else None
        self.node = outer
        return result

    def _given(self, node: fx.Node, reason: str | None) -> Any:
        dims = [self._sized(shape, reason) for shape in _shapes(node.meta.get("val"))]
        return dims[0] if isinstance(node.meta.get("val"), Tensor) else dims

    def _fetched(self, node: fx.Node) -> Any:
        name = self.capture.tensors.get(node.name)
        if name is None or not node.users:
            return self._given(node, "a constant of the network")  # or a weight that nothing uses: it has no axis
        if name not in self.tensors:
            self.tensors[name] = tuple(var(size) for size in node.meta["val"].shape)
        return self.tensors[name]

    def _sized(self, shape: tuple[int, ...] | None, reason: str | None) -> Dims | None:
        return None if shape is None else tuple(var(size, reason) for size in shape)

    def _call(self, node: fx.Node) -> Any:
        if node.target is getitem:
            whole, number = node.args
            source = self.dims[whole] if isinstance(whole, fx.Node) else None
            if (whole, number) in self.marks:
                self.marks[node, 0] = self.marks[whole, number]  # type: ignore[index]
            return source[number] if isinstance(source, list) and isinstance(number, int) else None
        self.read_marks.clear()
        result = self._apply(node)
        self._hand_on(node)
        self._fix_told(node)
        return result

    def _hand_on(self, node: fx.Node) -> None:
        """Keep what the values of a node's first argument say, if they are those of its output too."""
        name, first = operator_name(node.target), node.args[0] if node.args else None
        mark = self.marks.get((first, 0)) if isinstance(first, fx.Node) else None
        if isinstance(first, fx.Node) and mark and name in COPYING | PICKING:
            kind = mark.kind if name in COPYING else {"permutation": "numbers"}.get(mark.kind, mark.kind)
            if name in COPYING or kind == "numbers":
                self.marks[node, 0] = Mark(kind, mark.term)
                self.read_marks.add(first)

    def _fix_told(self, node: fx.Node) -> None:
        """Fix dimensions whose positions are told by number to a node that makes nothing of it."""
        for each in node.all_input_nodes:
            mark = self.marks.get((each, 0))
            told = node.op == "output" or any(shape is not None for shape in self.outputs())
            if mark and told and mark.kind not in ("counts", "range") and each not in self.read_marks:
                fix(mark.term, f"positions are given out as indices to {self.place}")

    def _apply(self, node: fx.Node) -> Any:
        found = _rule_of(node.target)
        if found is not None and all(size >= 0 for shape in self.outputs() for size in shape or ()):
            try:
                result = found(self, *numbers(node.args), **numbers(node.kwargs))
            except _MISFITS:
                return self._unknown(node)
            got = result if isinstance(result, list) else [result]
            sizes = [None if dims is None else tuple(term.size for term in dims) for dims in got]
            if sizes == self.outputs()[: len(sizes)]:
                return result
        return self._decomposed(node) if found is None else self._unknown(node)

    def _decomposed(self, node: fx.Node) -> Any:
        """Read an operator without a rule as the operators that it is made of, if it is made of any."""
        graph = decompose(node)
        if graph is None:
            return self._unknown(node)
        for each in graph.nodes:
            each.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
            if each.op == "get_attr" and "val" not in each.meta:
                return self._unknown(node)
        literals = len(self.literals)
        result = self._walk(graph, tensor_inputs(node))
        del self.literals[literals:]  # integers that stand in no captured graph
        return result[0] if isinstance(node.meta.get("val"), Tensor) else result

    def _unknown(self, node: fx.Node) -> Any:
        """Fix everything that an operator without a rule touches."""
        shapes = self.outputs()
        touched = [dims for argument in node.all_input_nodes for dims in _tensors(self.dims[argument]) if dims]
        if any(shapes) or touched:
            name = operator_name(node.target)
            self.unknown[name] = self.unknown.get(name, 0) + 1
        reason = f"{self.place} has no rule"
        for dims in touched:
            for term in dims:
                fix(term, reason)
        fresh = [self._sized(shape, reason) for shape in shapes]
        value = node.meta.get("val")
        return fresh[0] if isinstance(value, Tensor) else fresh


COPYING = {"alias", "clone", "contiguous", "detach", "lift_fresh_copy", "to", "_to_copy"}
"""Operators that hand on the values of their first argument as they are."""

PICKING = {
    *("expand", "flatten", "permute", "repeat", "reshape", "squeeze", "t", "transpose", "unflatten", "unsqueeze"),
    *("view", "_unsafe_view", "gather", "index", "index_select", "select", "slice"),
}
"""Operators that hand on some of the values, in some order: numbers of positions are still that."""


def elementwise(t: Inference, operands: Sequence[Any], shape: Sequence[int]) -> Dims:
    """Broadcast operands against one another: dimensions are aligned from the last; those of size 1 adapt."""
    out: list[Term] = [UNIT] * len(shape)
    for operand in operands:
        dims = t.of(operand)
        for offset, term in enumerate(reversed(dims), start=1):
            if head(term) is UNIT or term.size == 1:
                continue
            if out[-offset] is UNIT:
                out[-offset] = term
            else:
                t.unify(out[-offset], term)
    return tuple(term if term.size == size else var(size) for term, size in zip(out, shape, strict=True))


def flatten_leaves(argument: Any) -> Iterator[Any]:
    """Yield what lists of lists hold, in order."""
    if isinstance(argument, list | tuple):
        for each in argument:
            yield from flatten_leaves(each)
    else:
        yield argument


def flatten_args(*arguments: Any) -> Iterator[Any]:
    """Yield the nodes among arguments, lists included."""
    for leaf in flatten_leaves(arguments):
        if isinstance(leaf, fx.Node):
            yield leaf


def _pointwise(t: Inference, *args: Any, **kwargs: Any) -> Dims:
    return elementwise(t, list(flatten_args(args, list(kwargs.values()))), t.output())


def _rule_of(target: Any) -> Rule | None:
    packet = getattr(target, "overloadpacket", target)
    for key in (packet, getattr(packet, "_qualified_op_name", None)):
        if key in RULES:
            return RULES[key]
    if torch.Tag.pointwise in getattr(target, "tags", ()):
        return _pointwise
    name = getattr(packet, "__name__", "")
    if name.endswith("_") and not name.startswith("_"):
        # An operator in place does what its twin does; PyTorch does not tag all of them.
        twin = getattr(torch.ops.aten, name[:-1], None)
        return twin and _rule_of(getattr(twin, getattr(target, "_overloadname", "default"), twin))
    return None


def operator_name(target: Any) -> str:
    """Return an operator's short name, such as ``view``."""
    packet = getattr(target, "overloadpacket", target)
    return getattr(packet, "__name__", str(packet)).split(".")[-1]


def module_of(node: fx.Node) -> str:
    """Return the name of the innermost module whose code made a node; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    name = str(list(stack.values())[-1][0])
    return name.split("@")[0]


def _shapes(value: Any) -> list[tuple[int, ...] | None]:
    if isinstance(value, Tensor):
        return [tuple(map(_size, value.shape))]
    if isinstance(value, list | tuple):
        return [tuple(map(_size, each.shape)) if isinstance(each, Tensor) else None for each in value]
    return [None]


def _size(size: int | torch.SymInt) -> int:
    """Return a size as a number; -1 for one that depends on values, which no rule is applied to."""
    known = number(size)
    return known if isinstance(known, int) else -1


def _tensors(dims: Any) -> Iterator[Dims]:
    if isinstance(dims, tuple):
        yield dims
    elif isinstance(dims, list):
        for each in dims:
            yield from _tensors(each)


def signature_of(function: Rule) -> inspect.Signature:
    """Return a rule's signature without the inference, for the list of rules."""
    signature = inspect.signature(function)
    return signature.replace(parameters=list(signature.parameters.values())[1:])
