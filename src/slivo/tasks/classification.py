"""Classification: one label a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from slivo.errors import ShapeError
from slivo.tasks.base import Batch, Task

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


def classification(
    name: str,
    train: Dataset[Any],
    val: Dataset[Any],
    test: Dataset[Any],
    *,
    classes: Iterable[str],
    example_inputs: tuple[Any, ...],
    kind: str = "image-classification",
    collate: Callable[[list[Any]], Batch] | None = None,
) -> Task:
    """Return a classification task on anybody's data: samples are ``(input, label)``, outputs are logits.

    The loss is cross-entropy. The metrics are accuracy (share of samples that are right) and precision, recall and
    F1, each the mean over classes.

    Args:
        name: Name of the data.
        train: Data to learn from; labels are integers from 0.
        val: Data to decide by.
        test: Data to report on.
        classes: Names of the classes, in the order of the labels.
        example_inputs: The model's positional arguments for a batch of two.
        kind: Kind of task.
        collate: Makes a batch ``(inputs, labels)`` of a list of samples; PyTorch's own if None.

    Returns:
        The task.

    Raises:
        ShapeError: If there are fewer than two classes.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.eye(3), torch.arange(3))
        >>> task = classification("eye", data, data, data, classes="abc", example_inputs=(torch.eye(3)[:2],))
        >>> task.primary, task.classes
        ('accuracy', ('a', 'b', 'c'))
    """
    names = tuple(classes)
    if len(names) < 2:
        raise ShapeError(f"task {name!r} has {len(names)} classes; a classification needs two or more")
    return Task(
        kind=kind,
        name=name,
        train=train,
        val=val,
        test=test,
        inputs=_inputs,
        loss=_loss,
        metrics=lambda: _metrics(len(names)),
        update=_update,
        primary="accuracy",
        classes=names,
        example_inputs=example_inputs,
        collate=collate,
    )


def _inputs(batch: Batch) -> tuple[Any, ...]:
    return (batch[0],)


def _loss(output: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(output, batch[1])


def _metrics(classes: int) -> MetricCollection:
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision, MulticlassRecall

    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "precision": MulticlassPrecision(classes, average="macro"),
            "recall": MulticlassRecall(classes, average="macro"),
            "f1": MulticlassF1Score(classes, average="macro"),
        }
    )


def _update(metrics: MetricCollection, output: Tensor, batch: Batch) -> None:
    # The metrics may have stayed on the CPU while the model runs elsewhere.
    device = next(iter(metrics.values())).device
    metrics.update(output.detach().argmax(-1).to(device), batch[1].to(device))
