"""Dead positions: what is zero in every parameter goes without a trace."""

from __future__ import annotations

import copy

import torch

import slivo
from slivo import edits
from slivo.graph import plan_slices, settle


def dead(model, graph, but=()):
    """Return a copy of a model with dead positions, on all axes but some, and what stays if these are cut."""
    model, kept = copy.deepcopy(model), {}
    tensors = dict(model.named_parameters())
    for axis in graph.prunable:
        if axis.name in but or axis.size < 3 or axis.least > 1 or any(axis.name in tie for tie in graph.ties):
            continue
        kept[axis.name] = list(range(1, axis.size - 1))
        for member in axis.members:
            if member.tensor in tensors:
                index = torch.from_numpy(member.index[[0, axis.size - 1]]).flatten()
                with torch.no_grad():
                    tensors[member.tensor].index_fill_(member.dim, index, 0.0)
    return model, kept


def cut(model, inputs, kept):
    graph = slivo.trace(model, inputs)
    attributes, programs = settle(model, graph, inputs, kept)
    return edits.apply(model, edits.Cut(plan_slices(graph, kept), attributes, kept, programs)).eval()
