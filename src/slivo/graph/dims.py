"""The algebra of dimensions: axes, products and sums of axes, and their unification.

A dimension of a tensor is a *term*. A fresh dimension is a `Var` (an axis whose structure is not known yet);
``view`` and ``flatten`` make `Prod` (row-major, outermost factor first), ``cat`` and ``split`` make `Sum`. Operators
state that two terms are equal, and `unify` solves that as a type checker does: variables are bound, a product
against a variable refines it, sums with different boundaries refine each other at every boundary. What cannot be
solved is *fixed*: never wrong, only less prunable, and it says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray


class Var:
    """An axis: a size, and, once it is known, the term that it stands for or the reason why it may not be cut."""

    __slots__ = ("bound", "fixed", "size")

    def __init__(self, size: int, fixed: str | None = None) -> None:
        self.size = size
        self.bound: Term | None = None
        self.fixed = fixed

    def __repr__(self) -> str:
        return f"Var({self.size}{', fixed' if self.fixed else ''})"


@dataclass(frozen=True, eq=False)
class Prod:
    """A row-major product of terms; the empty product is the dimension of size 1."""

    factors: tuple[Term, ...]

    @property
    def size(self) -> int:
        """Number of positions."""
        return prod(factor.size for factor in self.factors)


@dataclass(frozen=True, eq=False)
class Sum:
    """A concatenation of terms."""

    parts: tuple[Term, ...]

    @property
    def size(self) -> int:
        """Number of positions."""
        return sum(part.size for part in self.parts)


Term = Var | Prod | Sum

UNIT = Prod(())
"""The dimension of size 1: it has no axis, it broadcasts, it can never be cut."""


class _ClashError(Exception):
    """Two terms cannot be equal by any refinement."""


def var(size: int, fixed: str | None = None) -> Term:
    """Return a fresh dimension of the given size (`UNIT` for size 1)."""
    return UNIT if size == 1 else Var(size, fixed)


def product(factors: Sequence[Term]) -> Term:
    """Return the row-major product of terms, flattened, without its units."""
    flat: list[Term] = []
    for factor in map(head, factors):
        flat.extend(factor.factors if isinstance(factor, Prod) else (factor,))
    flat = [factor for factor in flat if factor is not UNIT]
    return flat[0] if len(flat) == 1 else Prod(tuple(flat)) if flat else UNIT


def concat(parts: Sequence[Term]) -> Term:
    """Return the concatenation of terms, flattened, without its empty parts."""
    flat: list[Term] = []
    for part in map(head, parts):
        flat.extend(part.parts if isinstance(part, Sum) else (part,))
    flat = [part for part in flat if part.size > 0]
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


def head(term: Term) -> Term:
    """Follow bindings until the outermost constructor is known."""
    last: Var | None = None
    while isinstance(term, Var) and term.bound is not None:
        if isinstance(term.bound, Var) and term.bound.bound is not None:
            term.bound = term.bound.bound
        last, term = term, term.bound
    flat = term
    if isinstance(term, Prod) and any(_is_open(f, Prod) for f in term.factors):
        flat = product(term.factors)
    elif isinstance(term, Sum) and any(_is_open(p, Sum) for p in term.parts):
        flat = concat(term.parts)
    if last is not None and flat is not term:
        last.bound = flat  # the next look finds it flat
    return flat


def _is_open(term: Term, kind: type[Prod] | type[Sum]) -> bool:
    """Tell whether a part of a term has become of the term's own kind, so that the term wants flattening."""
    return isinstance(term, Var) and term.bound is not None and (term.size == 1 or isinstance(head(term), kind))


def leaves(term: Term) -> Iterator[Var]:
    """Yield the axes of a term in order of position, one for each occurrence."""
    term = head(term)
    if isinstance(term, Var):
        yield term
    else:
        for part in term.factors if isinstance(term, Prod) else term.parts:
            yield from leaves(part)


def fix(term: Term, reason: str) -> None:
    """Forbid cuts in every axis of a term; the first reason is kept."""
    for leaf in leaves(term):
        if leaf.fixed is None:
            leaf.fixed = reason


