"""Options of losses may change in the course of a training."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slivo.distill import Ramp
from slivo.errors import RecipeError

SHARES = st.floats(0, 1)


@settings(deadline=None, max_examples=100)
@given(SHARES, SHARES, st.floats(-5, 5), st.floats(-5, 5), st.sampled_from(["linear", "cosine"]), SHARES, SHARES)
def test_goes_from_start_to_end_and_never_back(one, other, start, end, shape, early, late):
    begin, until = sorted((one, other))
    if until - begin < 1e-6:
        return
    ramp = Ramp(start, end, begin, until, shape)
    early, late = sorted((early, late))
    tiny = 1e-9
    assert abs(ramp(begin) - start) <= tiny
    assert abs(ramp(until) - end) <= tiny
    assert min(start, end) - tiny <= ramp(early) <= max(start, end) + tiny
    assert (ramp(late) - ramp(early)) * (end - start) >= -tiny


def test_by_hand():
    assert Ramp(1, 3, 0.5, 1.0)(0.75) == 2
    assert Ramp(0, 1, shape="cosine")(1 / 3) == pytest.approx((1 - math.cos(math.pi / 3)) / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": math.inf}, "must be made of numbers"),
        ({"end": "much"}, "must be made of numbers"),
        ({"begin": 0.5, "until": 0.5}, "begin is 0.5 and until 0.5"),
        ({"until": 2}, "0 <= begin < until <= 1"),
        ({"shape": "square"}, "shape is 'square'; allowed: linear, cosine"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        Ramp(**{"start": 0.0, "end": 1.0, **options})
