"""Losses between samples are those of the whole batch, however many processes it is spread over."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from slivo.distill import gathered, relations

HERE = Path(__file__).parent


def test_two_processes_have_the_loss_and_gradient_of_one(tmp_path):
    script = str(HERE / "gathering.py")
    address = str(tmp_path / "meeting")
    runs = [
        subprocess.Popen([sys.executable, "-W", "ignore", script, str(rank), "2", address, str(tmp_path)])
        for rank in range(2)
    ]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.manual_seed(0)
    student, x, y = nn.Linear(3, 4), torch.randn(8, 3), torch.randn(8, 5)
    for name, loss in (("distance", relations.rkd_distance), ("cka", relations.cka)):
        value = loss(student(x), y)
        (gradient,) = torch.autograd.grad(value, student.weight)
        for each in found:
            torch.testing.assert_close(each[name][0], value.detach())
            torch.testing.assert_close(each[name][1], gradient)


def test_alone_it_is_the_loss_itself():
    x, y = torch.randn(6, 3), torch.randn(6, 5)
    assert torch.equal(gathered(relations.rkd_distance)(x, y), relations.rkd_distance(x, y))
    pairs = gathered(lambda student, teacher: (student[0] - teacher[0]).sum())
    assert pairs([x], [x]) == 0
