"""Samples: what is true of symbolic sizes, found out by trying some sizes in place of proving it for all.

While a graph is captured, PyTorch asks thousands of questions such as whether a tensor is contiguous for inputs of any
size, and has sympy prove each answer, which takes half of the time. A few sizes tell as well: the smallest ones, which
are the exceptions if there are any, the example's, and large ones without common factors.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any
from unittest.mock import patch

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.reference import PythonReferenceAnalysis

Known = tuple[sympy.Symbol, int, int, int | None]
"""A size: its symbol, its value in the example, and the least and the greatest that it may have."""

_SMALL = (0, 1, 2)  # more than the least
_PRIMES = tuple(tuple(sympy.prime(200 + 7 * at + shift) for at in range(16)) for shift in range(3))
"""Sizes that have no factor in common with each other, or with any number of channels."""
_HUGE = 2**64  # beyond what PyTorch takes for the end of everything


@contextmanager
def trying_sizes() -> Iterator[None]:
    """Have PyTorch try sizes where it would prove what is true of all of them; does nothing if it has no such place.

    What depends on values of tensors is proven as ever.
    """
    plain = getattr(ShapeEnv, "_maybe_evaluate_static", None)
    if plain is None:
        yield
        return

    @functools.wraps(plain)
    def evaluate(self: ShapeEnv, expr: sympy.Basic, **options: Any) -> sympy.Basic | None:
        if any(options.values()) or not isinstance(expr, sympy.logic.boolalg.Boolean):
            return plain(self, expr, **options)
        expr = self.replace(expr)
        if isinstance(expr, sympy.logic.boolalg.BooleanAtom):
            return expr
        try:
            told = _tried(expr, _known(self, expr))
        except (KeyError, TypeError, ArithmeticError, NotImplementedError):
            return plain(self, expr)
        return told if told is not None else _implied(self, expr)

    with patch.object(ShapeEnv, "_maybe_evaluate_static", evaluate):
        yield


def is_factor(factor: int, size: torch.SymInt) -> bool:
    """Tell whether a symbolic size is a multiple of a number for inputs of all sizes, as far as samples tell."""
    expression = size.node.expr
    samples = (dict(zip(_symbols(expression), cycle(primes), strict=False)) for primes in _PRIMES)
    sizes = map(expression.subs, samples)
    return all(size.is_Integer and size % factor == 0 for size in sizes)


def _known(env: ShapeEnv, expr: sympy.Basic) -> tuple[Known, ...]:
    """Return what is known of the sizes in an expression.

    Raises:
        KeyError: If one depends on values, or is no whole number.
    """
    values = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    found = []
    for symbol in _symbols(expr):
        if not symbol.is_integer:
            raise KeyError(symbol)
        limits = env.var_to_range[symbol]
        greatest = None if limits.upper == int_oo else int(limits.upper)
        found.append((symbol, int(values[symbol]), int(limits.lower), greatest))
    return tuple(found)


@functools.lru_cache(4096)
def _symbols(expr: sympy.Basic) -> list[sympy.Symbol]:
    return sorted(expr.free_symbols, key=str)


@functools.lru_cache(4096)
def _tried(expr: sympy.Basic, known: Sequence[Known]) -> sympy.Basic | None:
    """Return what an expression comes to whatever the sizes, as far as samples tell; None if it depends on them."""
    symbols = [symbol for symbol, *_ in known]
    told = None
    for sizes in _samples(known):
        found = bool(sympy_interp(PythonReferenceAnalysis, dict(zip(symbols, sizes, strict=True)), expr))
        if told not in (None, found):
            return None
        told = found
    return sympy.true if told else sympy.false


def _samples(known: Sequence[Known]) -> Iterator[list[int]]:
    yield [value for _, value, _, _ in known]
    least = [each for _, _, each, _ in known]
    sizes = [[each + more for each in least] for more in _SMALL]
    sizes.append([each + _HUGE for each in least])
    sizes += [[max(each, prime) for each, prime in zip(least, cycle(primes), strict=False)] for primes in _PRIMES]
    for each in sizes:
        yield [size if most is None else min(size, most) for size, (*_, most) in zip(each, known, strict=True)]


def _implied(env: ShapeEnv, expr: sympy.Basic) -> sympy.Basic | None:
    """Return what follows from what was answered before, if it is said there in so many words."""
    found = env.axioms.get(expr)
    return found if isinstance(found, sympy.logic.boolalg.BooleanAtom) else None