def unify(left: Term, right: Term, place: str) -> None:
    """State that two dimensions are the same, position by position.

    Args:
        left: A term.
        right: A term; of the same size, or one of the two is fixed together with the other.
        place: What states it, for the reason given to axes that clash.

    Example:
        >>> channels, heads, width = Var(12), Var(3), Var(4)
        >>> unify(channels, product([heads, width]), "view")
        >>> [leaf.size for leaf in leaves(channels)]
        [3, 4]
        >>> unify(Var(5), Var(7), "add")
    """
    try:
        _unify(left, right)
    except _ClashError:
        fix(left, f"does not fit the other operand of {place}")
        fix(right, f"does not fit the other operand of {place}")


def _unify(left: Term, right: Term) -> None:
    left, right = head(left), head(right)
    if left is right:
        return
    if left.size != right.size:
        raise _ClashError
    if isinstance(left, Var):
        _bind(left, right)
    elif isinstance(right, Var):
        _bind(right, left)
    elif isinstance(left, Sum) or isinstance(right, Sum):
        _unify_parts(left, right)
    else:
        _unify_factors(left, right)


def _bind(variable: Var, term: Term) -> None:
    if any(leaf is variable for leaf in leaves(term)):
        raise _ClashError
    if variable.fixed is not None:
        fix(term, variable.fixed)
    variable.bound = term


def _unify_parts(left: Term, right: Term) -> None:
    ours: list[Term] = list(left.parts) if isinstance(left, Sum) else [left]
    theirs: list[Term] = list(right.parts) if isinstance(right, Sum) else [right]
    while ours and theirs:
        one, other = ours.pop(0), theirs.pop(0)
        if one.size > other.size:
            one, rest = split(one, other.size)
            ours.insert(0, rest)
        elif other.size > one.size:
            other, rest = split(other, one.size)
            theirs.insert(0, rest)
        _unify(one, other)


def _unify_factors(left: Prod, right: Prod) -> None:
    ours, theirs = list(left.factors), list(right.factors)
    while ours and theirs:
        one, other = ours.pop(), theirs.pop()
        if one.size > other.size:
            rest, one = factor(one, other.size)
            ours.append(rest)
        elif other.size > one.size:
            rest, other = factor(other, one.size)
            theirs.append(rest)
        _unify(one, other)


