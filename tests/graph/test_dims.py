"""The algebra of dimensions, by hand-worked cases and against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slivo.graph.dims import (
    UNIT,
    Prod,
    Sum,
    Var,
    concat,
    factor,
    fix,
    head,
    leaves,
    positions,
    product,
    regroup,
    size_after,
    split,
    take,
    unify,
    var,
)


def sizes(term) -> list[int]:
    return [leaf.size for leaf in leaves(term)]


def test_size_one_has_no_axis():
    assert var(1) is UNIT
    assert product([UNIT, UNIT]) is UNIT
    assert list(leaves(UNIT)) == []


def test_products_and_sums_are_flat():
    a, b, c = Var(2), Var(3), Var(5)
    assert sizes(product([a, product([b, c])])) == [2, 3, 5]
    assert sizes(concat([concat([a, b]), c])) == [2, 3, 5]
    assert product([a]) is a
    assert concat([a]) is a


def test_variables_merge():
    a, b = Var(4), Var(4)
    unify(a, b, "add")
    assert head(a) is head(b)


def test_fixed_is_passed_on_with_its_reason():
    a, b = Var(4), Var(4, "an input")
    unify(a, b, "add")
    assert next(leaves(a)).fixed == "an input"


def test_the_first_reason_is_kept():
    a = Var(4)
    fix(a, "first")
    fix(a, "second")
    assert a.fixed == "first"


def test_sums_refine_each_other_at_every_boundary():
    left, right = concat([Var(3), Var(5)]), concat([Var(5), Var(3)])
    unify(left, right, "add")
    assert sizes(left) == sizes(right) == [3, 2, 3]


def test_products_refine_each_other():
    left, right = product([Var(4), Var(6)]), product([Var(2), Var(12)])
    unify(left, right, "view")
    assert sizes(left) == sizes(right) == [2, 2, 6]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ([2, 3], [3, 2]),  # no common refinement
        ([4, 9], [6, 6]),
    ],
)
def test_products_that_clash_are_fixed_and_say_where(left, right):
    one, other = product([Var(size) for size in left]), product([Var(size) for size in right])
    unify(one, other, "add in layer1")
    assert all("add in layer1" in (leaf.fixed or "") for term in (one, other) for leaf in leaves(term))


def test_other_sizes_clash():
    a, b = Var(4), Var(5)
    unify(a, b, "add")
    assert a.fixed
    assert b.fixed


def test_a_dimension_is_no_part_of_itself():
    a = Var(6)
    unify(a, product([a, UNIT]), "view")
    assert head(a) is a
    b = Var(4)
    unify(concat([b, Var(4)]), product([Var(2), b]), "odd")
    assert all(leaf.size > 0 for leaf in leaves(b))


def test_split_and_take_cut_sums():
    a = Var(10)
    first, second = split(a, 4)
    assert (first.size, second.size) == (4, 6)
    assert sizes(a) == [4, 6]
    middle = take(a, 4, 7)
    assert middle is not None
    assert sizes(a) == [4, 3, 3]


def test_take_inside_a_block_gives_nothing():
    assert take(product([Var(2), Var(3)]), 0, 4) is None


def test_take_whole_blocks_of_a_product():
    a, b = Var(4), Var(3)
    piece = take(product([a, b]), 3, 9)
    assert piece is not None
    assert sizes(a) == [1, 2, 1] or sizes(a) == [2] or sum(sizes(a)) <= 4


def test_factor_of_a_sum_shares_the_inner_axis():
    a = concat([Var(6), Var(9)])
    high, low = factor(a, 3)
    assert high.size == 5
    assert low.size == 3
    assert len({leaf for leaf in leaves(a) if leaf.size == 3 and leaf in set(leaves(low))}) == 1


def test_regroup_matches_blocks():
    batch, channels, height, width = Var(2), Var(12), Var(5), Var(7)
    out = regroup([batch, channels, height, width], [2, 3, 4, 35], "view")
    assert head(out[0]) is batch
    assert sizes(channels) == [3, 4]
    assert sizes(out[3]) == [5, 7]


def test_regroup_that_mixes_fixes_the_block_only():
    a, b, c = Var(2), Var(3), Var(5)
    out = regroup([a, b, c], [3, 2, 5], "view")
    assert a.fixed
    assert b.fixed
    assert c.fixed is None
    assert head(out[2]) is c


def test_size_after():
    a, b = Var(4), Var(3)
    assert size_after(product([a, b]), {a: 2}) == 6
    assert size_after(concat([a, b]), {a: 2}) == 5


TERMS = st.recursive(
    st.integers(2, 4).map(Var),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: Prod(tuple(parts))),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: Sum(tuple(parts))),
    ),
    max_leaves=4,
)


def labels(term) -> list[tuple]:
    """What each position of a term is, slowly: the (axis, position) pairs that make it up."""
    term = head(term)
    if isinstance(term, Var):
        return [((id(term), position),) for position in range(term.size)]
    if isinstance(term, Sum):
        return [label for part in term.parts for label in labels(part)]
    result: list[tuple] = [()]
    for each in term.factors:
        result = [outer + inner for outer in result for inner in labels(each)]
    return result


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TERMS)
def test_positions_agree_with_brute_force(term):
    told = labels(term)
    assert len(told) == term.size
    for axis, rows in positions(term).items():
        assert rows.dtype == np.int64
        for position in range(axis.size):
            wanted = [index for index, label in enumerate(told) if (id(axis), position) in label]
            assert rows[position].tolist() == wanted


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TERMS, TERMS)
def test_unify_makes_terms_equal_or_fixes_them(left, right):
    unify(left, right, "op")
    same = labels(left) == labels(right)
    fixed = all(leaf.fixed for leaf in [*leaves(left), *leaves(right)])
    assert same or fixed
