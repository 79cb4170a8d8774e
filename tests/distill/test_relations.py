"""Losses on relations against their papers, in loops and float64, and what must be true of all of them."""

import itertools
import math

import numpy as np
import pytest
import torch

from slivo import losses
from slivo.distill import relations
from slivo.distill.relations import cka, correlation_congruence, rkd_angle, rkd_distance
from slivo.errors import RecipeError, ShapeError


def draw(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def norm(vector):
    return math.sqrt(float(sum(vector * vector)))


def huber(difference):
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


def ref_rkd_distance(student, teacher):
    pairs = [(i, j) for i in range(len(student)) for j in range(len(student)) if i != j]
    relative = []
    for rows in (student, teacher):
        distances = [norm(rows[i] - rows[j]) for i, j in pairs]
        relative.append([each / np.mean(distances) for each in distances])
    return np.mean([huber(a - b) for a, b in zip(*relative, strict=True)])


def ref_rkd_angle(student, teacher):
    values = []
    for i, j, k in itertools.permutations(range(len(student)), 3):
        cosines = []
        for rows in (student, teacher):
            first, second = rows[i] - rows[j], rows[k] - rows[j]
            cosines.append(sum(first * second) / norm(first) / norm(second))
        values.append(huber(cosines[0] - cosines[1]))
    return np.mean(values)


def ref_correlation_congruence(student, teacher, gamma=0.4, order=2):
    def kernel(a, b):
        cosine = sum(a * b) / norm(a) / norm(b)
        return sum(math.exp(-2 * gamma) * (2 * gamma * cosine) ** p / math.factorial(p) for p in range(order + 1))

    size = len(student)
    pairs = [(i, j) for i in range(size) for j in range(size)]
    return np.mean([(kernel(student[i], student[j]) - kernel(teacher[i], teacher[j])) ** 2 for i, j in pairs])


def ref_cka(student, teacher):
    # By features, as in the paper: ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖).
    x, y = (rows - rows.mean(0) for rows in (student, teacher))

    def energy(a, b):
        return sum(sum(p * q for p, q in zip(u, v, strict=True)) ** 2 for u in a.T for v in b.T)

    return 1 - energy(x, y) / math.sqrt(energy(x, x) * energy(y, y))


REFERENCES = {
    "rkd_distance": (ref_rkd_distance, [{}]),
    "rkd_angle": (ref_rkd_angle, [{}]),
    "correlation_congruence": (ref_correlation_congruence, [{}, {"gamma": 1.0, "order": 1}, {"order": 5}]),
    "cka": (ref_cka, [{}]),
}
LOSSES = [
    name
    for name, value in vars(relations).items()
    if getattr(value, "__module__", "") == relations.__name__ and name[0] != "_"
]
PAIRS = [(name, options) for name, (_, choices) in REFERENCES.items() for options in choices]


def gradient(name, student, teacher, **options):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(getattr(relations, name)(student, teacher, **options), student)[0]


def test_every_loss_has_a_reference():
    assert sorted(REFERENCES) == sorted(LOSSES)
    assert set(LOSSES) <= set(losses.names())


@pytest.mark.parametrize(("name", "options"), PAIRS)
@pytest.mark.parametrize("shapes", [((6, 4), (6, 3)), ((5, 2, 2, 2), (5, 3))])
def test_is_the_formula_of_its_paper(name, options, shapes):
    student, teacher = draw(*shapes)
    found = getattr(relations, name)(student, teacher, **options)
    rows = (each.flatten(1).numpy() for each in (student, teacher))
    assert found.shape == ()
    assert found.item() == pytest.approx(REFERENCES[name][0](*rows, **options), rel=1e-10)
    halves = [each.half() for each in (student, teacher)]
    widened = getattr(relations, name)(*halves, **options)
    assert widened.dtype == torch.float32
    expected = getattr(relations, name)(*(each.double() for each in halves), **options)
    assert widened.item() == pytest.approx(expected.item(), rel=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = getattr(relations, name)(*(each.float() for each in halves), **options)
    assert again.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(("name", "options"), PAIRS)
def test_gradient_is_the_slope_and_the_teacher_has_none(name, options):
    student, teacher = (each.requires_grad_() for each in draw((5, 3), (5, 4)))
    function = getattr(relations, name)
    assert torch.autograd.gradcheck(lambda values: function(values, teacher.detach(), **options), student)
    function(student, teacher, **options).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_is_zero_for_a_student_like_its_teacher(name):
    student, teacher = draw((6, 4), (6, 4))
    assert getattr(relations, name)(student, teacher) > 0
    assert getattr(relations, name)(teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    slope = gradient(name, teacher, teacher)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_turns_scales_and_order_of_samples_do_not_matter(name):
    student, teacher = draw((6, 4), (6, 3))
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    function = getattr(relations, name)
    expected = function(student, teacher)
    torch.testing.assert_close(function(3 * student @ turn, 0.5 * teacher), expected)
    order = torch.randperm(6)
    torch.testing.assert_close(function(student[order], teacher[order]), expected)


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle", "cka"])
def test_shifts_do_not_matter(name):
    student, teacher = draw((6, 4), (6, 3))
    function = getattr(relations, name)
    torch.testing.assert_close(function(student + 5, teacher - 2), function(student, teacher))


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_chunks_do_not_change_the_result(chunk):
    student, teacher = draw((5, 4), (5, 3))
    torch.testing.assert_close(rkd_angle(student, teacher, chunk=chunk), rkd_angle(student, teacher))
    torch.testing.assert_close(
        gradient("rkd_angle", student, teacher, chunk=chunk), gradient("rkd_angle", student, teacher)
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [1, 2])
def test_too_few_samples_have_no_relations(name, size):
    student, teacher = draw((size, 4), (size, 3))
    student.requires_grad_()
    loss = getattr(relations, name)(student, teacher)
    loss.backward()
    assert student.grad.isfinite().all()
    # Two samples have a distance, which is its own mean, and a cosine, which may differ.
    if name != "correlation_congruence" or size == 1:
        assert loss.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_and_zero_samples_give_finite_values_and_slopes(name):
    some = draw((6, 4), dtype=torch.float32)[0]
    twins = torch.cat([some[:3], some[:3]])
    zeros = torch.zeros(6, 4)
    for student, teacher in itertools.product((some, twins, zeros, torch.ones(6, 4)), repeat=2):
        assert getattr(relations, name)(student, teacher).isfinite()
        assert gradient(name, student, teacher).isfinite().all()


def test_distances_of_near_samples_far_from_zero_keep_their_digits():
    rows = draw((4, 3), dtype=torch.float32)[0]
    near = (1000 + rows / 8).double()
    assert rkd_distance(near.float(), near).item() == pytest.approx(0, abs=1e-6)


def test_cka_is_between_0_and_1_whatever_the_scale():
    ours, theirs = torch.eye(4)[:, :1], torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    assert 0 < cka(ours, theirs) < 1
    rows = draw((6, 4), dtype=torch.float32)[0]
    for scale in (1e-25, 1e25):
        assert cka(scale * rows, rows).item() == pytest.approx(0, abs=1e-6)
    assert cka(torch.ones(4, 2), theirs) == 1


@pytest.mark.parametrize("name", LOSSES)
def test_batches_that_differ_are_refused(name):
    with pytest.raises(ShapeError, match=r"\(4, 3\) and teacher \(5, 3\) do not fit"):
        getattr(relations, name)(torch.zeros(4, 3), torch.zeros(5, 3))
    with pytest.raises(ShapeError, match="2 dimensions or more"):
        getattr(relations, name)(torch.zeros(4), torch.zeros(4, 3))


def test_options_out_of_range_are_refused():
    some = torch.ones(4, 3)
    with pytest.raises(RecipeError, match="chunk is 0"):
        rkd_angle(some, some, chunk=0)
    for options in ({"gamma": 0.0}, {"gamma": math.nan}, {"gamma": math.inf}, {"order": 0}):
        with pytest.raises(RecipeError, match="gamma must be above 0 and order 1 or more"):
            correlation_congruence(some, some, **options)
