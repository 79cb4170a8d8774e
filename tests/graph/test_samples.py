"""What samples of sizes tell is what a proof tells: the graphs are the same, made in half of the time."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from zoo import ZOO, build

from slivo.errors import CaptureError
from slivo.graph import sizes
from slivo.graph.capture import capture
from slivo.graph.samples import is_factor, trying_sizes


def code(model, inputs):
    try:
        return capture(model, inputs, dynamic=True).graph.code
    except CaptureError as error:
        return str(error)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_graphs_are_those_that_proofs_give(name, monkeypatch):
    model, inputs = build(name)
    found = code(model, inputs)
    monkeypatch.setattr(sizes, "trying_sizes", nullcontext)
    assert found == code(model, inputs)


@pytest.fixture
def env():
    return ShapeEnv()


def size(env, value):
    """A symbolic size of an input."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    symbol = env.create_symbol(value, ConstantSource(f"s{value}"), DimDynamic.DYNAMIC)
    return env.create_symintnode(symbol, hint=value)


def told(env, asked):
    with trying_sizes():
        return env._maybe_evaluate_static(asked.node.expr)


def test_what_holds_of_all_sizes_is_told(env):
    high, wide = size(env, 6), size(env, 7)
    assert told(env, high * 7 // 7 == high) in (True, sympy.true)
    assert told(env, high + wide > high) == sympy.true
    assert told(env, high * wide < 0) == sympy.false


def test_what_depends_on_the_size_is_not(env):
    high, wide = size(env, 6), size(env, 7)
    for asked in (high == 6, high > 3, high % 2 == 0, high == wide, high * wide > 40, high + 1 == wide):
        assert told(env, asked) is None


def test_what_was_answered_before_is_known(env):
    high = size(env, 6)
    asked = high > 3
    assert bool(asked)
    assert told(env, high > 3) == sympy.true


def test_a_size_that_depends_on_values_is_left_to_proofs(env):
    count = env.create_unbacked_symint()
    torch._check(count >= 2)
    assert told(env, count > 1) == sympy.true
    assert told(env, count == 5) is None


def test_without_its_place_in_pytorch_nothing_is_tried(monkeypatch):
    monkeypatch.delattr(ShapeEnv, "_maybe_evaluate_static")
    with trying_sizes():
        assert not hasattr(ShapeEnv, "_maybe_evaluate_static")


def test_what_cannot_be_computed_is_left_to_proofs(env, monkeypatch):
    def refuse(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("slivo.graph.samples._tried", refuse)
    high = size(env, 6)
    assert told(env, high + 1 > high) == sympy.true


def test_factors(env):
    high = size(env, 6)
    assert is_factor(4, high * 4)
    assert not is_factor(8, high * 4)
    assert not is_factor(3, high)
