"""The student's first weights: taken from the teacher, whole, from chosen layers, or projected to smaller widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slivo.errors import RecipeError
from slivo.graph import Axis, Graph, Member, plan_slices, trace
from slivo.graph.capture import canonical_names
from slivo.graph.copies import duplicate
from slivo.graph.inputs import ExampleInputs

Widths = Literal["cut", "svd"]


@dataclass(frozen=True)
class Inherited:
    """What `inherit` gives.

    Attributes:
        model: The student with its new weights.
        copied: Names of tensors that are the teacher's.
        projected: Names of those that were the teacher's before they were made smaller.
        left: Names of those for which the teacher has nothing that fits; they are the student's own.
    """

    model: nn.Module
    copied: tuple[str, ...]
    projected: tuple[str, ...]
    left: tuple[str, ...]


@dataclass(frozen=True)
class _Ways:
    """How the teacher's tensors become smaller.

    Attributes:
        slices: The rows that stay, by tensor and dimension.
        mixed: Or of what the rows are mixed: which rows each position of an axis has, shape (positions, rows of each),
            and a matrix of its positions and the new ones.
    """

    slices: Mapping[str, Mapping[int, Sequence[int]]]
    mixed: Mapping[tuple[str, int], tuple[NDArray[np.int64], Tensor]]


def inherit(
    student: nn.Module,
    teacher: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    layers: Mapping[str, str] | None = None,
    widths: Widths = "cut",
    keep: Mapping[str, Sequence[int]] | None = None,
) -> Inherited:
    """Start a student from its teacher's weights.

    Tensors of the same name and shape are copied. Where the student has fewer blocks of a list than the teacher, it
    takes evenly spaced ones, the first and the last among them, as DistilBERT takes every second layer. Where it is
    narrower, each dimension that the teacher's tensors share (an axis of `slivo.trace`) is made smaller in all of them
    alike, so that they still fit each other.

    Args:
        student: Left untouched.
        teacher: Left untouched.
        example_inputs: For the teacher, as for `slivo.trace`; needed where widths differ. Without them those tensors
            are the student's own.
        layers: Which modules take the place of which, ``{student: teacher}`` by path, in the place of evenly spaced
            blocks; tensors below them follow.
        widths: How an axis becomes smaller: ``cut`` keeps the positions of largest norm, so that the student is what
            pruning would make; ``svd`` projects onto the directions in which its weights are largest, which keeps
            more of them but mixes channels, between which no activation function should stand (axes with norms are
            cut).
        keep: For axes of the teacher, by name, the positions to keep, as a plan of `slivo.prune` has them; in the place
            of those of largest norm.

    Returns:
        The student's copy, and what became of each tensor.

    Raises:
        RecipeError: If ``widths`` is none of these.
        CaptureError: If the teacher cannot be traced.

    Source: Sanh, Debut, Chaumond, Wolf 2019, "DistilBERT", arXiv:1910.01108, section 3 (layers); Muralidharan et al.
    2024, "Compact Language Models via Pruning and Knowledge Distillation", arXiv:2407.14679 (widths by cuts).

    Example:
        >>> deep = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        >>> found = inherit(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), deep)
        >>> torch.equal(found.model[1].weight, deep[2].weight), found.left
        (True, ())
    """
    if widths not in get_args(Widths):
        raise RecipeError(f"widths is {widths!r}; allowed: {', '.join(get_args(Widths))}")
    made = duplicate(student)
    ours, theirs = _tensors(made), _tensors(teacher)
    names = {name: _mapped(name, _spaced(made, teacher) if layers is None else layers) for name in ours}
    wanted = {name: source for name, source in names.items() if source in theirs}
    narrower = [
        name for name, source in wanted.items() if ours[name].shape != theirs[source].shape and ours[name].dim()
    ]
    first = canonical_names(teacher)  # a tensor that has several names has one on its axis
    ways = _Ways({}, {})
    if narrower and example_inputs is not None:
        sizes = {first[wanted[name]]: ours[name].shape for name in narrower}
        ways = _ways(trace(teacher, example_inputs), theirs, sizes, widths, keep or {})
    copied: list[str] = []
    projected: list[str] = []
    left: list[str] = []
    with torch.no_grad():
        for name, tensor in ours.items():
            source = theirs.get(wanted.get(name, ""))
            found = None if source is None else _fitted(source, first[wanted[name]], tensor.shape, ways)
            if found is None:
                left.append(name)
                continue
            tensor.copy_(found)
            (copied if source is not None and source.shape == tensor.shape else projected).append(name)
    return Inherited(made, tuple(copied), tuple(projected), tuple(left))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _mapped(name: str, layers: Mapping[str, str]) -> str:
    """Return a tensor's name with the longest path that is mapped replaced."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:end])
        if path in layers:
            return ".".join([layers[path], *parts[end:]])
    return name


