"""Zero positions of axes that are not counted go without a trace, in every network of the zoo."""

from __future__ import annotations

import logging

import pytest
from oracles.dead import cut, dead
from oracles.permutation import error, outputs
from zoo import ZOO, build

import slivo
from slivo.prune.invariance import counted


@pytest.mark.parametrize("name", sorted(ZOO))
def test_zero_positions_go_without_a_trace(name, caplog):
    caplog.set_level(logging.ERROR, "slivo")
    model, inputs = build(name)
    graph = slivo.trace(model, inputs)
    gone, kept = dead(model, graph, but=counted(graph))
    if kept:
        assert error(outputs(cut(gone, inputs, kept), inputs), outputs(gone, inputs)) < 1e-12
