"""Prune stages that set what stays in closed form."""

from __future__ import annotations

from pathlib import Path

import torch
import toys

import slivo
from slivo.recipe import load, run


def gap(folder: Path, *, refit: bool) -> float:
    """Prune in two steps without training, and return how far the student's outputs are from the teacher's."""
    prune = {"keep": {"macs": 0.4}, "schedule": {"steps": 2}, "refit": refit, "samples": 96}
    student = run(load(toys.recipe({"prune": prune}, target={})), folder).model.eval()
    x = torch.stack([x for x, _ in toys.task().test])
    with torch.no_grad():
        return float((student(x) - slivo.load(folder / "teacher").eval()(x)).square().mean())


def test_a_refit_brings_the_student_near_the_teacher(tmp_path: Path) -> None:
    assert gap(tmp_path / "refit", refit=True) < 0.2 * gap(tmp_path / "cut", refit=False)
