"""Fronts: what nothing beats, against all pairs; and which of it is taken."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slivo.search.front import best, dominates, front
from slivo.search.record import Row

VALUES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), max_size=12)


def rows(values: list[tuple[Any, ...]], **parts: Any) -> list[Row]:
    return [Row(number, "done", values=tuple(map(float, each)), **parts) for number, each in enumerate(values)]


@given(VALUES)
def test_the_front_is_what_nothing_beats_and_beats_all_else(values: list[tuple[int, ...]]) -> None:
    found = [row.values for row in front(rows(values))]
    assert len(set(found)) == len(found)
    for each in values:
        beaten = any(
            other[0] >= each[0] and other[1] <= each[1] and other[2] <= each[2] and other != each for other in values
        )
        assert (tuple(map(float, each)) in found) is not beaten
    assert [one[1:] for one in found] == sorted(one[1:] for one in found)


def test_trials_that_are_not_done_are_on_no_front() -> None:
    assert front([Row(0, "failed"), Row(1, "running")]) == []
    assert best([Row(0, "refused")], {}) is None


def test_domination_is_strict() -> None:
    points = np.random.default_rng(0).integers(0, 3, (20, 2)).tolist()
    for one in points:
        assert not dominates(one, one)
        for other in points:
            assert not (dominates(one, other) and dominates(other, one))


def test_with_a_floor_the_cheapest_that_holds_it_is_taken_and_without_the_best() -> None:
    good, cheap = Row(0, "done", values=(0.99, 0.5)), Row(1, "done", values=(0.97, 0.3))
    poor = Row(2, "done", values=(0.5, 0.1), misses=("accuracy fell",))
    assert best([good, cheap, poor], {"max_drop": 0.03}) == cheap
    assert best([good, cheap, poor], {"macs": 0.5}) == good
    missed = Row(3, "done", values=(0.6, 0.2), misses=("accuracy fell",))
    assert best([poor, missed], {"max_drop": 0.03}) == missed
