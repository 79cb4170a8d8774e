"""The axis graph: which slices of which parameters go together, what hangs on them, and what may be cut."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from math import lcm, prod

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from slivo.errors import ShapeError, SlivoError
from slivo.graph import rules
from slivo.graph.capture import Capture, capture, check_call, output_names
from slivo.graph.count import Counter, FileSize, counter, file_size, stored
from slivo.graph.dims import Term, Var, fix, head, leaves, positions
from slivo.graph.infer import Inference
from slivo.graph.inputs import ExampleInputs, batch_size
from slivo.graph.ties import equal_sizes, shared_attributes

_ = rules  # the rules register themselves when they are imported


@dataclass(frozen=True)
class Member:
    """The slices of one tensor that belong to an axis.

    Args:
        tensor: Qualified name of a parameter or buffer.
        dim: The dimension of the tensor.
        index: int64 array of shape (axis size, k): row i lists the entries of that dimension that belong to
            position i of the axis. Rows are disjoint.
        reads: Whether the tensor is a weight that contracts this dimension with an activation (the input channels of
            a convolution): it reads the axis, others write or scale it.
    """

    tensor: str
    dim: int
    index: NDArray[np.int64]
    reads: bool = False


@dataclass(frozen=True)
class Axis:
    """A dimension that several tensors share: cut a position of it, and every member loses its row.

    Args:
        name: Unique in its graph; made from the modules that write the axis, such as ``layer1.*.conv2 out``.
        size: Number of positions.
        members: Where the axis occurs.
        macs: Multiply-accumulates per sample of all operators that the axis takes part in.
        params: Entries of parameters that belong to the axis.
        fixed: None, or the reason why the axis may not be cut.
        multiple: What its size is a multiple of once it is cut, because a kernel takes no other.
        least: What its size is at least: the experts, say, of which the router picks so many.
        routed: Whether each sample takes its own few positions, as of experts: a sample is no cheaper if others go.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    macs: int
    params: int
    fixed: str | None
    multiple: int = 1
    least: int = 1
    routed: bool = False


