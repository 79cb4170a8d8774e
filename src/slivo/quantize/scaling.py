"""Where channels may be scaled: what writes them by a factor less, what reads them by as much more, and nobody sees it.

Between writers and readers there must be nothing but operators that commute with a positive factor for each position
of the axis: rectifiers, pooling, additions of values that are scaled alike.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from slivo.graph import ExampleInputs, trace
from slivo.graph.dims import Term, Var, leaves, positions
from slivo.graph.infer import Inference, operator_name

_LAYERS = {"linear", "conv1d", "conv2d", "conv3d"}

_NORMS = {"layer_norm": (2, 3), "rms_norm": (2,), "group_norm": (2, 3), "batch_norm": (1, 2)}
"""Operators whose scale and shift, at these places among the arguments, write what they give out."""

_HOMOGENEOUS = {
    "relu", "relu_", "leaky_relu", "leaky_relu_", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean", "sum", "amax", "neg",
    "abs", "view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "movedim", "squeeze",
    "unsqueeze", "contiguous", "clone", "alias", "detach", "dropout", "dropout_", "feature_dropout", "expand", "repeat",
    "cat", "stack", "slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "getitem", "flip",
    "roll", "upsample_nearest2d", "upsample_bilinear2d", "channel_shuffle", "pixel_shuffle",
}  # fmt: skip
"""Operators of which a factor on all that they are given is a factor on what they give out."""

_SUMS = {"add", "add_", "sub", "sub_"}

_PADS = {"pad", "constant_pad_nd", "zeros_like"}


@dataclass(frozen=True)
class Slices:
    """What belongs to an axis in one dimension of a tensor.

    Args:
        tensor: Qualified name of a parameter.
        dim: The dimension.
        index: int64, shape (axis size, k), as in `slivo.graph.Member`.
        vector: Whether it is a bias, a norm's scale or the like: it counts in no range of weights.
    """

    tensor: str
    dim: int
    index: NDArray[np.int64]
    vector: bool = False


@dataclass
class Group:
    """Values that are scaled together, position by position of one axis.

    Args:
        size: Of the axis.
        writers: What is divided by the factors.
        readers: What is multiplied by them.
    """

    size: int
    writers: list[Slices] = field(default_factory=list)
    readers: list[Slices] = field(default_factory=list)


def groups(model: nn.Module, example_inputs: ExampleInputs) -> list[Group]:
    """Find what can be scaled in a model without a change of what it computes.

    Args:
        model: In whose graph batch norms that stand behind a layer are better folded into it.
        example_inputs: As for `slivo.trace`.

    Returns:
        Groups with at least one writer and one reader, in order of first use. No slice is in two of them on the same
        side.
    """
    graph = trace(model, example_inputs)
    found = _Search(graph.inference, {name for name, _ in model.named_parameters()})
    return [group for name in graph.variables for group in found.of(graph.variables[name])]


def scale_(model: nn.Module, group: Group, factors: Tensor) -> None:
    """Divide writers by factors and multiply readers with them, in place.

    Args:
        model: The model that the group is of.
        group: What is scaled.
        factors: Above 0, shape (size,).
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for slices, by in [*((each, 1 / factors) for each in group.writers), *((r, factors) for r in group.readers)]:
            weight = parameters[slices.tensor]
            whole = torch.ones(weight.shape[slices.dim], dtype=torch.float64, device=weight.device)
            index = torch.from_numpy(slices.index).to(weight.device)
            whole[index] = by.double().to(weight.device)[:, None].expand(index.shape)
            shape = [-1 if dim == slices.dim else 1 for dim in range(weight.dim())]
            weight.copy_(weight.double() * whole.view(shape))


def extremes(weight: Tensor, slices: Slices) -> Tensor:
    """Return the greatest magnitude of a weight at each position of an axis, float64, shape (axis size,)."""
    rows = weight.detach().double().movedim(slices.dim, 0).flatten(1).abs().amax(1)
    return rows[torch.from_numpy(slices.index).to(rows.device)].amax(1)


