"""Fast slices of the benchmarks: small networks pass the checks of coverage; a comparison of pruned networks runs."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]

UNMEASURED = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
"""The environment without what has processes measure their coverage, by a library of the name of one of the scripts."""


def coverage(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "benchmarks/coverage.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def test_small_networks_pass(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    found = coverage("--only", "small/*", "stress/*", "--limit", "120", "--json", str(file))
    assert found.returncode == 0, found.stdout + found.stderr
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert len(rows) >= 43
    assert all(row["permutation"] <= 1e-9 and not row["failures"] for row in rows)
    assert "missed" not in found.stdout


def test_a_glob_that_matches_nothing_says_what_there_is() -> None:
    found = coverage("--only", "smal/*")
    assert found.returncode == 1
    assert "no network matches smal/*; there are " in found.stderr


def test_every_script_finds_what_it_imports() -> None:
    names = sorted(file.stem for file in (ROOT / "benchmarks").glob("*.py"))
    command = [sys.executable, "-W", "ignore", "-c", f"import {', '.join(names)}"]
    found = subprocess.run(
        command, cwd=ROOT / "benchmarks", env=UNMEASURED, capture_output=True, text=True, timeout=300, check=False
    )
    assert len(names) > 10
    assert found.returncode == 0, found.stderr


class Small(nn.Module):
    """Two convolutions, in place of the network that is measured."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, 4), nn.Conv2d(8, 4, 3, 2)
        self.linear = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("cifar"), importlib.import_module("prune_cifar")
    for name in ("cifar", "prune_cifar"):
        sys.modules.pop(name)


def test_crops_are_windows_of_the_image_in_a_black_margin(scripts: tuple[Any, Any]) -> None:
    cifar, _ = scripts
    images = torch.arange(1, 3 * 32 * 32 + 1).reshape(1, 3, 32, 32), torch.tensor([7])
    wide = nn.functional.pad(images[0], (cifar.MARGIN,) * 4)
    torch.manual_seed(0)
    x, labels = cifar.Crops(images).__getitems__([0] * 40)
    found = (x * cifar.DEVIATION[:, None, None] + cifar.MEAN[:, None, None]) * 255
    views = {
        (flipped, row, column): (wide.flip(3) if flipped else wide)[0, :, row : row + 32, column : column + 32]
        for flipped in (False, True)
        for row in range(9)
        for column in range(9)
    }
    places = [[at for at, view in views.items() if torch.allclose(view.float(), one, atol=0.01)] for one in found]
    assert all(len(each) == 1 for each in places)
    assert len({each[0] for each in places}) > 20
    assert labels.tolist() == [7] * 40


def test_a_comparison_runs_and_goes_on_from_its_folder(
    scripts: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, script = scripts
    torch.manual_seed(0)
    model, images = Small().eval(), (torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (64,)))
    monkeypatch.setattr(script, "decode", lambda folder, split, chosen=None: images)
    monkeypatch.setattr(script, "resnet56", lambda folder: model)
    network = replace(script.NETWORKS["resnet56"], make=Small, prune={"criterion": "surgeon"})
    monkeypatch.setitem(script.NETWORKS, "resnet56", network)
    file = tmp_path / "rows.json"
    arguments = ["prune_cifar.py", "--data", "nowhere", "--epochs", "1", "--faster", "1.5", "--hint", "conv2"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--checkpoint", str(tmp_path / "runs"), "--json", str(file)])
    script.main()
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows] == ["slivo", "slivo+kd"]
    assert all(row["faster"] >= 1.5 and 0 <= row["tuned"] <= 1 for row in rows)
    assert "epoch 1" in capsys.readouterr().out
    script.main()
    assert json.loads(file.read_text(encoding="utf-8"))["rows"] == rows
    assert "epoch 1" not in capsys.readouterr().out


def test_steps_of_a_distillation_are_timed_in_every_way(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [sys.executable, "benchmarks/distill_step.py", "--batch", "2", "--steps", "2", "--json", str(file)]
    found = subprocess.run(command, cwd=ROOT, env=UNMEASURED, capture_output=True, text=True, timeout=300, check=False)
    assert not found.stderr
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["lesson"] for row in rows] == ["logits", "logits and a feature map"]
    assert all(row["ms"].keys() == {"plain", "teacher", "live", "first", "warm"} for row in rows)