@dataclass(frozen=True)
class Graph:
    """What `trace` finds out about a model.

    Args:
        axes: All axes that have members, in order of first use.
        ties: Sets of axes (by name) that must keep equal sizes, because code parts them by number.
        macs: Multiply-accumulates per sample of convolutions, matrix products and attention.
        params: Number of parameters; tied weights count once.
        unknown_ops: Operators without a rule, and how often each occurs; their dimensions are fixed.
        stored: The parameters and buffers that a file of the model has, on the meta device.
    """

    axes: tuple[Axis, ...]
    ties: tuple[frozenset[str], ...]
    macs: int
    params: int
    unknown_ops: Mapping[str, int]
    variables: Mapping[str, Var] = field(repr=False)
    inference: Inference = field(repr=False)
    batch: int = field(repr=False)
    stored: Mapping[str, Tensor] = field(repr=False)

    def __getitem__(self, name: str) -> Axis:
        """Return the axis of that name.

        Raises:
            ShapeError: If there is none; lists names that are close.
        """
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise ShapeError(f"no axis is called {name!r}; there are {', '.join(axis.name for axis in self.axes[:8])} …")

    @property
    def prunable(self) -> tuple[Axis, ...]:
        """The axes that may be cut."""
        return tuple(axis for axis in self.axes if axis.fixed is None)

    @cached_property
    def prunable_macs(self) -> float:
        """Share of the MACs, 0-1, of operators in which some prunable axis takes part."""
        free = {self.variables[axis.name] for axis in self.prunable}
        reached = 0
        for cost in self.inference.costs:
            if any(leaf in free for term in cost.terms for leaf in leaves(term)):
                reached += cost.constant * prod(term.size for term in cost.terms)
        return reached / (self.macs * self.batch) if self.macs else 0.0

    @cached_property
    def prunable_params(self) -> float:
        """Share of the parameters, 0-1, that lie on some prunable axis."""
        free = {self.variables[axis.name] for axis in self.prunable}
        reached = 0
        for name in self.parameters:
            dims = self.inference.tensors[name]
            if any(leaf in free for term in dims for leaf in leaves(term)):
                reached += prod(term.size for term in dims)
        return reached / self.params if self.params else 0.0

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters (not the buffers) that the network uses."""
        return tuple(self.inference.parameters)

    def count(self, sizes: Mapping[str, int]) -> tuple[int, int]:
        """Return the MACs per sample and the parameters that are left when axes have other sizes.

        Args:
            sizes: For some axes, by name, the number of positions that stay.

        Returns:
            ``(macs, params)``, exact.
        """
        kept = {self.variables[name]: size for name, size in sizes.items()}
        macs, params = self._counters
        return macs(kept) // self.batch, self.params - params({}) + params(kept)

    def count_bytes(self, sizes: Mapping[str, int]) -> int:
        """Return the bytes of the model's tensors as a safetensors file when axes have other sizes.

        Args:
            sizes: For some axes, by name, the number of positions that stay.

        Returns:
            Parameters and buffers in their dtypes, and the header: exact, unless a captured graph takes the place of a
            module, which names its tensors otherwise.
        """
        return self._file_size({self.variables[name]: size for name, size in sizes.items()})

    @cached_property
    def _file_size(self) -> FileSize:
        return file_size(self.variables.values(), self.stored, self.inference.tensors)

    @cached_property
    def _counters(self) -> tuple[Counter, Counter]:
        """What counts the MACs of a whole batch, and the entries of the parameters that the network uses."""
        axes = list(self.variables.values())
        macs = counter(axes, ((cost.constant, cost.terms) for cost in self.inference.costs))
        return macs, counter(axes, ((1, self.inference.tensors[name]) for name in self.parameters))


def trace(model: nn.Module, example_inputs: ExampleInputs, *, free: Sequence[str] = ()) -> Graph:
    """Find the axes of a model: what can be cut, and who moves together.

    Args:
        model: Any module that PyTorch can capture; it is left as it was.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        free: Globs over outputs that nobody needs in their sizes: ``output``, ``output.1`` of a tuple,
            ``output.last_hidden_state`` of a mapping. The others keep theirs.

    Returns:
        The graph. The network's inputs and outputs keep their sizes: their axes are fixed.

    Raises:
        CaptureError: If the model does not run on the inputs or cannot be captured.
        SlivoError: If a glob matches no output.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> graph = trace(net, torch.randn(2, 4))
        >>> [(axis.name, axis.size, axis.fixed) for axis in graph.axes if axis.fixed is None]
        [('0 out', 8, None)]
        >>> graph.count({"0 out": 4})
        (28, 35)
    """
    check_call(model, example_inputs)
    captured = capture(model, example_inputs)
    inference = Inference(captured, free=_free(captured, free))
    inference.run()
    _learn_from_training(model, example_inputs, inference, free)
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in inference.tensors}
    inference.parameters = tuple(parameters)
    inference.ties.extend(shared_attributes(model, inference))
    _freeze_unreached(inference, len(parameters) < sum(1 for _ in model.parameters()))
    ties = equal_sizes(inference)
    members = _members(inference, parameters)
    names = _names(members, inference)
    batch = batch_size(example_inputs)
    macs, limits = _macs(inference), _limits(inference)
    axes = tuple(
        Axis(
            name=names[axis],
            size=axis.size,
            members=tuple(where),
            macs=macs.get(axis, 0) // batch,
            params=sum(_entries(inference, m) for m in _unique(where) if m.tensor in parameters),
            fixed=axis.fixed,
            **asdict(limits.get(axis, _Limits())),
        )
        for axis, where in members.items()
    )
    variables = {names[axis]: axis for axis in members}
    return Graph(
        axes=axes,
        ties=_named(ties, names),
        macs=sum(cost.constant * prod(term.size for term in cost.terms) for cost in inference.costs) // batch,
        params=sum(parameter.numel() for parameter in model.parameters()),
        unknown_ops=dict(inference.unknown),
        variables=variables,
        inference=inference,
        batch=batch,
        stored=stored(model),
    )


def _free(captured: Capture, globs: Sequence[str]) -> frozenset[int]:
    """Return the numbers of the outputs that globs match."""
    names = output_names(captured) if globs else []
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise SlivoError(f"{glob!r} matches no output of the model; it gives out {', '.join(names[:8])}")
    return frozenset(i for i, name in enumerate(names) if any(fnmatchcase(name, glob) for glob in globs))


def _named(ties: Iterable[frozenset[Var]], names: Mapping[Var, str]) -> tuple[frozenset[str], ...]:
    """Name the axes of ties; those that have no members need no size."""
    named = (frozenset(names[axis] for axis in tie if axis in names) for tie in ties)
    return tuple(tie for tie in named if len(tie) > 1)


def _freeze_unreached(inference: Inference, unreached: bool) -> None:
    """Forbid all cuts if there is code that the example did not reach, which may read anything; its parameters tell."""
    if inference.capture.by_values and unreached:
        for dims in inference.tensors.values():
            for term in dims:
                fix(term, "the code asks for values, and the example inputs do not reach all of the parameters")


def _learn_from_training(
    model: nn.Module, example_inputs: ExampleInputs, inference: Inference, free: Sequence[str]
) -> None:
    """Add what is known of parts that run in training only, such as auxiliary classifiers; they are cut along."""
    if all(name in inference.tensors for name, _ in model.named_parameters()):
        return
    try:
        captured = capture(model, example_inputs, training=True)
        freed = _free(captured, free)
    except SlivoError:
        return
    more = Inference(captured, tensors=inference.tensors, free=freed)
    more.run()
    inference.facts.extend(more.facts)
    inference.ties.extend(more.ties)
    inference.roles.extend(more.roles)
    inference.reads.update(more.reads)
    for name, count in more.unknown.items():
        inference.unknown[name] = max(count, inference.unknown.get(name, 0))


def _members(inference: Inference, parameters: Container[str]) -> dict[Var, list[Member]]:
    """Collect the members of each axis; the windows of kernels are no axes."""
    members: dict[Var, list[Member]] = {}
    known: dict[Term, dict[Var, NDArray[np.int64]]] = {}  # tensors share most of their dimensions
    for name, dims in inference.tensors.items():
        for dim, term in enumerate(dims):
            form = head(term)
            if form not in known:
                known[form] = positions(form)
            for axis, index in known[form].items():
                members.setdefault(axis, []).append(Member(name, dim, index, term in inference.reads))
    for axis, where in members.items():
        tensors = [member.tensor for member in where]
        if axis.fixed is None and not any(tensor in parameters for tensor in tensors):
            axis.fixed = "no parameter has it"
        if axis.fixed is None and not axis.size:
            axis.fixed = "has no positions"
        if axis.fixed is None and len(set(tensors)) < len(tensors) and _overlaps(where):
            axis.fixed = "occurs in two dimensions of one tensor that are cut apart"
    return {axis: where for axis, where in members.items() if "window" not in (axis.fixed or "")}


def _overlaps(where: Sequence[Member]) -> bool:
    """An axis may occur in two dimensions of one tensor (a square recurrent matrix); in one dimension only once."""
    return len({(member.tensor, member.dim) for member in where}) < len(where)


def _macs(inference: Inference) -> dict[Var, int]:
    """Sum up for each axis the MACs of the operators that it takes part in."""
    found: dict[Var, int] = {}
    for cost in inference.costs:
        macs = cost.constant * prod(term.size for term in cost.terms)
        for axis in {leaf for term in cost.terms for leaf in leaves(term)}:
            found[axis] = found.get(axis, 0) + macs
    return found


@dataclass(frozen=True)
class _Limits:
    multiple: int = 1
    least: int = 1
    routed: bool = False


def _limits(inference: Inference) -> dict[Var, _Limits]:
    """Sum up for each axis what its size has to be; of a product or sum, each axis has to be what the whole has."""
    found: dict[Var, _Limits] = {}
    for limit in inference.limits:
        for axis in leaves(limit.term):
            known = found.get(axis, _Limits())
            found[axis] = _Limits(
                lcm(known.multiple, limit.multiple),
                max(known.least, min(limit.least, axis.size)),
                known.routed or limit.routed,
            )
    return found


def _entries(inference: Inference, member: Member) -> int:
    dims = inference.tensors[member.tensor]
    return int(member.index.size) * prod(term.size for dim, term in enumerate(dims) if dim != member.dim)


def _unique(where: Iterable[Member]) -> Iterable[Member]:
    """One member a tensor, the one with most entries in its dimension."""
    best: dict[str, Member] = {}
    for member in where:
        if member.tensor not in best:
            best[member.tensor] = member
    return best.values()


def _names(members: Mapping[Var, Sequence[Member]], inference: Inference) -> dict[Var, str]:
    """Name each axis after the modules that write it and what it is there."""
    roles: dict[Var, dict[str, list[str]]] = {}
    for term, module, role in inference.roles:
        several = [leaf for leaf in leaves(term) if leaf in members]
        for number, leaf in enumerate(several):
            what = role if len(several) == 1 else f"{role}[{number}]"
            modules = roles.setdefault(leaf, {}).setdefault(what, [])
            if module not in modules:
                modules.append(module)
    names: dict[Var, str] = {}
    taken: dict[str, int] = {}
    for axis, where in members.items():
        found = roles.get(axis, {})
        if found:
            role = min(found, key=lambda each: (each.startswith("out"), "[" in each, each))
            name = f"{_pattern(found[role])} {role}".strip()
        else:
            name = f"{where[0].tensor}[{where[0].dim}]"
        taken[name] = taken.get(name, 0) + 1
        names[axis] = name if taken[name] == 1 else f"{name} #{taken[name]}"
    return names


def _pattern(modules: Sequence[str]) -> str:
    """Write module names that differ in numbers only as one, with ``*`` for the numbers that vary."""
    groups: dict[str, list[list[str]]] = {}
    for module in modules:
        parts = module.split(".")
        groups.setdefault(re.sub(r"\d+", "#", module), []).append(parts)
    written = [
        ".".join(
            column[0] if len(set(column)) == 1 else re.sub(r"\d+", "*", column[0])
            for column in zip(*group, strict=True)
        )
        for group in groups.values()
    ]
    return written[0] if len(written) == 1 else f"{written[0]} +{len(written) - 1}"
