from __future__ import annotations

from itertools import pairwise
from typing import get_args

import pytest

from slivo.errors import RecipeError
from slivo.prune.schedule import Kind, steps


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("keep", [0.05, 0.5, 1.0])
def test_shares_fall_to_the_target_exactly(kind, count, keep):
    shares = steps(kind, count, keep)
    assert len(shares) == count
    assert shares[-1] == keep
    assert all(1 >= one >= other for one, other in pairwise(shares))


def test_by_hand():
    assert steps("linear", 4, 0.2) == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert steps("exponential", 2, 0.25) == pytest.approx([0.5, 0.25])
    assert steps("cubic", 2, 0.2) == pytest.approx([0.2 + 0.8 / 8, 0.2])


@pytest.mark.parametrize(
    ("kind", "count", "keep", "told"),
    [("linear", 0, 0.5, "0 steps"), ("linear", 1, 0.0, "keeps 0.0"), ("square", 1, 0.5, "there are linear")],
)
def test_out_of_range(kind, count, keep, told):
    with pytest.raises(RecipeError, match=told):
        steps(kind, count, keep)
