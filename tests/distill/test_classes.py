"""Which classes student and teacher share."""

import pytest
import torch

from slivo.distill import ClassMap
from slivo.distill.logits import kd
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
    assert ClassMap([1, 0]) == ClassMap((1, 0))


def test_labels_become_positions_among_the_shared():
    shared = ClassMap((5, None, 0, 2))
    labels = torch.tensor([[0, 1, 2], [3, -1, -100]])
    assert shared.labels(labels).tolist() == [[0, -1, 1], [2, -1, -1]]
    for dtype in (torch.uint8, torch.int32):
        assert shared.labels(torch.tensor([3, 0], dtype=dtype)).tolist() == [2, 0]


@pytest.mark.parametrize(
    "wrong", [(), (0,), (None, None, 1), (0, 0), (0, -1), (0, True), (0, 1.0), (0, "dog"), (None, None)]
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


def test_logits_and_labels_of_other_classes_are_refused():
    shared = ClassMap((3, 0))
    with pytest.raises(ShapeError, match=r"2 classes of the student and 4 or more.*\(5, 3\) and \(5, 4\)"):
        shared.logits(torch.zeros(5, 3), torch.zeros(5, 4))
    with pytest.raises(ShapeError, match="4 or more"):
        shared.logits(torch.zeros(5, 2), torch.zeros(5, 3))
    for labels in (torch.tensor([2]), torch.tensor([0.5])):
        with pytest.raises(ShapeError, match="integers below 2"):
            shared.labels(labels)