def _spaced(student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    """Return for the numbered children of lists that are shorter in the student the teacher's that they stand for."""
    theirs = dict(teacher.named_modules())
    found: dict[str, str] = {}
    for path, module in student.named_modules():
        source = _mapped(f"{path}.x", found).removesuffix(".x") if path else path
        lists = (nn.ModuleList, nn.Sequential)
        other = theirs.get(source)
        if not isinstance(module, lists) or not isinstance(other, lists) or not 0 < len(module) < len(other):
            if path and source != path:
                found.setdefault(path, source)
            continue
        chosen = np.linspace(0, len(other) - 1, len(module)).round().astype(int) if len(module) > 1 else [0]
        for number, at in enumerate(chosen):
            found[f"{path}.{number}".strip(".")] = f"{source}.{at}".strip(".")
    return found


def _ways(
    graph: Graph,
    tensors: Mapping[str, Tensor],
    sizes: Mapping[str, torch.Size],
    widths: Widths,
    keep: Mapping[str, Sequence[int]],
) -> _Ways:
    """Find how the teacher's tensors become those of other sizes.

    A dimension may be a product of axes, as of heads and of what each has; whole heads go first.
    """
    kept = {name: list(positions) for name, positions in keep.items()}
    mixed: dict[tuple[str, int], tuple[NDArray[np.int64], Tensor]] = {}
    told = {(each.tensor, each.dim) for axis in graph.axes if axis.name in kept for each in axis.members}
    axes = [axis for axis in graph.axes if axis.fixed is None and axis.name not in kept]
    for axis in sorted(axes, key=lambda axis: -axis.members[0].index.shape[1]):
        several = {
            sizes[each.tensor][each.dim] // each.index.shape[1]
            for each in axis.members
            if (each.tensor, each.dim) not in told and _asked(each, tensors, sizes)
        }
        size = several.pop() if len(several) == 1 else 0
        if not 0 < size < axis.size:
            continue
        matrix = _directions(axis, tensors, size) if widths == "svd" else None
        if matrix is None:
            kept[axis.name] = _largest(axis, tensors, size)
        for member in axis.members:
            told.add((member.tensor, member.dim))
            if matrix is not None:
                mixed[member.tensor, member.dim] = member.index, matrix
    return _Ways(plan_slices(graph, kept), mixed)


def _asked(member: Member, tensors: Mapping[str, Tensor], sizes: Mapping[str, torch.Size]) -> bool:
    """Tell whether a dimension is to become smaller, and by whole positions of the axis, which has all of it."""
    wanted, before = sizes.get(member.tensor), tensors[member.tensor].shape
    if wanted is None or len(wanted) != len(before) or member.index.size != before[member.dim]:
        return False
    return wanted[member.dim] < before[member.dim] and wanted[member.dim] % member.index.shape[1] == 0


def _rows(axis: Axis, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return what the weights have for each position of an axis, shape (positions, entries)."""
    rows = [
        tensors[member.tensor].detach().double().cpu().movedim(member.dim, 0)[torch.from_numpy(member.index)].flatten(1)
        for member in axis.members
        if isinstance(tensors[member.tensor], nn.Parameter)
    ]
    return torch.cat(rows, dim=1) if rows else torch.ones(axis.size, 1, dtype=torch.float64)


def _largest(axis: Axis, tensors: Mapping[str, Tensor], size: int) -> list[int]:
    """Return the positions of largest norm, ascending."""
    norms = torch.linalg.vector_norm(_rows(axis, tensors), dim=1)
    chosen: list[int] = norms.argsort(descending=True, stable=True)[:size].sort().values.tolist()
    return chosen


def _directions(axis: Axis, tensors: Mapping[str, Tensor], size: int) -> Tensor | None:
    """Return the directions in which an axis's weights are largest, shape (positions, size); None if it has none.

    Scales and variances of norms are numbers of a channel, and make no sense of a mixture of them; nor has an axis
    any that shares dimensions with others.
    """
    rows = _rows(axis, tensors)
    whole = all(each.index.size == tensors[each.tensor].shape[each.dim] for each in axis.members)
    linear = all(tensors[each.tensor].dim() > 1 or each.tensor.endswith("bias") for each in axis.members)
    if not (whole and linear and rows.shape[1] >= size):
        return None
    directions: Tensor = torch.linalg.svd(rows, full_matrices=False).U
    return directions[:, :size]


def _fitted(source: Tensor, name: str, shape: torch.Size, ways: _Ways) -> Tensor | None:
    """Return a teacher's tensor in the student's shape; None if there is no way."""
    if source.shape == shape:
        return source.detach()
    if source.dim() != len(shape):
        return None
    found = source.detach()
    for dim, size in enumerate(shape):
        if found.shape[dim] == size:
            continue
        if (name, dim) in ways.mixed and found.is_floating_point():
            found = _mixed(found.movedim(dim, 0), *ways.mixed[name, dim]).movedim(0, dim)
        else:
            stay = ways.slices.get(name, {}).get(dim, range(found.shape[dim]))
            found = found.index_select(dim, torch.tensor(list(stay), device=found.device))
    return found if found.shape == shape else None


def _mixed(rows: Tensor, index: NDArray[np.int64], matrix: Tensor) -> Tensor:
    """Return the rows of fewer positions, each a mixture of all."""
    fewer: Tensor = torch.tensordot(matrix.T, rows.double().cpu()[torch.from_numpy(index)], dims=1)
    # They lie as those of the first positions do, such as first those of all queries, then those of all keys.
    order = torch.from_numpy(index[: matrix.shape[1]].ravel().argsort())
    return fewer.flatten(0, 1)[order].to(rows)
