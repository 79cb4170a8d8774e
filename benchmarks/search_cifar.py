"""Does a searched recipe beat a uniform cut and a default written by hand? ResNet-20 on CIFAR-10, fixed time each.

Usage: python benchmarks/search_cifar.py --data DIR [--seeds 0 1] [--trials 40] [--minutes 120] [--json FILE]

DIR holds ``cifar10_jpeg_{train,test}.npz``; decoding takes Pillow. A teacher is trained for each seed. All recipes
train for the same epochs; the search has so many trials or minutes, whichever ends first, and starts from the default.
What is taken of its front is chosen by validation images that are held out of training: the most accurate trial among
those at most as slow as both others, or else the one that ``slivo search`` names. Accuracy is then that on test images,
latency that of the three networks timed in turns. The result holds for a seed if the searched network is at least as
accurate and as fast as each of the others, and better in one.
Broken off, the same command goes on from its ``--work`` folder. A small run:
``--train 2000 --test 1000 --teacher-epochs 2 --epochs 2 --trials 4``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from cifar import MARGIN, Images, ResNet, accuracy, decode, normalize, some
from slivo.measure import clock
from slivo.recipe import load, run
from slivo.search import Found, Row, search
from slivo.tasks import Task, classification
from slivo.tasks.base import generator, loader
from slivo.train import OptimizerSpec, fit

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LOSSES = [{"kd": {"temperature": 4.0, "weight": 0.9}}]
ROUNDS = 25


class Pixels(Dataset[tuple[Tensor, Tensor]]):
    """Images that are normalized, and in training cropped and flipped, a batch at once."""

    def __init__(self, images: Images) -> None:
        self.pixels, self.labels = nn.functional.pad(images[0], (MARGIN,) * 4), images[1]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, labels = self.take([index], None)
        return x[0], labels[0]

    def take(self, indices: Sequence[int], key: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        """Return a batch; what is random in it is a function of the key and the images."""
        chosen = torch.tensor(indices)
        size = self.pixels.shape[-1] - 2 * MARGIN
        rows = columns = torch.full((len(chosen), 1), MARGIN) + torch.arange(size)
        if key is not None:
            drawn = torch.rand(3, len(self), generator=generator(*key))[:, chosen]
            rows, columns = (
                (each * (2 * MARGIN + 1)).long()[:, None] + torch.arange(size) for each in (drawn[0], drawn[1])
            )
            columns = torch.where(drawn[2][:, None] < 0.5, columns, columns.flip(1))
        x = self.pixels[chosen[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return normalize(x), self.labels[chosen]


def task(options: argparse.Namespace) -> tuple[Task, Images]:
    """Return the task, a tenth of the training images held out for validation, and the test images."""
    train, test = decode(options.data, "train"), some(decode(options.data, "test"), options.test)
    pixels, labels = some(train, options.train or len(train[1]))
    held = max(100, len(labels) // 10)
    splits = [Pixels((pixels[held:], labels[held:])), Pixels((pixels[:held], labels[:held])), Pixels(test)]
    example = (torch.zeros(2, 3, 32, 32),)
    return classification("cifar10", *splits, classes=CLASSES, example_inputs=example), test


def teacher(options: argparse.Namespace, given: Task, seed: int) -> nn.Module:
    """Return a trained ResNet-20."""
    torch.manual_seed(seed)
    model, file = ResNet(3), options.work / f"teacher-{seed}.safetensors"
    if file.is_file():
        model.load_state_dict(load_file(file))
        return model.eval()
    fit(
        model,
        loader(given, "train", batch_size=options.batch, seed=seed),
        lambda model, batch: {"labels": given.loss(model(batch[0]), batch)},
        epochs=options.teacher_epochs,
        optimizer=OptimizerSpec(lr=0.1),
        seed=seed,
        checkpoint=options.work / f"teacher-{seed}.fit",
    )
    save_file(model.state_dict(), file)
    return model.eval()


def recipe(options: argparse.Namespace, **prune: Any) -> dict[str, Any]:
    """Return a recipe of the given cut, with the epochs that all recipes have."""
    short = max(1, options.epochs // 6)
    steps = 3 if "schedule" in prune else 1
    train = {"losses": LOSSES, "batch_size": options.batch}
    recover = {"recover": {**train, "epochs": short, "optimizer": {"lr": 0.02}}} if steps > 1 else {}
    left = options.epochs - (steps * short if steps > 1 else 0)
    return {
        "name": "cifar",
        "target": {"macs": options.macs},
        "stages": [
            {"prune": {**prune, **recover}},
            {"distill": {**train, "epochs": max(1, left), "optimizer": {"lr": 0.05}}},
        ],
    }


def taken(found: Found, others: Sequence[Row]) -> Row | None:
    """Return the trial to compare: the most accurate of those that are as fast as the others, by validation."""
    slowest = min((row.values[1] for row in others if row.values), default=1.0)
    fast = [row for row in found.front if row.values[1] <= slowest]
    return max(fast, key=lambda row: row.values[0], default=found.best)


def one(options: argparse.Namespace, given: Task, test: Images, seed: int) -> dict[str, Any]:
    """Search with a seed, and measure what was found beside the others."""
    model, folder = teacher(options, given, seed), options.work / f"seed-{seed}"
    default = recipe(options, criterion="taylor", scope="global", schedule={"kind": "cubic", "steps": 3})
    uniform = recipe(options, criterion="l2", scope="uniform")
    models, rows, seconds = {"teacher": model}, list[Row](), dict[str, float]()
    for name, each in (("uniform", uniform), ("default", default)):
        result = run(
            load(each), folder / name, seed=seed, task=given, model=model, resume=(folder / name / "run.json").is_file()
        )
        models[name], seconds[name] = result.model, result.summary["seconds"]
        book = json.loads((folder / name / "run.json").read_text(encoding="utf-8"))
        share = result.summary["student"]["latency_ms"]["1"][0] / result.summary["teacher"]["latency_ms"]["1"][0]
        rows.append(Row(-1, "done", values=(book["stages"][-1]["after"]["accuracy"], share)))
    began = time.monotonic()
    found = search(
        {**default, "search": {"strategies": options.strategies, "objectives": ["latency"]}},
        folder / "search", trials=options.trials, task=given, model=model, seed=seed, timeout=60 * options.minutes,
        tell=lambda row: print(f"  trial {row.number} {row.state} {row.values} {row.reason}", flush=True),
    )  # fmt: skip
    seconds["search"] = time.monotonic() - began
    best = taken(found, rows)
    if best is None:
        raise SystemExit("no trial is done; allow more minutes")
    models["searched"] = run(load(best.recipe), folder / "again", seed=seed, task=given, model=model,
                             resume=(folder / "again" / "run.json").is_file()).model  # fmt: skip
    timer = clock((torch.zeros(1, 3, 32, 32),))
    rounds = [{name: timer(each) for name, each in models.items()} for _ in range(ROUNDS)]
    measured = {
        name: {
            "accuracy": accuracy(each, test),
            "latency_ms": sorted(turn[name] for turn in rounds)[ROUNDS // 2],
            "seconds": seconds.get(name),
        }
        for name, each in models.items()
    }
    states = [row.state for row in found.rows]
    return {
        "seed": seed,
        "networks": measured,
        "dominates": all(dominates(measured["searched"], measured[name]) for name in ("uniform", "default")),
        "trial": best.number,
        "settings": dict(best.settings),
        "trials": {state: states.count(state) for state in sorted(set(states))},
        "search_seconds": seconds["search"],
    }


def dominates(ours: dict[str, float], theirs: dict[str, float]) -> bool:
    """Tell whether a network is as accurate and as fast as another, and better in one."""
    pairs = [(ours["accuracy"], theirs["accuracy"]), (-ours["latency_ms"], -theirs["latency_ms"])]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/search_cifar"), help="where everything is kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--train", type=int, help="so many of the training images; all by default")
    parser.add_argument("--test", type=int, help="so many of the test images; all by default")
    parser.add_argument("--teacher-epochs", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=12, help="that each recipe trains for")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--macs", type=float, default=0.5, help="share of the MACs that may stay")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--minutes", type=float, default=120.0, help="that a search may take")
    parser.add_argument("--strategies", nargs="*", default=[], help="recipes that ship to try as well")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    given, test = task(options)
    rows = []
    for seed in options.seeds:
        row = one(options, given, test, seed)
        rows.append(row)
        for name, each in row["networks"].items():
            print(f"seed {seed} {name:<9} accuracy {each['accuracy']:.2%}, {each['latency_ms']:.3f} ms", flush=True)
        print(f"seed {seed}: {row['trials']}; dominates both: {row['dominates']}; {row['settings']}", flush=True)
    if options.json is not None:
        settings = {name: str(value) for name, value in vars(options).items()}
        machine = f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
        made = {"rows": rows, "settings": settings, "machine": machine}
        options.json.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