def split(term: Term, at: int) -> tuple[Term, Term]:
    """Cut a term in two at a position, refining axes where needed.

    Raises:
        _ClashError: If the position falls inside a product's inner block.
    """
    term = head(term)
    if isinstance(term, Var):
        first, second = var(at, term.fixed), var(term.size - at, term.fixed)
        term.bound = Sum((first, second))
        return first, second
    if isinstance(term, Sum):
        start = 0
        for index, part in enumerate(term.parts):
            if at == start:
                return concat(term.parts[:index]), concat(term.parts[index:])
            if at < start + part.size:
                one, two = split(part, at - start)
                return concat((*term.parts[:index], one)), concat((two, *term.parts[index + 1 :]))
            start += part.size
    if not isinstance(term, Prod) or not term.factors:
        raise _ClashError
    inner = term.size // term.factors[0].size
    if at % inner:
        raise _ClashError
    one, two = split(term.factors[0], at // inner)
    return product((one, *term.factors[1:])), product((two, *term.factors[1:]))


def factor(term: Term, inner: int) -> tuple[Term, Term]:
    """Write a term as a product whose inner factor has the given size, refining axes where needed.

    Raises:
        _ClashError: If the term has no such factor.
    """
    term = head(term)
    if inner == term.size:
        return UNIT, term
    if inner == 1:
        return term, UNIT
    if term.size % inner:
        raise _ClashError
    if isinstance(term, Var):
        high, low = var(term.size // inner, term.fixed), var(inner, term.fixed)
        term.bound = Prod((high, low))
        return high, low
    if isinstance(term, Sum):
        pairs = [factor(part, inner) for part in term.parts]
        for _, low in pairs[1:]:
            _unify(pairs[0][1], low)
        return concat([high for high, _ in pairs]), pairs[0][1]
    *outer, last = term.factors
    if last.size > inner:
        high, low = factor(last, inner)
        return product((*outer, high)), low
    if inner % last.size:
        raise _ClashError
    high, low = factor(product(outer), inner // last.size)
    return high, product((low, last))


def outer_factor(term: Term, inner: int) -> Term | None:
    """Return the outer factor of a term whose inner one has the given size, or None where it has none."""
    try:
        return factor(term, inner)[0]
    except _ClashError:
        return None


def take(term: Term, start: int, stop: int) -> Term | None:
    """Return the term of the positions from start to stop, or None (with the term fixed) where it has none."""
    try:
        if start > 0:
            term = split(term, start)[1]
        return split(term, stop - start)[0] if stop - start < term.size else term
    except _ClashError:
        return None


def regroup(terms: Sequence[Term], sizes: Sequence[int], place: str) -> list[Term]:
    """Lay the dimensions of a tensor out anew, row-major, as ``view`` does.

    Args:
        terms: The dimensions of the source.
        sizes: The sizes of the target's dimensions; their product equals the source's.
        place: What asks for it, for the reason given to axes that clash.

    Returns:
        One term for each size. Dimensions are matched in blocks of equal product; within a block that has no
        common refinement all axes are fixed.
    """
    result: list[Term] = []
    source, target = list(terms), list(sizes)
    while source or target:
        block, wanted = [source.pop(0)] if source else [], [target.pop(0)] if target else []
        while prod(t.size for t in block) != prod(wanted):
            if prod(t.size for t in block) < prod(wanted):
                block.append(source.pop(0))
            else:
                wanted.append(target.pop(0))
        result.extend(_regroup_block(block, wanted, place))
    return result


def _regroup_block(block: Sequence[Term], wanted: Sequence[int], place: str) -> list[Term]:
    rest, out = product(block), list[Term]()
    try:
        for size in reversed(wanted):
            if size == rest.size:
                out.append(rest)
                rest = UNIT
            else:
                rest, low = factor(rest, size)
                out.append(low)
    except _ClashError:
        reason = f"{place} mixes it with a dimension it has no common factor with"
        for term in block:
            fix(term, reason)
        return [var(size, reason) for size in wanted]
    return out[::-1]


def size_after(term: Term, kept: Mapping[Term, int]) -> int:
    """Return the size of a term once each axis in ``kept`` has the given size."""
    term = head(term)
    if isinstance(term, Var):
        return kept.get(term, term.size)
    if isinstance(term, Sum):
        return sum(size_after(part, kept) for part in term.parts)
    return prod(size_after(part, kept) for part in term.factors)


def positions(term: Term) -> dict[Var, NDArray[np.int64]]:
    """Return for each axis of a term the positions of the term that belong to each position of the axis.

    Returns:
        For each axis an int64 array of shape (axis size, k).

    Example:
        >>> heads, width = Var(2), Var(3)
        >>> positions(product([heads, width]))[heads].tolist()
        [[0, 1, 2], [3, 4, 5]]
        >>> positions(product([heads, width]))[width].tolist()
        [[0, 3], [1, 4], [2, 5]]
    """
    term = head(term)
    if isinstance(term, Var):
        return {term: np.arange(term.size, dtype=np.int64)[:, None]}
    found: dict[Var, list[NDArray[np.int64]]] = {}
    if isinstance(term, Sum):
        start = 0
        for part in term.parts:
            for axis, rows in positions(part).items():
                found.setdefault(axis, []).append(rows + start)
            start += part.size
    else:
        sizes = [factor.size for factor in term.factors]
        for index, each in enumerate(term.factors):
            outer, inner = prod(sizes[:index]), prod(sizes[index + 1 :])
            for axis, rows in positions(each).items():
                if axis in found:
                    fix(axis, "occurs twice in one dimension")
                high = np.arange(outer, dtype=np.int64)[None, :, None, None] * (each.size * inner)
                low = np.arange(inner, dtype=np.int64)[None, None, None, :]
                spread = high + rows[:, None, :, None] * inner + low
                found.setdefault(axis, []).append(spread.reshape(axis.size, -1))
    return {
        axis: rows[0] if len(rows) == 1 else np.sort(np.concatenate(rows, axis=1), axis=1)
        for axis, rows in found.items()
    }
