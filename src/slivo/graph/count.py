"""Counting: MACs, parameters and bytes as polynomials in the sizes of axes, evaluated for many sizes at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product as pairs
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from slivo.graph.capture import canonical_names
from slivo.graph.dims import Sum, Term, Var, head

Ints = NDArray[np.int64]
Polynomial = dict[tuple[int, ...], int]
"""For each product of axes (their numbers, ascending) its coefficient."""


@dataclass(frozen=True)
class Counter:
    """Sums of products of dimensions, laid out so that they are evaluated without a loop.

    A dimension is a sum of coefficients times products of axis sizes; what is counted is a sum of constants times
    products of dimensions. Number 0 stands for 1 among axes and among dimensions, to fill rows up.

    Args:
        axes: The axes that may have other sizes, in order of their numbers, from 1.
        monomials: For each product of axes, the numbers of the axes.
        coefficients: For each entry of each dimension, its coefficient.
        entries: For each entry of each dimension, which product of axes it is.
        starts: Where each dimension's entries start.
        constants: For each thing to count, its constant.
        factors: For each thing to count, the numbers of its dimensions.
    """

    axes: tuple[Var, ...]
    monomials: Ints
    coefficients: Ints
    entries: Ints
    starts: Ints
    constants: Ints
    factors: Ints

    def __call__(self, sizes: Mapping[Var, int]) -> int:
        """Return the count when axes have the given sizes; the others have their own."""
        return int(self.each(sizes).sum())

    def each(self, sizes: Mapping[Var, int]) -> Ints:
        """Return what each thing counts when axes have the given sizes, in the order in which they were given."""
        given = np.array([1, *(sizes.get(axis, axis.size) for axis in self.axes)], dtype=np.int64)
        values = given[self.monomials].prod(axis=1)[self.entries] * self.coefficients
        dims = np.add.reduceat(values, self.starts)
        found: Ints = dims[self.factors].prod(axis=1) * self.constants
        return found


@dataclass(frozen=True)
class FileSize:
    """The bytes of tensors as a safetensors file, as a function of sizes of axes.

    The file is the length of its header, the header, which says in decimal digits what shape each tensor has and where
    it begins and ends, and the entries.

    Args:
        each: Counts the bytes of each tensor in the order of the file, then the size of each dimension of each.
        tensors: How many tensors there are.
        header: Bytes of the header without those digits.
    """

    each: Counter
    tensors: int
    header: int

    def __call__(self, sizes: Mapping[Var, int]) -> int:
        """Return the bytes when axes have the given sizes; the others have their own."""
        found = self.each.each(sizes)
        ends = np.cumsum(found[: self.tensors])
        starts, dims = ends - found[: self.tensors], found[self.tensors :]
        digits = sum(int(np.searchsorted(_TENS, each, side="right").sum()) + each.size for each in (starts, ends, dims))
        return 8 + -(-(self.header + digits) // 8) * 8 + int(found[: self.tensors].sum())


_TENS = 10 ** np.arange(1, 19, dtype=np.int64)  # a number has one digit more than there are of these up to it


def counter(axes: Iterable[Var], wanted: Iterable[tuple[int, Sequence[Term]]]) -> Counter:
    """Prepare a count.

    Args:
        axes: The axes whose sizes vary; all others are numbers.
        wanted: What is summed up: a constant, and the dimensions it is multiplied with.

    Returns:
        The count as a function of sizes.

    Example:
        >>> inner, outer = Var(3), Var(4)
        >>> count = counter([inner, outer], [(2, [inner, outer]), (1, [outer])])
        >>> count({}), count({outer: 1})
        (28, 7)
    """
    number = {axis: index for index, axis in enumerate(axes, start=1)}
    known: dict[int, Polynomial] = {}
    dims: dict[tuple[tuple[tuple[int, ...], int], ...], int] = {(((), 1),): 0}
    kept: list[Term] = []  # so that no identity is used again
    constants, factors = [], []
    for constant, terms in wanted:
        row = []
        for term in map(head, terms):
            if id(term) not in known:
                known[id(term)] = _polynomial(term, number, known)
                kept.append(term)
            found = known[id(term)]
            if set(found) <= {()}:
                constant *= found.get((), 0)
            else:
                row.append(dims.setdefault(tuple(sorted(found.items())), len(dims)))
        constants.append(constant)
        factors.append(row)
    entries = [entry for each in dims for entry in each]
    monomials = {each: index for index, each in enumerate(dict.fromkeys(each for each, _ in entries))}
    return Counter(
        axes=tuple(number),
        monomials=_filled(list(monomials)),
        coefficients=np.array([coefficient for _, coefficient in entries], dtype=np.int64),
        entries=np.array([monomials[each] for each, _ in entries], dtype=np.int64),
        starts=np.cumsum([0, *(len(each) for each in dims)])[:-1],
        constants=np.array(constants, dtype=np.int64),
        factors=_filled(factors),
    )


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that a file of a model holds, tied ones once, on the meta device."""
    names, held = canonical_names(model), {**dict(model.named_buffers()), **dict(model.named_parameters())}
    return {
        name: torch.empty(each.shape, dtype=each.dtype, device="meta")
        for name, each in held.items()
        if names[name] == name
    }


