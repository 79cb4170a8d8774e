"""What must be true of the axes of any network."""

from __future__ import annotations

import logging

import pytest
import torch
from oracles.dead import cut, dead
from oracles.permutation import error, outputs, permuted
from zoo import ZOO, build

import slivo
from slivo import edits
from slivo.graph import as_args
from slivo.graph.program import tensors_of

ALL = pytest.mark.parametrize("name", sorted(ZOO))


@pytest.fixture(scope="module")
def traced():
    """Trace each network once for all tests."""
    found: dict[str, tuple] = {}

    def get(name: str):
        if name not in found:
            model, inputs = build(name)
            found[name] = (model, inputs, slivo.trace(model, inputs))
        return found[name]

    return get


@ALL
def test_permuting_an_axis_changes_nothing(traced, name):
    model, inputs, graph = traced(name)
    expected = outputs(model, inputs)
    assert graph.prunable
    for axis in graph.prunable:
        assert error(outputs(permuted(model, axis), inputs), expected) < 1e-12, axis.name


@ALL
def test_rows_of_members_are_disjoint_and_of_the_right_shape(traced, name):
    model, _, graph = traced(name)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for axis in graph.axes:
        for member in axis.members:
            assert member.index.shape[0] == axis.size
            assert len(set(member.index.flatten().tolist())) == member.index.size
            assert member.index.max() < tensors[member.tensor].shape[member.dim]


@ALL
def test_every_parameter_entry_lies_on_axes_of_its_shape(traced, name):
    """In each dimension of each tensor the axes' rows cover every index (windows of kernels aside)."""
    model, _, graph = traced(name)
    covered: dict[tuple[str, int], int] = {}
    for axis in graph.axes:
        for member in axis.members:
            indices = set(member.index.flatten().tolist())
            covered[member.tensor, member.dim] = max(covered.get((member.tensor, member.dim), 0), len(indices))
    sizes = dict(model.named_parameters())
    assert all(count <= sizes[tensor].shape[dim] for (tensor, dim), count in covered.items() if tensor in sizes)


@ALL
def test_names_are_unique(traced, name):
    _, _, graph = traced(name)
    assert len({axis.name for axis in graph.axes}) == len(graph.axes)


@ALL
def test_counts_before_and_after_a_cut_are_those_of_the_models(traced, name, caplog):
    """`Graph.count` predicts exactly what a fresh trace of the cut model finds."""
    caplog.set_level(logging.ERROR, "slivo")
    model, inputs, graph = traced(name)
    assert graph.params == sum(parameter.numel() for parameter in model.parameters())
    small = slivo.prune(model, inputs, keep=slivo.Budget(params=0.6), scope="uniform")
    (cut,) = edits.record(small)
    again = slivo.trace(small, inputs)
    assert graph.count({axis: len(kept) for axis, kept in cut.axes.items()}) == (again.macs, again.params)
    assert again.params <= 0.6 * graph.params


@ALL
def test_a_cut_model_trains(traced, name, caplog):
    caplog.set_level(logging.ERROR, "slivo")
    model, inputs, _ = traced(name)
    small = slivo.prune(model, inputs, keep=slivo.Budget(macs=0.7)).train()
    args, kwargs = as_args(inputs)
    sum(output.sum() for output in tensors_of(small(*args, **kwargs))).backward()
    grads = [parameter.grad for parameter in small.parameters() if parameter.grad is not None]
    assert grads
    assert all(bool(grad.isfinite().all()) for grad in grads)


@ALL
def test_a_cut_model_takes_what_the_model_takes(traced, name, caplog):
    """Inputs of another batch size too; where the network refuses them, the cut one may do what it likes."""
    caplog.set_level(logging.ERROR, "slivo")
    model, inputs, _ = traced(name)
    small = slivo.prune(model, inputs, keep=slivo.Budget(params=0.6)).eval()
    more = larger(inputs)
    try:
        expected = outputs(model, more)
    except RuntimeError:
        return
    assert [each.shape for each in outputs(small, more)] == [each.shape for each in expected]


def larger(inputs):
    if isinstance(inputs, dict):
        return {key: larger(value) for key, value in inputs.items()}
    return torch.cat([inputs, inputs[:1]])


# Layer and group norms divide by the number of positions, attention by its root, so there a dead position counts; a
# weight of zeros has no direction.
DEAD_COUNT = {
    "Transformer",
    "TorchEncoder",
    "Mobile",
    "NormalizedWeights",
    "Coupled",
    "AmbiguousAttributes",
    "SelfAttention",
    "HalvesRotary",
    "Token",
}


@pytest.mark.parametrize("name", sorted(ZOO.keys() - DEAD_COUNT))
def test_cutting_dead_positions_changes_nothing(traced, name, caplog):
    """Positions that are zero in every parameter go without a trace: what is cut is what is meant to be cut."""
    caplog.set_level(logging.ERROR, "slivo")
    model, inputs, graph = traced(name)
    gone, kept = dead(model, graph)
    small = cut(gone, inputs, kept)
    assert error(outputs(small, inputs), outputs(gone, inputs)) < 1e-12
