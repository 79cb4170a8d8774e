"""How small does a network become that is pruned, shares its values, and is coded? LeNet-300-100 and LeNet-5 on MNIST.

Usage: python benchmarks/deep_compression.py --data DIR [--network ...] [--seeds 0 1 2] [--checkpoint DIR] [--json FILE]

DIR holds ``mnist.npz``. Each network is trained; made sparse while the dense one teaches it; its weights and biases are
clustered, and their values trained; then it is packed into one file, of which every byte counts. Errors are those of
the last epoch on the 10,000 test images. ``--held-out 5000`` leaves as many training images out and measures on them,
to choose options by. A run that was broken off goes on from ``--checkpoint``.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import slivo
from slivo.distill import distillation
from slivo.prune import GradualSparsity, sparsity
from slivo.share import TrainValues, share
from slivo.train import OptimizerSpec, fit

BATCH = 128
Images = tuple[Tensor, Tensor]
Row = dict[str, Any]

PUBLISHED = {
    "lenet-300-100": "Deep Compression 40 x at 1.58 %, soft weight sharing 64 x at 1.94 %",
    "lenet-5": "Deep Compression 39 x at 0.74 %, soft weight sharing 162 x at 0.97 %",
}
"""Ratios and test errors of the papers (arXiv:1510.00149, arXiv:1702.04008)."""


def lenet_300_100() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def lenet_5() -> nn.Module:
    """Caffe's: 430,500 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A network, and how it is compressed.

    Attributes:
        make: Makes it, untrained.
        sparsity: Share of the weights that become zero.
        clusters: Values of each weight and bias, by glob.
        bar: Least ratio, and greatest test error.
        shift: Pixels by which training images are moved at most.
    """

    make: Any
    sparsity: float
    clusters: Mapping[str, int]
    bar: tuple[float, float]
    shift: int = 2


NETWORKS = {
    "lenet-300-100": Network(lenet_300_100, 0.945, {"*.bias": 8, "*": 8}, (70, 0.016)),
    "lenet-5": Network(lenet_5, 0.99, {"*.bias": 8, "*": 8}, (200, 0.009)),
}


class Moved(Dataset[Images]):
    """Images moved at random, a batch at once."""

    def __init__(self, images: Images, shift: int) -> None:
        self.pixels, self.labels, self.shift = nn.functional.pad(images[0], (shift,) * 4), images[1], shift

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, chosen: list[int]) -> Images:
        index, count = torch.tensor(chosen), len(chosen)
        rows, columns = (torch.randint(2 * self.shift + 1, (count, 1)) + torch.arange(28) for _ in range(2))
        x = self.pixels[index[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]
        return normalize(x), self.labels[index]


def normalize(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - 0.1307) / 0.3081


def batches(images: Images, shift: int) -> DataLoader[Images]:
    return DataLoader(
        Moved(images, shift),
        batch_size=BATCH,
        shuffle=True,
        generator=torch.Generator(),
        collate_fn=lambda batch: batch,
    )


def read(folder: Path, split: str) -> Images:
    with np.load(folder / "mnist.npz") as file:
        images, labels = file[f"{split}_images"], file[f"{split}_labels"].astype(np.int64)
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels)


@torch.no_grad()
def error(model: nn.Module, images: Images) -> float:
    """Return the share of images that are taken for something else."""
    model.eval()
    parts = zip(*(each.split(1000) for each in images), strict=True)
    return sum(int((model(normalize(x)).argmax(1) != y).sum()) for x, y in parts) / len(images[1])


def forward(model: nn.Module, batch: Images) -> Tensor:
    return model(batch[0])


def loss(output: Tensor, batch: Images) -> Tensor:
    return nn.functional.cross_entropy(output, batch[1])


def labels(model: nn.Module, batch: Images) -> dict[str, Tensor]:
    return {"labels": loss(model(batch[0]), batch)}


def adam(lr: float) -> OptimizerSpec:
    return OptimizerSpec("adamw", lr=lr, weight_decay=0.0)


def compress(name: str, seed: int, train: Images, test: Images, options: argparse.Namespace) -> Row:
    """Train a network, compress it, and say what each step came to; from its file if it is there."""
    network, folder = NETWORKS[name], options.checkpoint and options.checkpoint / f"{name}-{seed}"
    file = folder and folder / "row.json"
    if file is not None and file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    dense = network.make()
    loader = batches(train, network.shift)

    def tuned(model: nn.Module, step: str, objective: Any, epochs: int, lr: float, hooks: Sequence[Any] = ()) -> None:
        fit(
            model, loader, objective, epochs=epochs, optimizer=adam(lr), seed=seed, hooks=hooks, precision="fp32",
            checkpoint=folder and folder / f"{step}.ckpt",
        )  # fmt: skip
        row[f"error, {step}"] = error(model, test)
        print(f"  {name}, seed {seed}, {step}: {row[f'error, {step}']:.2%}", flush=True)

    row: Row = {"network": name, "seed": seed}
    tuned(dense, "dense", labels, options.dense_epochs, 2e-3)
    terms = [slivo.losses.kd(temperature=2.0, weight=0.7)]
    taught = distillation(copy.deepcopy(dense), forward, loss, terms, label_weight=0.3)
    model = copy.deepcopy(dense)
    share_of_zeros = network.sparsity if options.sparsity is None else options.sparsity
    gradual = GradualSparsity(share_of_zeros, criterion=options.criterion, updates=200, min_keep=0.0)
    tuned(model, "sparse", taught, options.epochs, 2e-3, [gradual])
    row["sparsity"] = sparsity(model)
    clusters = dict(network.clusters) if options.clusters is None else {"*": options.clusters}
    sample = normalize(train[0][:4096]).split(64), train[1][:4096].split(64)
    model = share(
        model, clusters, vectors=True, batches=list(zip(*sample, strict=True)),
        loss=lambda model, batch: loss(model(batch[0]), batch),
    )  # fmt: skip
    row["error, clustered"] = error(model, test)
    tuned(model, "shared", taught, options.share_epochs, 5e-4, [TrainValues("mean")])
    with tempfile.TemporaryDirectory() as place:
        packed = slivo.pack(model, (folder or Path(place)) / "small.slivo")
        again = slivo.load(packed.path, factory=network.make)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
    row["tensors"] = [{**asdict(each), "shape": list(each.shape)} for each in packed.tensors]
    row |= {"bytes": packed.bytes, "error": error(again, test)}
    row["ratio"] = 4 * sum(each.numel() for each in dense.parameters()) / packed.bytes
    print(f"  {name}, seed {seed}: {row['bytes']:,} bytes, {row['ratio']:.0f} x, {row['error']:.2%}", flush=True)
    if file is not None:
        file.write_text(json.dumps(row, default=str), encoding="utf-8")
    return row


def table(rows: Sequence[Row]) -> str:
    """Return medians over seeds of each network, whether they meet the bar, and what the papers say."""
    lines = ["| network | file, bytes | times smaller | test error | dense | zeros | bar |", "|---" * 7 + "|"]
    for name in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == name]
        middle = {
            key: median(row[key] for row in mine) for key in ("bytes", "ratio", "error", "error, dense", "sparsity")
        }
        ratio, most = NETWORKS[name].bar
        met = "met" if middle["ratio"] >= ratio and middle["error"] <= most else "missed"
        lines.append(
            f"| {name} | {middle['bytes']:,.0f} | {middle['ratio']:.0f} | {middle['error']:.2%} | "
            f"{middle['error, dense']:.2%} | {middle['sparsity']:.1%} | {met}: {ratio} at {most:.1%} |"
        )
    said = "\n".join(f"{name}: {PUBLISHED[name]}" for name in dict.fromkeys(row["network"] for row in rows))
    return "\n".join(lines) + f"\n\n{said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dense-epochs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=30, help="while weights go")
    parser.add_argument("--share-epochs", type=int, default=5, help="of the values alone")
    parser.add_argument("--sparsity", type=float, help="in place of the network's own")
    parser.add_argument("--clusters", type=int, help="in place of the network's own")
    parser.add_argument("--criterion", default="lamp")
    parser.add_argument("--held-out", type=int, default=0, help="training images to measure on, in place of the test's")
    parser.add_argument("--train", type=int, help="training images; all if not given")
    parser.add_argument("--checkpoint", type=Path, help="folder to go on from")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    train, test = read(options.data, "train"), read(options.data, "test")
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(0))
    if options.held_out:
        test, order = (
            (train[0][order[: options.held_out]], train[1][order[: options.held_out]]),
            order[options.held_out :],
        )
    train = train[0][order[: options.train]], train[1][order[: options.train]]
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows = [compress(name, seed, train, test, options) for name in options.network for seed in options.seeds]
    print(f"\nmedians of seeds {options.seeds}, errors on {len(test[1])} images\n{table(rows)}")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, default=str, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
