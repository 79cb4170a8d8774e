"""Recurrent layers: hidden units are an axis that every gate has, laid out as gate · unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from slivo.graph.dims import Term, concat, product
from slivo.graph.infer import Dims, Inference, rule

aten = torch.ops.aten

_CONSTANT = (aten.zeros.default, aten.ones.default, aten.new_zeros.default, aten.zeros_like.default)


@dataclass(frozen=True)
class _Layer:
    """One direction of one layer: what it gives out, and the units of its cell (other than that if projected)."""

    output: Term
    units: Term


@rule(aten.lstm)
def lstm(t: Inference, x: Any, *args: Any) -> list[Dims | None]:
    """Four gates; with a projection the layer gives out ``weight_hr[0]`` instead of its units, which are more."""
    packed = not isinstance(args[0], list | tuple)
    states, weights, biased, count, _, _, both, batch_first = _arguments(args, packed)
    return _recurrent(t, x, states, weights, biased, count, both, 4, None if packed else batch_first)


@rule(aten.gru)
def gru(t: Inference, x: Any, *args: Any) -> list[Dims | None]:
    """Three gates."""
    packed = not isinstance(args[1], list | tuple)
    state, weights, biased, count, _, _, both, batch_first = _arguments(args, packed)
    return _recurrent(t, x, [state], weights, biased, count, both, 3, None if packed else batch_first)


@rule(aten.rnn_tanh, aten.rnn_relu)
def rnn(t: Inference, x: Any, *args: Any) -> list[Dims | None]:
    """One gate."""
    packed = not isinstance(args[1], list | tuple)
    state, weights, biased, count, _, _, both, batch_first = _arguments(args, packed)
    return _recurrent(t, x, [state], weights, biased, count, both, 1, None if packed else batch_first)


def _arguments(args: Sequence[Any], packed: bool) -> tuple[Any, ...]:
    """The arguments after the data; packed sequences have the sizes of the batches first, and no ``batch_first``."""
    return (*args[1:8], False) if packed else tuple(args[:8])


def _recurrent(
    t: Inference,
    x: Any,
    states: Sequence[Any],
    weights: Sequence[Any],
    biased: bool,
    count: int,
    both: bool,
    gates: int,
    batch_first: bool | None,
) -> list[Dims | None]:
    """State the layers one after the other; each reads what the directions of the one before give out."""
    source, outer = t.of(x)[-1], t.of(x)[:-1]
    each = len(weights) // (count * (1 + both))
    layers: list[_Layer] = []
    t.fact("input_size", source)
    for number in range(count):
        level = []
        for direction in range(1 + both):
            at = (number * (1 + both) + direction) * each
            level.append(_layer(t, source, outer, weights[at : at + each], biased, gates))
        source = concat([layer.output for layer in level])
        layers.extend(level)
    kinds = [[layer.output for layer in layers], [layer.units for layer in layers]]
    for at, (state, terms) in enumerate(zip(states, kinds, strict=False)):
        _join(t, state, at + 1, terms)
    t.tie(kinds[1])
    if layers[0].output is not layers[0].units:
        t.tie(kinds[0])
        t.fact("proj_size", layers[0].output)
    t.fact("hidden_size", layers[0].units)
    if batch_first is not None:
        for state in states:
            t.unify(t.of(state)[-2], outer[0 if batch_first else 1])
    carried: list[Dims | None] = [(*t.of(state)[:-1], terms[0]) for state, terms in zip(states, kinds, strict=False)]
    return [(*outer, source), *carried]


def _layer(t: Inference, source: Term, outer: Dims, weights: Sequence[Any], biased: bool, gates: int) -> _Layer:
    """``W_ih = (gate · unit, input)``, ``W_hh = (gate · unit, output)``, ``W_hr = (output, unit)``."""
    inputs, hidden = t.of(weights[0]), t.of(weights[1])
    projection = t.of(weights[-1]) if len(weights) in (3, 5) else ()
    units = t.fresh([inputs[0].size // gates])[0]
    rows = product((*t.fresh([gates], "the gates of a recurrent layer"), units))
    output = projection[0] if projection else units
    t.unify(inputs[1], source)
    t.unify(hidden[1], output)
    for dims in (inputs, hidden, *((t.of(bias) for bias in weights[2:4]) if biased else ())):
        t.unify(dims[0], rows)
    t.read(inputs[1], hidden[1])
    t.cost(1, *outer, *inputs)
    t.cost(1, *outer, *hidden)
    t.role(units, "out" if not projection else "units")
    if projection:
        t.unify(projection[1], units)
        t.read(projection[1])
        t.cost(1, *outer, *projection)
        t.role(output, "out")
    return _Layer(output, units)


def _join(t: Inference, state: Any, number: int, terms: Sequence[Term]) -> None:
    """The state of all layers is one tensor: its last dimension is that of each, unless nobody can tell them apart."""
    constant = isinstance(state, fx.Node) and state.target in _CONSTANT
    read = any(user.target is not getitem or (user.args[1] == number and user.users) for user in t.node.users)
    t.unify(t.of(state)[-1], terms[0])
    if read or not constant:
        for term in terms[1:]:
            t.unify(terms[0], term)


@rule(aten.lstm_cell)
def lstm_cell(t: Inference, x: Any, states: Sequence[Any], *weights: Any) -> list[Dims | None]:
    """One step of an LSTM."""
    out = _cell(t, x, states, weights, 4)
    return [out, out]


@rule(aten.gru_cell)
def gru_cell(t: Inference, x: Any, state: Any, *weights: Any) -> Dims:
    """One step of a GRU."""
    return _cell(t, x, [state], weights, 3)


@rule(aten.rnn_tanh_cell, aten.rnn_relu_cell)
def rnn_cell(t: Inference, x: Any, state: Any, *weights: Any) -> Dims:
    """One step of an RNN."""
    return _cell(t, x, [state], weights, 1)


def _cell(t: Inference, x: Any, states: Sequence[Any], weights: Sequence[Any], gates: int) -> Dims:
    given = [weight for weight in weights if weight is not None]
    *outer, source = t.of(x)
    layer = _layer(t, source, tuple(outer), given, len(given) > 2, gates)
    for state in states:
        for term, other in zip(t.of(state), (*outer, layer.units), strict=True):
            t.unify(term, other)
    t.fact("input_size", source)
    t.fact("hidden_size", layer.units)
    return (*outer, layer.units)
