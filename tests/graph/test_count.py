"""Counting by polynomials is counting."""

from __future__ import annotations

from math import prod

from hypothesis import given, settings
from hypothesis import strategies as st

from slivo.graph.count import counter
from slivo.graph.dims import Var, concat, product, size_after, var

AXES = [Var(2), Var(3), Var(5)]


def terms():
    leaf = st.sampled_from([*AXES, Var(7), var(1)])
    return st.recursive(
        leaf,
        lambda inner: (
            st.lists(inner, min_size=1, max_size=3).map(product) | st.lists(inner, min_size=1, max_size=3).map(concat)
        ),
        max_leaves=6,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(terms(), max_size=3)), max_size=4),
    st.lists(st.integers(1, 4), min_size=3, max_size=3),
)
def test_the_count_is_the_sum_of_the_products(wanted, sizes):
    kept = dict(zip(AXES, sizes, strict=True))
    expected = sum(constant * prod(size_after(term, kept) for term in each) for constant, each in wanted)
    assert counter(AXES, wanted)(kept) == expected


def test_nothing_to_count_is_zero():
    assert counter([], [])({}) == 0
