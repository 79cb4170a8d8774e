"""Loss and metrics of a classification are those of their definitions."""

import pytest
import torch
from torch.utils.data import TensorDataset

from slivo.errors import ShapeError
from slivo.tasks import classification

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
GUESSES = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])


def make(classes="abc"):
    data = TensorDataset(torch.zeros(8, 2), LABELS)
    return classification("toy", data, data, data, classes=classes, example_inputs=(torch.zeros(2, 2),))


def test_metrics_are_those_of_the_definitions_whatever_the_batches():
    task = make()
    logits = torch.nn.functional.one_hot(GUESSES, 3) * 5.0
    metrics = task.metrics()
    for rows in (slice(0, 3), slice(3, 8)):
        task.update(metrics, logits[rows], (None, LABELS[rows]))
    figures = {name: float(value) for name, value in metrics.compute().items()}
    precision = [3 / 3, 1 / 2, 2 / 3]
    recall = [3 / 4, 1 / 2, 2 / 2]
    f1 = [2 * p * r / (p + r) for p, r in zip(precision, recall, strict=True)]
    expected = {"accuracy": 6 / 8, "precision": sum(precision) / 3, "recall": sum(recall) / 3, "f1": sum(f1) / 3}
    assert figures == pytest.approx(expected)
    assert task.primary in figures
    assert float(task.metrics()["accuracy"].tp.sum()) == 0  # fresh each time


def test_loss_is_the_mean_negative_log_likelihood():
    task = make()
    logits = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = -logits.log_softmax(1)[torch.arange(8), LABELS].mean()
    assert torch.allclose(task.loss(logits, (None, LABELS)), expected)


def test_a_classification_needs_two_classes():
    with pytest.raises(ShapeError, match="task 'toy' has 1 classes"):
        make("a")
