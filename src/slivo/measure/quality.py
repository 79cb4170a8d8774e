"""Quality: a task's metrics of a model on data it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from slivo.errors import ShapeError, SlivoError
from slivo.graph.capture import evaluating

Split = Literal["train", "val", "test"]


class Evaluated(Protocol):
    """What is used of a task here."""

    @property
    def train(self) -> Dataset[Any]:
        """Samples to learn from."""

    @property
    def val(self) -> Dataset[Any]:
        """Samples to decide by."""

    @property
    def test(self) -> Dataset[Any]:
        """Samples to report on."""

    @property
    def collate(self) -> Callable[[list[Any]], Any] | None:
        """Makes a batch of samples; None for PyTorch's default."""

    @property
    def inputs(self) -> Callable[[Any], tuple[Any, ...]]:
        """Takes the model's arguments out of a batch."""

    @property
    def metrics(self) -> Callable[[], Any]:
        """Makes fresh torchmetrics."""

    @property
    def update(self) -> Callable[[Any, Any, Any], None]:
        """Feeds metrics with an output and its batch."""


def quality(model: nn.Module, task: Evaluated, split: Split = "test", *, batch_size: int = 256) -> dict[str, float]:
    """Return the task's metrics of a model.

    Args:
        model: Run in evaluation mode on the device it is on; left as it was.
        task: Says what the data is and what is measured.
        split: Which of its data.
        batch_size: Samples run at once; does not change the result beyond rounding.

    Returns:
        A number for each metric, by its name in the task's collection.

    Raises:
        SlivoError: If the split has no samples, or a metric is not one number.
    """
    metrics = task.metrics()
    for output, batch in _outputs(model, task, split, batch_size):
        task.update(metrics, pytree.tree_map_only(Tensor, Tensor.cpu, output), batch)
    values = metrics.compute()
    if not isinstance(values, dict):
        values = {type(metrics).__name__.lower(): values}
    for name, value in values.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise SlivoError(f"metric {name!r} is a tensor of {list(value.shape)}; a metric must be one number")
    return {name: float(value) for name, value in values.items()}


def predictions(
    model: nn.Module, task: Evaluated, split: Split = "test", *, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Return the classes that a classifier predicts, and the true ones.

    Args:
        model: As in `quality`; its output is logits of shape (batch, classes).
        task: A classification whose batches are ``(inputs, labels)``.
        split: Which of its data.
        batch_size: Samples run at once.

    Returns:
        Predicted and true classes, int64, shape (samples,) each, in the data's order.
    """
    pairs = [(output.argmax(1).cpu(), batch[1]) for output, batch in _outputs(model, task, split, batch_size)]
    predicted, labels = zip(*pairs, strict=True)
    return torch.cat(predicted), torch.cat(labels).to(torch.int64)


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> list[list[int]]:
    """Count samples by true class (row) and predicted class (column).

    Example:
        >>> confusion(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2)
        [[1, 1], [0, 1]]
    """
    counts = torch.bincount(labels * classes + predicted, minlength=classes * classes)
    table: list[list[int]] = counts.reshape(classes, classes).tolist()
    return table


def agreement(first: Tensor, second: Tensor) -> float:
    """Return the share of samples, 0-1, on which two models predict the same class.

    Raises:
        ShapeError: If they were not asked about the same number of samples.
    """
    if first.shape != second.shape:
        raise ShapeError(f"predictions for {len(first)} and {len(second)} samples cannot be compared; use one split")
    return float((first == second).double().mean())


def _outputs(model: nn.Module, task: Evaluated, split: Split, batch_size: int) -> Iterator[tuple[Any, Any]]:
    """Run the model over a split; yields its outputs with the batches, in order."""
    data: Any = getattr(task, split)
    if not len(data):
        raise SlivoError(f"the task has no samples in its {split} split; give one that has")
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with evaluating(model), torch.inference_mode():
        for batch in DataLoader(data, batch_size, collate_fn=task.collate):
            inputs = pytree.tree_map_only(Tensor, lambda x: x.to(device), task.inputs(batch))
            yield model(*inputs), batch


def distribution(output: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return logarithms of the classes' chances, classes last; of the first output that depends on the weights."""

    def learned(logits: Tensor) -> bool:
        return logits.requires_grad or not torch.is_grad_enabled()

    for logits in pytree.tree_leaves(output):
        if isinstance(logits, Tensor) and logits.is_floating_point() and logits.dim() > 1 and learned(logits):
            return (logits.movedim(1, -1) if logits.dim() > 3 else logits).to(dtype).log_softmax(-1)
    raise SlivoError("the model gives out no logits, shape (samples, …, classes); choose a criterion of the gradient")
