"""Which classes student and teacher share."""

import math

import numpy as np
import pytest
import torch

from slivo.distill import ClassMap
from slivo.distill.logits import dkd, kd, mse
from slivo.errors import ShapeError


def test_both_are_compared_on_the_classes_they_share():
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 6)
    ours, theirs = ClassMap((5, None, 0, 2)).logits(student, teacher)
    assert torch.equal(ours, student[..., [0, 2, 3]])
    assert torch.equal(theirs, teacher[..., [5, 0, 2]])
    # Probabilities are those of the shared classes alone, whatever the teacher says of the others.
    wild = teacher.clone()
    wild[..., [1, 3, 4]] += 50
    assert kd(*ClassMap((5, None, 0, 2)).logits(student, wild)) == kd(ours, theirs)


def test_another_order_is_put_right():
    teacher = torch.randn(4, 3)
    student = teacher[:, [2, 0, 1]]
    assert kd(*ClassMap((2, 0, 1)).logits(student, teacher)).item() == pytest.approx(0, abs=1e-6)
    assert kd(student, teacher) > 0.01


def test_names_make_the_same_map_as_indices():
    assert ClassMap.by_name(["cat", "dog", "owl"], ["dog", "eel", "cat"]) == ClassMap((2, 0, None))
    assert ClassMap([1, [0, 2]]) == ClassMap((1, (0, 2)))
    merged = {"pet": ["dog", "cat"]}
    assert ClassMap.by_name(["pet", "owl"], ["cat", "dog", "owl"], merged=merged) == ClassMap(((1, 0), 2))
    kept = ClassMap.by_name(["cat", "owl"], ["cat", "dog"], unmapped="other")
    assert kept == ClassMap((0, None), "other")


def test_labels_become_positions_among_the_shared():
    shared = ClassMap((5, None, 0, 2))
    labels = torch.tensor([[0, 1, 2], [3, -1, -100]])
    assert shared.labels(labels).tolist() == [[0, -1, 1], [2, -1, -1]]
    for dtype in (torch.uint8, torch.int32):
        assert shared.labels(torch.tensor([3, 0], dtype=dtype)).tolist() == [2, 0]


@pytest.mark.parametrize(
    "wrong",
    [
        (),
        (0,),
        (None, None, 1),
        (0, 0),
        (0, -1),
        (0, True),
        (0, 1.0),
        (0, "dog"),
        (None, None),
        (0, ()),
        ((0, 1), 1),
        ((0, 0), 1),
        ((0, None), 1),
        ((0, 1), None),
    ],
)
def test_maps_that_are_none_are_refused(wrong):
    with pytest.raises(ShapeError, match="two or more different classes of the teacher"):
        ClassMap(wrong)


def test_names_that_are_not_unique_or_not_shared_are_refused():
    with pytest.raises(ShapeError, match="teacher has two classes named 'cat'"):
        ClassMap.by_name(["cat", "dog"], ["dog", "cat", "cat"])
    with pytest.raises(ShapeError, match="student has two classes named 'dog'"):
        ClassMap.by_name(["dog", "dog"], ["dog", "cat"])
    with pytest.raises(ShapeError, match="two or more"):
        ClassMap.by_name(["cat", "dog"], ["cat", "eel"])
    with pytest.raises(ShapeError, match="merged names 'pet', which is no class of the student"):
        ClassMap.by_name(["cat", "dog"], ["cat", "dog"], merged={"pet": ["cat"]})
    with pytest.raises(ShapeError, match="merged names 'eel', which is no class of the teacher"):
        ClassMap.by_name(["pet", "dog"], ["cat", "dog"], merged={"pet": ["cat", "eel"]})


def test_logits_and_labels_of_other_classes_are_refused():
    shared = ClassMap((3, 0))
    with pytest.raises(ShapeError, match=r"2 classes of the student and 4 or more.*\(5, 3\) and \(5, 4\)"):
        shared.logits(torch.zeros(5, 3), torch.zeros(5, 4))
    with pytest.raises(ShapeError, match="4 or more"):
        shared.logits(torch.zeros(5, 2), torch.zeros(5, 3))
    for labels in (torch.tensor([2]), torch.tensor([0.5])):
        with pytest.raises(ShapeError, match="integers below 2"):
            shared.labels(labels)


def softmax(row):
    powers = np.exp(row)
    return powers / powers.sum()