class Digits(nn.Module):
    """A network for images with channels last, in place of those of Keras."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.last = nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU())
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(x))


def test_ways_of_distilling_two_networks_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = importlib.import_module("distill_keras")
    random = np.random.default_rng(0)
    arrays = {f"{split}_images": random.integers(256, size=(96, 28, 28), dtype=np.uint8) for split in ("train", "test")}
    labels = {f"{split}_labels": random.integers(10, size=96, dtype=np.uint8) for split in ("train", "test")}
    np.savez(tmp_path / "mnist.npz", **arrays, **labels)
    monkeypatch.setattr(script, "HELD_OUT", 32)
    monkeypatch.setattr(script, "LAST", ("last", "last"))
    monkeypatch.setattr(script, "networks", lambda: (lambda: Digits(12), lambda: Digits(6)))
    sizes = ["--train", "32", "--epochs", "1", "--teacher-train", "64", "--teacher-epochs", "1", "--seeds", "0", "1"]
    file = tmp_path / "rows.json"
    command = ["distill_keras.py", "--data", str(tmp_path), "--sets", "mnist", *sizes, "--json", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    script.main()
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows] == ["teacher", "kd", "kd, hint", "scratch"] * 2
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert len({row["params"] for row in rows}) == 2
    assert capsys.readouterr().out.count("| mnist |") == 4
    sys.modules.pop("distill_keras")


def test_runs_are_killed_and_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [sys.executable, "-W", "ignore", "benchmarks/kill_resume.py", "--kills", "5", "--json", str(file)]
    found = subprocess.run(
        [*command, "--only", "augmented", "lost loss"], cwd=ROOT, env=UNMEASURED, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["kills"] == 5
    assert {row["lost"] + row["different"] for row in content["rows"].values()} == {0}
    assert "5 kills" in found.stdout


def test_packed_tensors_are_near_their_entropy(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [sys.executable, "benchmarks/pack_speed.py", "--size", "256", "--repeats", "1", "--json", str(file)]
    found = subprocess.run(command, cwd=ROOT, env=UNMEASURED, capture_output=True, text=True, timeout=300, check=False)
    assert not found.stderr
    content = json.loads(file.read_text(encoding="utf-8"))
    assert len(content["rows"]) == 11
    for row in content["rows"]:
        least = row["bound_bits"] * 256 * 256 / 8
        # The header is a few hundred bytes, and so are 32 values. A thousand are more, and their indices' two bytes
        # share the Huffman codes of one block where there are so few.
        assert least < row["bytes"] < (1.3 if row["tensor"] == "1000 values" else 1.03) * least + 600
    assert [each["coding"] for each in content["coders"]] == ["ans", "zstd"]


def test_networks_are_pruned_shared_and_packed(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1100, 28, 28), dtype=np.uint8)
    labels = np.arange(1100, dtype=np.uint8) % 10
    np.savez(
        tmp_path / "mnist.npz",
        train_images=images,
        train_labels=labels,
        test_images=images[:50],
        test_labels=labels[:50],
    )
    file = tmp_path / "rows.json"
    command = [
        sys.executable, "-W", "ignore", "benchmarks/deep_compression.py", "--data", str(tmp_path), "--seeds", "0",
        "--network", "lenet-300-100", "--train", "256", "--held-out", "500", "--dense-epochs", "1", "--epochs", "1",
        "--share-epochs", "1", "--checkpoint", str(tmp_path / "runs"), "--json", str(file),
    ]  # fmt: skip
    for _ in range(2):  # the second goes on from the first's folder
        found = subprocess.run(
            command, cwd=ROOT, env=UNMEASURED, capture_output=True, text=True, timeout=300, check=False
        )
        assert found.returncode == 0, found.stderr
    (row,) = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert row["bytes"] == (tmp_path / "runs" / "lenet-300-100-0" / "small.slivo").stat().st_size
    assert row["sparsity"] == pytest.approx(0.945, abs=1e-4)
    assert row["ratio"] > 60
    assert "| lenet-300-100 |" in found.stdout
