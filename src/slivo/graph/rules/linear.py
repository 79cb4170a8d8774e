"""Matrix products: what is contracted is equal, what is not passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from slivo.graph.dims import UNIT, Term, head
from slivo.graph.infer import Dims, Inference, elementwise, rule

aten = torch.ops.aten


@rule(aten.linear)
def linear(t: Inference, x: Any, weight: Any, bias: Any = None) -> Dims:
    """``x[-1] = weight[1]``, ``y[-1] = weight[0] = bias[0]``."""
    source, matrix = t.of(x), t.of(weight)
    out, inner = matrix
    t.unify(source[-1], inner)
    t.read(inner)
    if bias is not None:
        t.unify(t.of(bias)[0], out)
    t.cost(1, *source[:-1], out, inner)
    t.fact("in_features", inner)
    t.fact("out_features", out)
    t.role(out, "out")
    return (*source[:-1], out)


@rule(aten.matmul, aten.mm, aten.bmm)
def matmul(t: Inference, left: Any, right: Any) -> Dims:
    """``left[-1] = right[-2]``; leading dimensions broadcast."""
    return _matmul(t, t.of(left), t.of(right))


@rule(aten.mv)
def mv(t: Inference, left: Any, right: Any) -> Dims:
    """A matrix times a vector."""
    return _matmul(t, t.of(left), t.of(right))


@rule(aten.dot, aten.vdot)
def dot(t: Inference, left: Any, right: Any) -> Dims:
    """A vector times a vector."""
    return _matmul(t, t.of(left), t.of(right))


@rule(aten.addmm, aten.baddbmm)
def addmm(t: Inference, bias: Any, left: Any, right: Any, *, beta: float = 1, alpha: float = 1) -> Dims:
    """``bias + left @ right``."""
    out = _matmul(t, t.of(left), t.of(right))
    for offset, term in enumerate(reversed(t.of(bias)), start=1):
        if term.size > 1:
            t.unify(term, out[-offset])
    t.role(out[-1], "out")
    return out


@rule(aten.addbmm)
def addbmm(t: Inference, bias: Any, left: Any, right: Any, *, beta: float = 1, alpha: float = 1) -> Dims:
    """``bias + sum over the batch of left @ right``."""
    out = _matmul(t, t.of(left), t.of(right))[1:]
    for offset, term in enumerate(reversed(t.of(bias)), start=1):
        if term.size > 1:
            t.unify(term, out[-offset])
    return out


@rule(aten._grouped_mm, "transformers::grouped_mm_fallback")
def grouped_mm(t: Inference, x: Any, weight: Any, offs: Any = None, *args: Any, **kwargs: Any) -> Dims:
    """Each run of rows is multiplied with the matrix of its expert: ``x[-1] = weight[1]``, ``y[-1] = weight[2]``.

    Where the runs end is known to be told by the counts of the numbers that the rows were sorted by, or else experts
    are fixed. The kernel wants rows of a multiple of 16 bytes.
    """
    source, (experts, inner, out) = t.of(x), t.of(weight)
    ends = t.marked(offs, "offsets")
    sorted_by = t.ordered.get(head(source[0]))
    if ends is None or sorted_by is None or head(ends) is not head(sorted_by):
        t.read_marks.clear()
        t.fix((experts,), "experts are picked by number")
    else:
        t.unify(experts, ends)
        t.limit(experts, routed=True)
        t.role(experts, "experts")
    t.unify(source[-1], inner)
    for term in (inner, out):
        t.limit(term, multiple=max(1, 16 // weight.meta["val"].element_size()))
    t.read(inner)
    t.cost(1, *source[:-1], out, inner)
    t.role(out, "out")
    return (*source[:-1], out)


def _matmul(t: Inference, left: Dims, right: Dims) -> Dims:
    rows = left[-2:-1] if len(left) > 1 else ()
    columns = right[-1:] if len(right) > 1 else ()
    inner = right[-2] if len(right) > 1 else right[-1]
    t.unify(left[-1], inner)
    t.read(left[-1], inner)
    batch = broadcast(t, left[:-2], right[:-2])
    t.cost(1, *batch, *rows, *columns, inner)
    return (*batch, *rows, *columns)


def broadcast(t: Inference, left: Dims, right: Dims) -> Dims:
    """Broadcast the leading dimensions of two operands against one another."""
    length = max(len(left), len(right))
    one, other = ((UNIT,) * (length - len(dims)) + dims for dims in (left, right))
    out: list[Term] = []
    for a, b in zip(one, other, strict=True):
        if head(a) is not UNIT and head(b) is not UNIT:
            t.unify(a, b)
        out.append(b if head(a) is UNIT else a)
    return tuple(out)


@rule(aten.einsum)
def einsum(t: Inference, equation: str, operands: Sequence[Any], path: Any = None) -> Dims:
    """A letter is a dimension."""
    left, _, right = equation.replace(" ", "").partition("->")
    letters: dict[str, Term] = {}
    for names, operand in zip(left.split(","), operands, strict=True):
        dims = list(t.of(operand))
        before, dots, after = names.partition("...")
        spread = [f".{i}" for i in range(len(dims) - len(before) - len(after))][::-1] if dots else []
        for name, term in zip([*before, *spread, *after], dims, strict=True):
            if name not in letters or head(letters[name]) is UNIT:
                letters[name] = term
            elif head(term) is not UNIT:
                t.unify(letters[name], term)
    if "->" not in equation:
        flat = left.replace(",", "").replace("...", "")
        right = "".join(sorted(name for name in set(flat) if flat.count(name) == 1))
        right = "..." + right if "..." in left else right
    spread = sorted((name for name in letters if name.startswith(".")), reverse=True)
    before, dots, after = right.partition("...")
    if len(operands) > 1:
        t.cost(1, *letters.values())
    return tuple(letters[name] for name in [*before, *(spread if dots else []), *after])


@rule(aten.bilinear)
def bilinear(t: Inference, left: Any, right: Any, weight: Any, bias: Any = None) -> Dims:
    """``y[o] = left · weight[o] · right``."""
    one, other, cube = t.of(left), t.of(right), t.of(weight)
    out, first, second = cube
    t.unify(one[-1], first)
    t.unify(other[-1], second)
    if bias is not None:
        t.unify(t.of(bias)[0], out)
    batch = broadcast(t, one[:-1], other[:-1])
    t.cost(1, *batch, out, first, second)
    for attribute, term in (("in1_features", first), ("in2_features", second), ("out_features", out)):
        t.fact(attribute, term)
    t.role(out, "out")
    return (*batch, out)


@rule(aten.cosine_similarity)
def cosine_similarity(t: Inference, left: Any, right: Any, dim: int = 1, eps: float = 1e-8) -> Dims:
    """Operands broadcast; one dimension is contracted."""
    shape = max(t.shape(left), t.shape(right), key=len)
    dims = list(elementwise(t, [left, right], shape))
    del dims[dim]
    return tuple(dims)


@rule(aten.embedding)
def embedding(t: Inference, weight: Any, indices: Any, *args: Any, **kwargs: Any) -> Dims:
    """Rows are looked up by number, so they are fixed; columns pass."""
    rows, columns = t.of(weight)
    told = t.marked(indices, "numbers", "permutation")
    if told is None:
        t.fix((rows,), "rows are looked up by number")
    else:
        t.unify(rows, told)
    t.fact("num_embeddings", rows)
    t.fact("embedding_dim", columns)
    t.role(columns, "out")
    return (*t.of(indices), columns)


@rule(aten.embedding_bag)
def embedding_bag(t: Inference, weight: Any, indices: Any, *args: Any, **kwargs: Any) -> list[Dims | None]:
    """Rows are looked up by number, so they are fixed; columns pass."""
    rows, columns = t.of(weight)
    t.fix((rows,), "rows are looked up by number")
    t.fact("embedding_dim", columns)
    t.role(columns, "out")
    shape = t.outputs()[0] or ()
    rest = [None if s is None else t.fresh(s, "indices") for s in t.outputs()[1:]]
    return [(*t.fresh(shape[:1], "bags"), columns), *rest]