def reference(student, teacher, groups, others):
    """Divergence of sums of probabilities, where ``others`` are the student's own and the teacher's own, or None."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        q, p = softmax(s), softmax(t)
        p_sums = [sum(p[index] for index in theirs) for _, theirs in groups]
        q_sums = [q[ours] for ours, _ in groups]
        if others:
            q_sums, p_sums = [*q_sums, sum(q[others[0]])], [*p_sums, sum(p[others[1]])]
        p_sums, q_sums = np.array(p_sums) / sum(p_sums), np.array(q_sums) / sum(q_sums)
        total += (p_sums * np.log(p_sums / q_sums)).sum()
    return total / len(student)


@pytest.mark.parametrize(
    ("shared", "groups", "others"),
    [
        (ClassMap(((0, 3), 4, (1, 5), 2)), [(0, [0, 3]), (1, [4]), (2, [1, 5]), (3, [2])], None),
        (ClassMap((5, None, (0, 3), None)), [(0, [5]), (2, [0, 3])], None),
        (ClassMap((5, None, (0, 3), None), "other"), [(0, [5]), (2, [0, 3])], ([1, 3], [1, 2, 4])),
        (ClassMap((None, 2, None, None), "other"), [(1, [2])], ([0, 2, 3], [0, 1, 3, 4, 5])),
    ],
)
def test_probabilities_of_merged_and_of_other_classes_are_sums(shared, groups, others):
    student, teacher = (torch.randn(7, count, dtype=torch.float64).requires_grad_() for count in (4, 6))
    found = kd(*shared.logits(student, teacher), temperature=1.0)
    arrays = (each.detach().numpy() for each in (student, teacher))
    assert found.item() == pytest.approx(reference(*arrays, groups, others), rel=1e-10)
    assert torch.autograd.gradcheck(lambda values: kd(*shared.logits(values, teacher.detach())), student)
    if others:
        ours, theirs = shared.logits(student, teacher)
        # Nothing is lost: what is compared is all of the probability.
        for merged, whole in ((ours, student), (theirs, teacher)):
            torch.testing.assert_close(merged.logsumexp(-1), whole.logsumexp(-1))


def test_mass_on_what_is_not_shared_counts_only_as_other():
    student, teacher = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    assert kd(*ClassMap((0, 1, None)).logits(student, teacher)) == 0
    assert kd(*ClassMap((0, 1, None), "other").logits(student, teacher), temperature=1.0) > 0.9
    sure = torch.tensor([[0.0, 0.0, 10.0 + math.log(2)]])
    assert kd(*ClassMap((0, 1, None), "other").logits(sure, teacher)).item() == pytest.approx(0, abs=1e-6)


def test_merged_logits_stay_in_range():
    shared = ClassMap(((0, 1), (2, 3), None), "other")
    for size in (1e4, -1e4, 0.0):
        for dtype in (torch.float16, torch.float32):
            student = torch.full((2, 3), -size).to(dtype).requires_grad_()
            teacher = torch.full((2, 6), size).to(dtype)
            ours, theirs = shared.logits(student, teacher)
            assert theirs.dtype == torch.float32
            torch.testing.assert_close(theirs[0, 0], torch.tensor(size).to(dtype).float() + math.log(2))
            value = mse(ours, theirs)
            assert value.isfinite()
            assert torch.autograd.grad(value, student)[0].isfinite().all()


def test_classes_that_are_masked_add_nothing_and_have_no_gradient():
    shared, low = ClassMap((0, 1, None, None), "other"), -math.inf
    student = torch.tensor([[1.0, 2.0, low, low], [1.0, 2.0, 3.0, low]]).requires_grad_()
    teacher = torch.tensor([[1.0, 2.0, 3.0, low], [2.0, 1.0, low, 3.0]])
    ours, theirs = shared.logits(student, teacher)
    assert ours[:, 2].tolist() == [low, 3.0]
    assert theirs[:, 2].tolist() == [3.0, 3.0]
    value = kd(ours, theirs)
    assert value.isfinite()
    (slope,) = torch.autograd.grad(value, student)
    assert slope.isfinite().all()
    assert slope[0].norm() == 0


def test_labels_of_what_the_teacher_does_not_know_are_other():
    shared = ClassMap((5, None, (0, 1), None), "other")
    assert shared.labels(torch.tensor([0, 1, 2, 3, -100])).tolist() == [0, 2, 1, 2, -1]
    assert ClassMap((5, None, (0, 1), None)).labels(torch.tensor([0, 1, 2, 3])).tolist() == [0, -1, 1, -1]
    student, teacher = torch.randn(4, 4), torch.randn(4, 6)
    assert dkd(*shared.logits(student, teacher), shared.labels(torch.tensor([0, 1, 2, 3]))).isfinite()


def test_others_need_classes_on_both_sides():
    with pytest.raises(ShapeError, match="leaves the student no class that could stand for others; use 'left out'"):
        ClassMap((0, 1), "other")
    with pytest.raises(ShapeError, match="has all 2 classes of the teacher; use 'left out'"):
        ClassMap((0, 1, None), "other").logits(torch.zeros(1, 3), torch.zeros(1, 2))
    with pytest.raises(ShapeError, match="must give one or more different classes"):
        ClassMap((None, None), "other")
    with pytest.raises(ShapeError, match="unmapped is 'lost'; it must be 'left out' or 'other'"):
        ClassMap((0, 1, None), "lost")
