"""Arithmetic that the losses share."""

import math
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from slivo.distill._tensors import (
    center,
    class_indices,
    first_tensor,
    gram,
    nothing,
    positive,
    share,
    unit,
    weight,
    widen,
)
from slivo.errors import RecipeError, ShapeError

Output = namedtuple("Output", ["loss", "logits"])
ONE, TWO = torch.ones(1), torch.ones(2)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (ONE, ONE),
        ((ONE, TWO), ONE),
        ([None, TWO], TWO),
        (("text", (None, {"a": TWO})), TWO),
        ({"loss": ONE, "logits": TWO}, TWO),
        ({"loss": None, "hidden": TWO}, TWO),
        ({"logits": None, "hidden": TWO}, TWO),
        (Output(ONE, TWO), TWO),
        (Output(ONE, None), ONE),
        (SimpleNamespace(loss=ONE, logits=TWO), TWO),
        (SimpleNamespace(loss=ONE), None),
        ((), None),
        ("text", None),
        (None, None),
    ],
)
def test_first_tensor_is_the_logits_or_what_comes_first(output, expected):
    assert first_tensor(output) is expected


def test_unit_scales_to_length_1_whatever_the_scale():
    rows = torch.tensor([[3.0, 4.0], [3e-30, 4e-30], [3e30, 4e30]], requires_grad=True)
    torch.testing.assert_close(unit(rows).detach(), torch.tensor([[0.6, 0.8]]).expand(3, 2))
    zeros = torch.zeros(2, 3, requires_grad=True)
    (2 * unit(zeros)).sum().backward()
    assert (unit(zeros) == 0).all()
    assert (zeros.grad == 2).all()
    assert torch.autograd.gradcheck(unit, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))
    assert unit(torch.zeros(2, 0)).shape == (2, 0)


def test_center_takes_the_mean_of_what_counts():
    rows = torch.tensor([[1.0, 2.0, 6.0], [5.0, -math.inf, 1.0]])
    assert center(rows[:1]).tolist() == [[-2, -1, 3]]
    assert center(rows, rows.isinf()).tolist() == [[-2, -1, 3], [2, 0, -2]]
    assert center(rows, torch.ones_like(rows, dtype=torch.bool)).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_center_makes_what_is_constant_exactly_zero():
    constant = torch.full((1, 7), 0.1) * torch.tensor([[1.0], [3.0], [1e6]])
    assert (center(constant) == 0).all()
    small = torch.tensor([[1.0, 1.0 + 1e-4]])
    assert center(small).abs().min() > 0


def test_widen_takes_the_wider_type_and_cuts_the_teacher_off():
    for types, expected in {
        (torch.float16, torch.float16): torch.float32,
        (torch.bfloat16, torch.float32): torch.float32,
        (torch.float32, torch.float64): torch.float64,
    }.items():
        student, teacher = (torch.ones(2, dtype=each, requires_grad=True) for each in types)
        ours, theirs = widen(student, teacher)
        assert ours.dtype == theirs.dtype == expected
        assert ours.requires_grad
        assert not theirs.requires_grad


def test_gram_is_not_rounded_by_autocast():
    rows = torch.randn(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gram(rows, rows), gram(rows, rows).float())
    torch.testing.assert_close(gram(rows, rows), rows @ rows.T)


def test_nothing_is_a_zero_with_a_gradient():
    student = torch.ones(2, 3, dtype=torch.float16, requires_grad=True)
    loss = nothing(student)
    loss.backward()
    assert (loss, loss.dtype) == (0, torch.float32)
    assert (student.grad == 0).all()


def test_class_indices_are_integers_in_range():
    assert class_indices(torch.tensor([-100, 0, 2], dtype=torch.int16), 3).dtype == torch.int64
    for wrong in (torch.tensor([3]), torch.tensor([1.0]), torch.tensor([1j]), torch.tensor([True])):
        with pytest.raises(ShapeError, match="integers below 3"):
            class_indices(wrong, 3)


def test_options_out_of_range_are_refused_with_what_is_allowed():
    positive("x", 1e-9)
    weight("x", 0)
    share("x", 0, zero=True)
    share("x", 0.5, zero=False)
    for check, options, wrong, allowed in (
        (positive, {}, (0, -1, math.inf, math.nan), "above 0"),
        (weight, {}, (-1, math.inf, math.nan), "0 or above"),
        (share, {"zero": True}, (-1, 1, math.nan), "0 or above and below 1"),
        (share, {"zero": False}, (0, 1, math.nan), "above 0 and below 1"),
    ):
        for value in wrong:
            with pytest.raises(RecipeError, match=f"x is {value}; it must be .*{allowed}"):
                check("x", value, **options)