def file_size(axes: Iterable[Var], stored: Mapping[str, Tensor], dims: Mapping[str, Sequence[Term]]) -> FileSize:
    """Prepare a count of the bytes of a file.

    Args:
        axes: The axes whose sizes vary; all others are numbers.
        stored: The tensors by name, of which only shape and dtype count.
        dims: For those of them that are known, the dimensions; the others have always the shape that they have.

    Returns:
        The bytes as a function of sizes.

    Example:
        >>> width = Var(4)
        >>> count = file_size([width], {"w": torch.empty(4, 3)}, {"w": (width, Var(3))})
        >>> count({}) == len(save({"w": torch.empty(4, 3)})), count({}) - count({width: 2})
        (True, 24)
    """
    # What the header looks like, and which tensor comes first, is for the library to say: it writes a file of nothing.
    blank = save({name: torch.empty([0] * tensor.dim(), dtype=tensor.dtype) for name, tensor in stored.items()})
    header = blank[8 : 8 + int.from_bytes(blank[:8], "little")].rstrip()
    told = json.loads(header)
    digits = sum(len(str(value)) for each in told.values() for value in (*each["shape"], *each["data_offsets"]))
    known = {name: dims.get(name, [Var(size) for size in stored[name].shape]) for name in told}
    wanted: list[tuple[int, Sequence[Term]]] = [(stored[name].itemsize, terms) for name, terms in known.items()]
    wanted += [(1, [term]) for terms in known.values() for term in terms]
    return FileSize(counter(axes, wanted), len(known), len(header) - digits)


def _filled(rows: Sequence[Sequence[int]]) -> Ints:
    """Return rows of one length, filled up with zeros."""
    filled = np.zeros((len(rows), max(map(len, rows), default=0)), dtype=np.int64)
    for index, row in enumerate(rows):
        filled[index, : len(row)] = row
    return filled


def _polynomial(term: Term, number: Mapping[Var, int], known: Mapping[int, Polynomial]) -> Polynomial:
    """Write a dimension's size as a polynomial in the sizes of axes."""
    term = head(term)
    if id(term) in known:
        return known[id(term)]
    if isinstance(term, Var):
        return {(number[term],): 1} if term in number else {(): term.size}
    parts = [_polynomial(part, number, known) for part in (term.parts if isinstance(term, Sum) else term.factors)]
    found: Polynomial = {}
    if isinstance(term, Sum):
        for part in parts:
            for axes, coefficient in part.items():
                found[axes] = found.get(axes, 0) + coefficient
        return found
    for chosen in pairs(*(part.items() for part in parts)):
        axes = tuple(sorted(axis for each, _ in chosen for axis in each))
        found[axes] = found.get(axes, 0) + prod(coefficient for _, coefficient in chosen)
    return found