class _Search:
    """Looks at the values of a graph that carry an axis, and joins those that are scaled together."""

    def __init__(self, inference: Inference, parameters: set[str]) -> None:
        self.inference, self.tensors = inference, inference.capture.tensors
        self.carried = {node: _axes(dims) for node, dims in inference.dims.items()}
        self.nodes: dict[Var, list[fx.Node]] = defaultdict(list)
        for node, axes in self.carried.items():
            for axis in axes if node.op != "get_attr" else ():
                self.nodes[axis].append(node)
        uses = Counter(
            self.tensors[node.name] for node in inference.dims if node.name in self.tensors for _ in node.users
        )
        self.own = {name for name, count in uses.items() if count == 1 and name in parameters}

    def of(self, axis: Var) -> Iterator[Group]:
        """Yield the groups of one axis."""
        parents: dict[fx.Node, fx.Node] = {node: node for node in self.nodes[axis]}

        def root(node: fx.Node) -> fx.Node:
            while parents[node] is not node:
                parents[node] = node = parents[parents[node]]
            return node

        for node in self.nodes[axis]:
            for each in self._joined(node, axis):
                parents[root(each)] = root(node)
        made: dict[fx.Node, Group] = {}
        broken: set[fx.Node] = set()
        for node in self.nodes[axis]:
            group = made.setdefault(root(node), Group(axis.size))
            try:
                group.writers += self._writers(node, axis)
                group.readers += [each for user in node.users for each in self._readers(node, user, axis)]
            except _BrokenError:
                broken.add(root(node))
        yield from (g for node, g in made.items() if node not in broken and g.writers and g.readers)

    def _joined(self, node: fx.Node, axis: Var) -> list[fx.Node]:
        """Return the inputs that are scaled where a node is."""
        name = operator_name(node.target)
        if node.op != "call_function" or name in _LAYERS or name in _NORMS:
            return []
        return [each for each in node.all_input_nodes if axis in self.carried.get(each, ()) and each.op != "get_attr"]

    def _writers(self, node: fx.Node, axis: Var) -> list[Slices]:
        """Return what of a node's own parameters writes an axis, or find the axis not to be scaled there."""
        name = operator_name(node.target)
        if node.op != "call_function":
            raise _BrokenError
        if name in _LAYERS:
            return self._parameters(node, [1, 2], axis)
        if name in _NORMS:
            return self._parameters(node, [*_NORMS[name]], axis)
        carrying = [axis in self.carried.get(each, ()) for each in node.all_input_nodes]
        if (name in _SUMS and all(carrying) and len(carrying) == 2) or (name in _HOMOGENEOUS and any(carrying)):
            given = [each for each, has in zip(node.all_input_nodes, carrying, strict=True) if has]
            bare = [each for each in given if each.op == "get_attr"]
            return [slices for each in bare for slices in self._slices(each, axis, None, vector=True)]
        if name in ("mul", "div") and carrying == [True] and node.args[0] is node.all_input_nodes[0]:
            return []  # with a number
        if name in _PADS and _pads_zeros(node):
            return []
        if name == "scaled_dot_product_attention" and self._attends(node, axis):
            return []
        raise _BrokenError

    def _attends(self, node: fx.Node, axis: Var) -> bool:
        """Tell whether an axis is that of what attention gives out means of: of values, not of queries and keys."""
        query, key, value = (self.carried.get(each, set()) for each in node.args[:3])  # type: ignore[arg-type]
        return axis in value and axis not in query | key

    def _left_out(self, node: fx.Node, user: fx.Node) -> bool:
        """Tell whether a part is taken of which an axis is no part: whole other axes."""
        parts = operator_name(user.target) in ("slice", "narrow", "getitem")
        return parts and self.carried.get(user, set()) <= self.carried.get(node, set())

    def _parameters(self, node: fx.Node, places: list[int], axis: Var) -> list[Slices]:
        """Return the slices of the parameters at places among the arguments; along dimension 0 of a layer's."""
        found = []
        for place in places:
            argument = node.args[place] if place < len(node.args) else None
            if argument is None and place != places[0]:
                continue  # no bias
            dims = 1 if operator_name(node.target) in _LAYERS else None
            found += self._slices(argument, axis, dims, vector=operator_name(node.target) not in _LAYERS or place > 1)
        return found

    def _slices(self, argument: Any, axis: Var, dims: int | None, *, vector: bool) -> list[Slices]:
        """Return where an axis is in the first dimensions of a parameter that nothing else uses."""
        name = self.tensors.get(argument.name, "") if isinstance(argument, fx.Node) else ""
        if name not in self.own:
            raise _BrokenError
        terms = list(enumerate(self.inference.tensors[name]))[:dims]
        found = [Slices(name, dim, index, vector) for dim, term in terms if (index := _index(term, axis)) is not None]
        if not found:
            raise _BrokenError
        return found

    def _readers(self, node: fx.Node, user: fx.Node, axis: Var) -> list[Slices]:
        """Return what of a user's weight reads an axis, or find the axis not to be scaled there."""
        name = operator_name(user.target)
        if user.op == "call_function" and name in _LAYERS:
            weight = user.args[1]
            if (
                user.args[0] is not node
                or not isinstance(weight, fx.Node)
                or self.tensors.get(weight.name) not in self.own
            ):
                raise _BrokenError
            tensor = self.tensors[weight.name]
            shape = weight.meta["val"].shape
            wide = node.meta["val"].shape[-1 if name == "linear" else 1]
            dim = 1 if shape[1] == wide else 0 if shape[1] == 1 and shape[0] == wide else None
            index = None if dim is None else _index(self.inference.tensors[tensor][dim], axis)
            if dim is None or index is None:
                raise _BrokenError
            return [Slices(tensor, dim, index)]
        if axis in self.carried.get(user, ()) and name not in _NORMS:
            return []  # what becomes of it there is seen there
        if user.op == "call_function" and (_is_number(user) or self._left_out(node, user)):
            return []
        raise _BrokenError


class _BrokenError(Exception):
    """A factor would be seen."""


def _index(term: Term, axis: Var) -> NDArray[np.int64] | None:
    """Return where an axis is in a dimension, if it is in it."""
    return positions(term).get(axis)


def _axes(dims: Any) -> set[Var]:
    """Return the axes of dimensions, or of those of several outputs."""
    if dims is None:
        return set()
    if isinstance(dims, list | tuple):
        return set[Var]().union(*map(_axes, dims))
    return {*leaves(dims)}


def _pads_zeros(node: fx.Node) -> bool:
    mode = node.args[2] if operator_name(node.target) == "pad" and len(node.args) > 2 else "constant"
    value = node.args[3 if operator_name(node.target) == "pad" else 2 :]
    return mode != "constant" or not value or value[0] in (None, 0, 0.0)


def _is_number(node: fx.Node) -> bool:
    """Tell whether a node gives out no tensor: a size, or a check of one."""
    return isinstance(node.meta.get("val"), int | float | torch.SymInt) or operator_name(node.target).startswith(
        "_assert"
    )
