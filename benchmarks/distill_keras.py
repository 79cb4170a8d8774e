"""Do two small Keras networks distil? One with three convolutions teaches one with two, on digits and on clothes.

Usage: KERAS_BACKEND=torch python benchmarks/distill_keras.py --data DIR [--sets mnist fashion] [--train 500]
[--epochs 20] [--teacher-train 6000] [--teacher-epochs 2] [--seeds 0 1 2] [--json FILE]

DIR holds ``mnist.npz`` and ``fashion_mnist_train20k_test10k.npz``. Both networks are written in Keras 3 and run by its
PyTorch backend, as modules of PyTorch like any other; they see images as Keras wants them, channels last. The teacher
has three times convolution and pooling, and dense layers of 32, 64 and 128; the student two, and 16 and 32. The teacher
has learned from more images than the student has. Each way trains the same student with the same images in the same
order and by the same optimizer; accuracy is that after the last epoch, on all test images: medians over the seeds, each
of which has a teacher of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

import slivo
from slivo import losses
from slivo.distill import Term
from slivo.measure import quality
from slivo.tasks import Task, classification, forward, loader
from slivo.train import OptimizerSpec, fit

SETS = {"mnist": "mnist.npz", "fashion": "fashion_mnist_train20k_test10k.npz"}
BATCH = 32
SPEC = OptimizerSpec(kind="adamw", lr=0.002)
HELD_OUT = 1000
"""Training images that nothing is learned from; slivo judges the teacher by them."""

At = tuple[str, str]

LAST = ("dense_1", "dense_2")
"""The last hidden layers of student and teacher. Losses on maps want channels first, which Keras has last."""

METHODS: Mapping[str, Callable[[At], Sequence[Term]]] = {
    "kd": lambda _: [losses.kd(weight=0.9)],
    "kd, hint": lambda at: [losses.kd(weight=0.9), losses.hint(at=at)],
}
"""Terms by name of the method, from the place of activations."""

Make = Callable[[], nn.Module]
Row = dict[str, Any]


def networks() -> tuple[Make, Make]:
    """Return what makes the teacher, and what makes the student."""
    from networks import keras as ours

    ours.networks()  # sets the backend, before Keras is imported, or says that it is another
    return (lambda: cnn((16, 32, 48), (32, 64, 128))), (lambda: cnn((16, 32), (16, 32)))


def cnn(widths: Sequence[int], dense: Sequence[int]) -> nn.Module:
    """Convolution and pooling, as often as there are widths, dense layers, and ten logits."""
    import keras
    from keras import layers

    keras.utils.clear_session()
    keras.utils.set_random_seed(torch.initial_seed() % 2**32)  # Keras draws first weights by a generator of its own
    stack: list[Any] = [keras.Input((28, 28, 1))]
    for width in widths:
        stack += [layers.Conv2D(width, 3, padding="same", activation="relu"), layers.MaxPooling2D()]
    stack += [layers.Flatten(), *(layers.Dense(width, activation="relu") for width in dense), layers.Dense(10)]
    # A model that Keras puts together keeps its layers in a list of its own, of which PyTorch, and with it a loss on
    # activations, knows nothing. The same layers in a Sequential of PyTorch are modules with names.
    return nn.Sequential(OrderedDict((layer.name, layer) for layer in keras.Sequential(stack).layers))


def read(folder: Path, name: str, train: int) -> Task:
    """Return the task: the first training images to learn from, the last to judge by, and all test images."""
    with np.load(folder / SETS[name], allow_pickle=False) as arrays:
        images, labels, test_images, test_labels = (
            arrays[key] for key in ("train_images", "train_labels", "test_images", "test_labels")
        )
    if not 0 < train <= len(images) - HELD_OUT:
        raise SystemExit(f"{train} images to train on were asked for; 1 to {len(images) - HELD_OUT} of {name}")
    parts = [
        tensors(images[:train], labels[:train]),
        tensors(images[-HELD_OUT:], labels[-HELD_OUT:]),
        tensors(test_images, test_labels),
    ]
    return classification(name, *parts, classes="0123456789", example_inputs=(parts[0].tensors[0][:2],))


def tensors(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> TensorDataset:
    """Return images of shape (samples, 28, 28, 1), from 0 to 1, and labels."""
    return TensorDataset(torch.from_numpy(images).float()[..., None] / 255, torch.from_numpy(labels).long())


def trained(model: nn.Module, task: Task, epochs: int, seed: int) -> nn.Module:
    """Train in place by labels alone."""
    fit(
        model,
        loader(task, "train", batch_size=BATCH, seed=seed),
        lambda net, batch: {"labels": task.loss(forward(task, net, batch), batch)},
        epochs=epochs,
        optimizer=SPEC,
        seed=seed,
    )
    return model


def compare(
    tasks: tuple[Task, Task], makes: tuple[Make, Make], *, epochs: tuple[int, int], seed: int, at: At
) -> list[Row]:
    """Train a teacher, and the same student in each way; return a row for each network.

    Args:
        tasks: What the teacher learns from, and what the student does.
        makes: What makes the teacher, and what makes the student.
        epochs: Of the teacher, and of the student.
        seed: Of first weights and orders.
        at: Where losses on activations look, in the student and in the teacher.
    """
    task = tasks[1]
    rows: list[Row] = []

    def add(name: str, model: nn.Module, began: float) -> None:
        said = {"data": task.name, "seed": seed, "method": name}
        params = sum(each.numel() for each in model.parameters() if each.requires_grad)
        accuracy = quality(model, task, "test")["accuracy"]
        rows.append({**said, "params": params, "accuracy": accuracy, "seconds": time.process_time() - began})
        print(f"{task.name}, seed {seed}, {name}: {accuracy:.2%}", flush=True)

    began = time.process_time()
    torch.manual_seed(seed)
    teacher = trained(makes[0](), tasks[0], epochs[0], seed)
    add("teacher", teacher, began)
    torch.manual_seed(1000 + seed)
    student = makes[1]()
    for name, terms in METHODS.items():
        began = time.process_time()
        taught = slivo.distill(
            student, teacher, task, terms(at), epochs=epochs[1], batch_size=BATCH, optimizer=SPEC, seed=seed
        )
        add(name, taught.model, began)
    began = time.process_time()
    add("scratch", trained(student, task, epochs[1], seed), began)  # at last: it is trained in place
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return medians over seeds, and the least and the most, by data and method."""
    lines = ["| data | network | parameters | test accuracy, median | least to most | processor, s |", "|---" * 6 + "|"]
    for data in dict.fromkeys(row["data"] for row in rows):
        for method in ("teacher", "scratch", *METHODS):
            found = [row for row in rows if (row["data"], row["method"]) == (data, method)]
            scores, seconds = ([row[key] for row in found] for key in ("accuracy", "seconds"))
            name = "teacher" if method == "teacher" else f"student, {method.replace('scratch', 'labels alone')}"
            span = f"{min(scores):.2%} to {max(scores):.2%}"
            lines.append(
                f"| {data} | {name} | {found[0]['params']:,} | {median(scores):.2%} | {span} | {median(seconds):.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--train", type=int, default=500, help="images that students learn from")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--teacher-train", type=int, default=6000, help="images that teachers learn from")
    parser.add_argument("--teacher-epochs", type=int, default=2)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    made = networks()
    rows: list[Row] = []
    for name in options.sets:
        tasks = read(options.data, name, options.teacher_train), read(options.data, name, options.train)
        for seed in options.seeds:
            rows += compare(tasks, made, epochs=(options.teacher_epochs, options.epochs), seed=seed, at=LAST)
    about = (
        f"teachers {options.teacher_train} images, {options.teacher_epochs} epochs; students {options.train}, "
        f"{options.epochs}; seeds {options.seeds}"
    )
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{about}; {machine}, torch {torch.__version__}")
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
