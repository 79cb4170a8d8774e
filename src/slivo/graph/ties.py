"""Ties: dimensions that are not the same and stay of equal size, because the code has one number for them."""

from __future__ import annotations

import collections
import functools
import operator
from collections.abc import Sequence

from torch import nn

from slivo.graph.dims import Prod, Sum, Term, Var, fix, head, leaves, regroup, take, unify
from slivo.graph.infer import Inference


def equal_sizes(inference: Inference) -> list[frozenset[Var]]:
    """Turn dimensions of equal size into sets of axes of equal size; what cannot be said so is fixed."""
    ties: list[frozenset[Var]] = []
    for terms in inference.ties:
        factors = [collections.Counter(leaves(term)) for term in terms]
        common = functools.reduce(operator.and_, factors)
        rest = [[leaf for leaf in (each - common).elements() if leaf.fixed is None] for each in factors]
        if not any(rest):
            continue
        # What a product has in common with another cancels; of a sum nothing does.
        plain = not common or all(not isinstance(head(term), Sum) for term in terms)
        if plain and all(len(each) == 1 for each in rest) and len({each[0].size for each in rest}) == 1:
            ties.append(frozenset(each[0] for each in rest))
        else:
            for term in terms:
                fix(term, "stays of equal size with a dimension of another structure")
    return ties


def shared_attributes(model: nn.Module, inference: Inference) -> list[tuple[Term, ...]]:
    """Find dimensions whose sizes the code takes from one place, such as ``head_dim`` of queries and of values.

    They are cut alike, so that the place can say their size: an attribute, or, where none has that value, what the code
    read off another tensor. Where a module has two attributes of that value, which one is meant is not known, and the
    dimensions go their own ways. Where one of them is in halves, as rotary positions make queries, so are the others.
    """
    found: dict[tuple[str, int], dict[Var, Term]] = {}
    for literal in inference.literals:
        term = head(literal.term)
        free = {leaf for leaf in leaves(term) if leaf.fixed is None}
        if len(free) == 1 and free <= set(_parts(term)) and not literal.shift:
            found.setdefault((literal.module, term.size), {})[free.pop()] = term
    ties: list[tuple[Term, ...]] = []
    for (module, size), terms in found.items():
        held = sum(type(value) is int and value == size for value in vars(model.get_submodule(module)).values())
        if len(terms) > 1 and held <= 1:
            ties.append(_alike(list(terms.values())))
    return ties


def _parts(term: Term) -> list[Term]:
    """Return the factors of a product, the parts of a sum, or the term itself."""
    parts = term.factors if isinstance(term, Prod) else term.parts if isinstance(term, Sum) else (term,)
    return [head(each) for each in parts]


def _alike(terms: Sequence[Term]) -> tuple[Term, ...]:
    """Return the axes of dimensions that are cut alike; what is a single axis takes the form of what has parts."""
    forms = [term for term in terms if not isinstance(term, Var)]
    if len({(type(term), tuple(each.size for each in _parts(term))) for term in forms}) > 1:
        return tuple(term for term in terms if isinstance(term, Var))
    for term in terms if forms else ():
        if isinstance(term, Var):
            _give_form(term, forms[0])
    return tuple({leaf: None for term in terms for leaf in leaves(term) if leaf.fixed is None})


def _give_form(term: Var, form: Term) -> None:
    """Refine an axis into parts as another dimension has them: what is one axis there is one axis here."""
    sizes = [each.size for each in _parts(form)]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    if isinstance(form, Prod):
        own: list[Term | None] = [*regroup([term], sizes, "")]
    else:
        own = [take(term, start, start + size) for start, size in zip(starts, sizes, strict=True)]
    known: dict[Term, Term] = {}
    for part, other in zip(own, _parts(form), strict=True):
        assert part is not None  # an axis can be parted anywhere
        unify(part, known.setdefault(other, part), "")
        if isinstance(other, Var) and other.fixed is not None:
            fix(part, f"{other.fixed}, in a dimension that the code takes to be alike")
