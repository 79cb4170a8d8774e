"""Quality is what the task's metrics say of all samples, however they are batched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

from slivo.errors import ShapeError, SlivoError
from slivo.measure import agreement, confusion, predictions, quality


def metrics():
    return MetricCollection(
        {"accuracy": MulticlassAccuracy(3, average="micro"), "f1": MulticlassF1Score(3, average="macro")}
    )


def data(samples, seed):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(samples, 4, generator=generator), torch.randint(3, (samples,), generator=generator)
    )


@dataclass(frozen=True)
class Classification:
    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]
    inputs: Callable[[Any], tuple[Any, ...]]
    metrics: Callable[[], Any]
    update: Callable[[Any, Any, Any], None]
    collate: Callable[[list[Any]], Any] | None = None


def make():
    return Classification(
        train=data(20, 1),
        val=data(10, 2),
        test=data(25, 3),
        inputs=lambda batch: (batch[0],),
        metrics=metrics,
        update=lambda collection, output, batch: collection.update(output, batch[1]),
    )


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_metrics_do_not_depend_on_batches(split):
    task, net = make(), model()
    features, labels = getattr(task, split).tensors
    right = net[0](features).argmax(1) == labels
    for size in (1, 7, 256):
        found = quality(net, task, split, batch_size=size)
        assert found.keys() == {"accuracy", "f1"}
        assert found["accuracy"] == pytest.approx(float(right.double().mean()), abs=1e-6)
    assert net.training


def test_predictions_confusion_and_agreement():
    task, net = make(), model()
    predicted, labels = predictions(net, task, batch_size=7)
    assert torch.equal(labels, task.test.tensors[1])
    assert torch.equal(predicted, net[0](task.test.tensors[0]).argmax(1))
    table = MulticlassConfusionMatrix(3)(predicted, labels)
    assert confusion(predicted, labels, 3) == table.tolist()
    assert agreement(predicted, labels) == pytest.approx(quality(net, task)["accuracy"])
    assert agreement(predicted, predicted) == 1
    with pytest.raises(ShapeError, match="25 and 3 samples"):
        agreement(predicted, predicted[:3])


def test_one_metric_alone_and_a_collate_of_the_tasks_own():
    def collate(samples):
        return {"x": torch.stack([x for x, _ in samples]), "y": torch.stack([y for _, y in samples])}

    task = replace(
        make(),
        collate=collate,
        inputs=lambda batch: (batch["x"],),
        update=lambda metric, output, batch: metric.update(output, batch["y"]),
        metrics=lambda: MulticlassAccuracy(3, average="micro"),
    )
    assert quality(model(), task) == {"multiclassaccuracy": quality(model(), make())["accuracy"]}


def test_mistakes_are_explained():
    with pytest.raises(SlivoError, match="no samples in its val split"):
        quality(model(), replace(make(), val=data(0, 0)), "val")
    table = MetricCollection({"table": MulticlassConfusionMatrix(3)})
    with pytest.raises(SlivoError, match=r"metric 'table' is a tensor of \[3, 3\]"):
        quality(model(), replace(make(), metrics=lambda: table))
