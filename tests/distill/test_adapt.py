"""Adapters have the shape that is missing, and come from a seed alone."""

import pytest
import torch
from torch import nn

from slivo.distill.adapt import adapter, channels


@pytest.mark.parametrize(
    ("ours", "theirs", "kind"),
    [
        ((4, 3), (4, 5), nn.Linear),
        ((4, 7, 3), (4, 7, 5), nn.Linear),
        ((4, 3, 8, 8), (4, 5, 8, 8), nn.Conv2d),
        ((4, 3, 2, 2, 2), (4, 5, 2, 2, 2), nn.Conv3d),
    ],
)
def test_maps_the_students_features_to_the_teachers(ours, theirs, kind):
    student, teacher = torch.randn(ours), torch.randn(theirs)
    made = adapter(student, teacher)
    assert type(made) is kind
    assert made(student).shape == theirs
    assert (channels(student), channels(teacher)) == (3, 5)
    assert adapter(student, student) is None


def test_weights_are_a_function_of_the_seed_alone():
    student, teacher = torch.randn(4, 3), torch.randn(4, 5)
    state = torch.get_rng_state()
    first = adapter(student, teacher, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again, other = adapter(student, teacher, seed=1), adapter(student, teacher, seed=2)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (torch.float16, torch.float16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_is_of_the_type_in_which_both_are_compared(ours, theirs, expected):
    assert adapter(torch.ones(2, 3, dtype=ours), torch.ones(2, 5, dtype=theirs)).weight.dtype == expected
