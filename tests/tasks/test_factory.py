"""Tasks by name: what is wrong with a name is said together with what there is."""

import pytest
import torch
from torch.utils.data import TensorDataset

from slivo.errors import RecipeError
from slivo.tasks import Task, classification, kinds, make


def mine(*, rows=4, kind="image-classification"):
    data = TensorDataset(torch.zeros(rows, 2), torch.zeros(rows, dtype=torch.long))
    return classification("mine", data, data, data, classes="ab", example_inputs=(torch.zeros(2, 2),), kind=kind)


def other():
    return mine(kind="x")


def nothing():
    return 3


number = 3


@pytest.mark.parametrize(("kind", "data"), [(kind, data) for kind, names in kinds().items() for data in names])
def test_all_that_ship_can_be_made(kind, data):
    task = make(kind, data)
    assert isinstance(task, Task)
    assert (task.kind, task.name) == (kind, data)
    batch = task.example_inputs[0]
    assert len(batch) == 2


def test_options_reach_the_task_and_anybodys_data_can_be_named():
    assert type(make("image-classification", "digits", augment=True).train).__name__ == "Shifted"
    assert len(make("image-classification", "tasks.test_factory:mine", rows=7).train) == 7


@pytest.mark.parametrize(
    ("kind", "data", "options", "words"),
    [
        ("image", "digits", {}, "task.kind is 'image'; allowed: image-classification"),
        ("image-classification", "digit", {}, "task.data is 'digit'; .* there is: digits, or give"),
        ("image-classification", "digits", {"augmented": True}, "unexpected keyword .*'augmented'.*; allowed: augment"),
        ("image-classification", "no.such:thing", {}, "'no.such:thing' cannot be imported: No module"),
        ("image-classification", "slivo.tasks:thing", {}, "cannot be imported: .*no attribute 'thing'"),
        ("image-classification", ":thing", {}, "cannot be imported"),
        ("image-classification", "tasks.test_factory:number", {}, "is not callable"),
        ("image-classification", "tasks.test_factory:nothing", {}, "returned int, not a slivo.tasks.Task"),
        ("image-classification", "tasks.test_factory:nothing", {"a": 1}, "allowed: none"),
        ("image-classification", "tasks.test_factory:other", {}, "makes a task of kind 'x'"),
    ],
)
def test_mistakes_are_named(kind, data, options, words):
    with pytest.raises(RecipeError, match=words):
        make(kind, data, **options)
