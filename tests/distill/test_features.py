"""Losses on activations against their papers, in loops and float64, and what must be true of all of them."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from slivo import losses
from slivo.distill import features
from slivo.distill.adapt import adapter
from slivo.distill.features import attention_transfer, hint, nst, pkt, sp
from slivo.errors import ShapeError

MAPS = (4, 3, 2, 5)


def draw(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def units(rows):
    return [row / math.sqrt(sum(row * row)) for row in rows]


def ref_hint(student, teacher):
    return np.mean([(a - b) ** 2 for a, b in zip(student.flatten(), teacher.flatten(), strict=True)])


def ref_attention_transfer(student, teacher):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        maps = [sum(channel.flatten() ** 2 for channel in each) for each in (s, t)]
        a, b = units(maps)
        total += sum((a - b) ** 2)
    return total / len(student)


def ref_sp(student, teacher):
    size = len(student)
    grams = []
    for each in (student, teacher):
        rows = each.reshape(size, -1)
        grams.append(units([np.array([a @ b for b in rows]) for a in rows]))
    return sum((grams[0][i][j] - grams[1][i][j]) ** 2 for i in range(size) for j in range(size)) / size**2


def ref_pkt(student, teacher):
    size = len(student)
    chances = []
    for each in (student, teacher):
        rows = units(each.reshape(size, -1))
        kernel = [[(rows[i] @ rows[j] + 1) / 2 if i != j else 0 for j in range(size)] for i in range(size)]
        chances.append([[value / sum(row) for value in row] for row in kernel])
    q, p = chances
    return sum(p[i][j] * math.log(p[i][j] / q[i][j]) for i in range(size) for j in range(size) if i != j) / size


def ref_nst(student, teacher):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        a, b = (units(each.reshape(len(each), -1)) for each in (s, t))

        def kernel(first, second):
            return np.mean([(x @ y) ** 2 for x in first for y in second])

        total += kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
    return total / len(student)


REFERENCES = {
    "hint": ref_hint,
    "attention_transfer": ref_attention_transfer,
    "sp": ref_sp,
    "pkt": ref_pkt,
    "nst": ref_nst,
}
LOSSES = [
    name
    for name, value in vars(features).items()
    if getattr(value, "__module__", "") == features.__name__ and name[0] != "_"
]


def gradient(name, student, teacher):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(getattr(features, name)(student, teacher), student)[0]


def test_every_loss_has_a_reference():
    assert sorted(REFERENCES) == sorted(LOSSES)
    assert set(LOSSES) <= set(losses.names())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [MAPS, (4, 3, 2, 2, 3)])
def test_is_the_formula_of_its_paper(name, shape):
    student, teacher = draw(shape, shape)
    found = getattr(features, name)(student, teacher)
    assert found.shape == ()
    assert found.item() == pytest.approx(REFERENCES[name](student.numpy(), teacher.numpy()), rel=1e-10)
    widened = getattr(features, name)(student.half(), teacher.half())
    assert widened.dtype == torch.float32
    assert widened.item() == pytest.approx(found.item(), rel=0.05)


@pytest.mark.parametrize("name", LOSSES)
def test_tokens_are_places_and_features_channels(name):
    student, teacher = draw((4, 6, 3), (4, 6, 3))
    found = getattr(features, name)(student, teacher).item()
    # As maps, channels are first. For losses between samples it makes no difference.
    maps = [each.transpose(1, 2).unsqueeze(-1) for each in (student, teacher)]
    assert found == pytest.approx(getattr(features, name)(*maps).item())
    assert found == pytest.approx(REFERENCES[name](*(each.numpy() for each in maps)))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (4, 5, 3)])
def test_gradient_is_the_slope_and_the_teacher_has_none(name, shape):
    student, teacher = (each.requires_grad_() for each in draw(shape, shape))
    assert torch.autograd.gradcheck(lambda values: getattr(features, name)(values, teacher.detach()), student)
    getattr(features, name)(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_is_zero_for_a_student_like_its_teacher(name):
    student, teacher = draw(MAPS, MAPS)
    assert getattr(features, name)(student, teacher) > 0
    assert getattr(features, name)(teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    slope = gradient(name, teacher, teacher)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_order_of_samples_does_not_matter(name):
    student, teacher = draw(MAPS, MAPS)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(
        getattr(features, name)(student[order], teacher[order]), getattr(features, name)(student, teacher)
    )


@pytest.mark.parametrize("name", ["attention_transfer", "sp", "pkt", "nst"])
def test_scale_does_not_matter(name):
    student, teacher = draw(MAPS, MAPS)
    function = getattr(features, name)
    torch.testing.assert_close(function(7 * student, teacher), function(student, 0.2 * teacher))


@pytest.mark.parametrize("name", ["attention_transfer", "nst"])
def test_order_of_channels_does_not_matter(name):
    (teacher,) = draw(MAPS)
    assert getattr(features, name)(teacher[:, [2, 0, 1]], teacher).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["attention_transfer", "sp", "pkt", "nst"])
def test_channels_may_differ_in_number(name):
    student, teacher = draw((4, 2, 2, 5), MAPS)
    assert getattr(features, name)(student, teacher) > 0
    assert gradient(name, student, teacher).norm() > 0


@pytest.mark.parametrize(
    ("ours", "theirs"), [((4, 3, 4, 8), (4, 3, 2, 4)), ((4, 6, 3), (4, 2, 3)), ((4, 3, 4, 4, 4), (4, 3, 2, 4, 1))]
)
@pytest.mark.parametrize("name", ["hint", "attention_transfer", "nst"])
def test_maps_are_pooled_to_the_smaller_size(name, ours, theirs):
    student, teacher = draw(ours, theirs)
    function = getattr(features, name)
    pooled = torch.zeros_like(teacher)
    for place in np.ndindex(*theirs):
        spans = [slice(i * a // b, (i + 1) * a // b) for i, a, b in zip(place, ours, theirs, strict=True)]
        pooled[place] = student[tuple(spans)].mean()
    torch.testing.assert_close(function(student, teacher), function(pooled, teacher))
    torch.testing.assert_close(function(teacher, student), function(teacher, pooled))
    assert function(pooled, student).item() == pytest.approx(0, abs=1e-12)


def test_each_is_pooled_where_it_is_larger():
    student, teacher = torch.ones(2, 3, 8, 2), torch.ones(2, 3, 4, 6)
    assert hint(student, teacher) == 0


def test_hint_maps_the_students_features_by_an_adapter():
    student, teacher = draw((4, 2, 3, 3), (4, 5, 3, 3), dtype=torch.float32)
    layer = nn.Conv2d(2, 5, 1)
    torch.testing.assert_close(hint(student, teacher, layer), nn.functional.mse_loss(layer(student), teacher))
    hint(student, teacher, layer).backward()
    assert layer.weight.grad.norm() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            hint(student.bfloat16(), teacher, layer), hint(student.bfloat16().float(), teacher, layer)
        )
    with pytest.raises(ShapeError, match=r"\(4, 2, 3, 3\).*\(4, 5, 3, 3\) differ in features; give an adapter"):
        hint(student, teacher)


def test_an_adapter_can_reach_the_teacher():
    # The teacher's features are a linear map of the student's, which the adapter must find.
    torch.manual_seed(0)
    student = torch.randn(64, 3)
    teacher = student @ torch.randn(3, 5)
    layer = adapter(student, teacher)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        hint(student, teacher, layer).backward()
        optimizer.step()
    assert hint(student, teacher, layer) < 1e-4


def test_zeros_and_small_batches_give_finite_values_and_slopes():
    zeros, some = torch.zeros(4, 3, 2, 2), torch.ones(4, 3, 2, 2)
    for name in LOSSES:
        for student, teacher in ((zeros, some), (some, zeros), (zeros, zeros), (some[:1], some[1:2]), (some, -some)):
            assert getattr(features, name)(student, teacher).isfinite(), name
            assert gradient(name, student, teacher).isfinite().all(), name


def test_squares_of_large_and_small_activations_stay_in_range():
    (maps,) = draw((4, 3, 2, 2), dtype=torch.float32)
    for name in ("attention_transfer", "nst"):
        for scale in (1e-18, 1e15):
            assert getattr(features, name)(scale * maps, maps).item() == pytest.approx(0, abs=1e-6), name


def test_relations_take_activations_of_any_shape_and_need_samples():
    student, teacher = draw((4, 3), (4, 2, 5, 5))
    assert sp(student, teacher) > 0
    assert pkt(student, teacher) > 0
    for size in (1, 2):
        loss = pkt(student[:size].requires_grad_(), teacher[:size])
        loss.backward()
        assert loss == 0
    assert sp(student[:1], teacher[:1]).item() == pytest.approx(0)


def test_opposite_samples_have_a_finite_divergence():
    student = torch.tensor([[1.0, 0.1], [-1.0, -0.1], [0.3, 1.0]])
    teacher = torch.tensor([[1.0, 0.1], [1.0, 0.2], [0.3, 1.0]])
    assert pkt(student, teacher).isfinite()
    assert gradient("pkt", student, teacher).isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_batches_that_differ_are_refused(name):
    with pytest.raises(ShapeError, match=r"\(4, 3, 2, 2\) and teacher \(5, 3, 2, 2\) do not fit"):
        getattr(features, name)(torch.zeros(4, 3, 2, 2), torch.zeros(5, 3, 2, 2))
    with pytest.raises(ShapeError, match="2 dimensions or more"):
        getattr(features, name)(torch.zeros(4), torch.zeros(4))


@pytest.mark.parametrize("name", ["hint", "attention_transfer", "nst"])
def test_places_of_other_kinds_are_refused(name):
    with pytest.raises(ShapeError, match="one number of dimensions"):
        getattr(features, name)(torch.zeros(4, 3, 2, 2), torch.zeros(4, 3, 2))
    with pytest.raises(ShapeError, match="2 to 5"):
        getattr(features, name)(torch.zeros(2, 2, 2, 2, 2, 2), torch.zeros(2, 2, 2, 2, 2, 2))


@pytest.mark.parametrize("function", [attention_transfer, nst])
def test_vectors_have_no_places(function):
    with pytest.raises(ShapeError, match="have no places"):
        function(torch.zeros(4, 3), torch.zeros(4, 3))
