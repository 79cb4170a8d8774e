"""What do zeros cost, and what do they bring? A small convolutional network on scikit-learn's digits.

Usage: python benchmarks/sparsity_digits.py [--seeds 3] [--epochs 6] [--only PART …] [--json FILE]

Prints accuracy on the test images right after weights are set to zero, by criterion, scope and pattern; after training
with the zeros held, or with sparsity that grows meanwhile; what a permutation of the channels keeps; and the time of a
forward pass, dense and sparse.
"""

from __future__ import annotations

import argparse
import json
import platform
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from pressure_digits import train
from slivo.measure import quality
from slivo.measure.latency import latency
from slivo.prune import GradualSparsity, HoldMasks, permute, sparsify
from slivo.prune.criterion import criterion
from slivo.tasks import Task, forward, loader
from slivo.tasks.digits import digits
from slivo.zoo import small_cnn


@criterion()
def divided(weights: torch.Tensor) -> torch.Tensor:
    """Magnitude over its mean in the tensor, as channels are compared."""
    return weights.abs().sum(1) / weights.abs().mean()


SHARES = (0.5, 0.7, 0.8, 0.9)
CHOICES = [
    (divided, "global"),
    *[(name, "global") for name in ("l1", "lamp", "taylor", "snip", "wanda", "entropy", "random")],
    ("l1", "layer"),
    ("l1", "row"),
    ("wanda", "row"),
]
STEM = ["stage1.0"]
"""The first convolution has one channel of input, which no group of 4 divides."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: dict[str, list[list[float]]] = {}
    for seed in range(args.seeds):
        for name, values in one(digits(), seed, args).items():
            rows.setdefault(name, []).append(values)
        print(f"seed {seed} is done", flush=True)
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {args.seeds} seeds")
    for name, found in rows.items():
        middle = torch.tensor(found).mean(0).tolist()
        print(f"{name:42} " + "  ".join(f"{value:7.4f}" for value in middle))
    if args.json:
        args.json.write_text(json.dumps(rows))


def one(task: Task, seed: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Measure one training's network."""
    torch.manual_seed(seed)
    model = small_cnn(width=16)
    train(model, task, options.epochs, 0.1, seed)
    found = {"dense": [accuracy(model, task)]}
    for part in options.only:
        found |= PARTS[part](model, task, seed, options.epochs)
    return found


def choices(model: nn.Module, task: Task, seed: int, _: int) -> dict[str, list[float]]:
    """Accuracy right after, by what chooses."""
    batches = list(islice(loader(task, "train", batch_size=64, seed=seed), 8))
    found = {}
    for by, scope in CHOICES:
        name = by if isinstance(by, str) else by.name
        found[f"{name}, {scope}, zeros {SHARES}"] = [
            accuracy(
                sparsify(
                    model, sparsity=share, criterion=by, scope=scope, batches=batches,
                    loss=lambda net, batch: task.loss(forward(task, net, batch), batch),
                ),
                task,
            )
            for share in SHARES
        ]  # fmt: skip
    return found


def trained(model: nn.Module, task: Task, seed: int, epochs: int) -> dict[str, list[float]]:
    """Accuracy after as many epochs more, with zeros held or growing in number."""
    found = {}
    for share in (0.9, 0.97):
        sparse, chance = sparsify(model, sparsity=share), sparsify(model, sparsity=share, criterion="random")
        slow = sparsify(model, sparsity=0.0)
        train(sparse, task, epochs, 0.02, seed, [HoldMasks()])
        train(slow, task, epochs, 0.02, seed, [GradualSparsity(share)])
        train(chance, task, epochs, 0.02, seed, [HoldMasks()])
        found[f"{share} zeros trained: at once, gradual, random"] = [
            accuracy(net, task) for net in (sparse, slow, chance)
        ]
    return found


def times(model: nn.Module, task: Task, *_: int) -> dict[str, list[float]]:
    """Median milliseconds of a forward pass."""
    found = {}
    for size in (1, 64):
        images = task.example_inputs[0][:1].expand(size, -1, -1, -1).contiguous()
        nets = (model, sparsify(model, sparsity=0.9).eval())
        with torch.inference_mode():
            found[f"milliseconds, batch {size}: dense, 0.9 zeros"] = [
                latency(lambda n=n, x=images: n(x))[0] for n in nets
            ]
    return found


def groups(model: nn.Module, task: Task, *_: int) -> dict[str, list[float]]:
    """2:4 as the channels are, and in the order that was searched: what is kept of Σ|w|, and accuracy."""
    shuffled = permute(model, task.example_inputs, exclude=STEM)
    found = {}
    for name, net in (("2:4", model), ("2:4, permuted", shuffled)):
        sparse = sparsify(net, pattern="2:4", exclude=STEM)
        found[f"{name}: kept of all |w|, accuracy"] = [magnitude(sparse) / magnitude(net), accuracy(sparse, task)]
    blocks = sparsify(model, pattern="4x4", sparsity=0.5, exclude=[*STEM, "head"])
    found["4x4 blocks, half zeros: kept, accuracy"] = [magnitude(blocks) / magnitude(model), accuracy(blocks, task)]
    half = sparsify(model, sparsity=0.5, exclude=STEM)
    found["unstructured, half zeros: kept, accuracy"] = [magnitude(half) / magnitude(model), accuracy(half, task)]
    return found


def magnitude(model: nn.Module) -> float:
    """Sum of absolute values of what 2:4 is for."""
    weights = [each for name, each in model.named_parameters() if each.dim() > 1 and not name.startswith(STEM[0])]
    return float(sum(each.detach().abs().sum() for each in weights))


def accuracy(model: nn.Module, task: Task) -> float:
    """Share of the test images that are right."""
    return quality(model, task, "test")["accuracy"]


PARTS = {"choices": choices, "trained": trained, "patterns": groups, "times": times}

if __name__ == "__main__":
    main()
