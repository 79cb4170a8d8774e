"""Pairs that are proposed run in order, say alike, and can be distilled by."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slivo import losses
from slivo.distill import distillation, features, propose, relations
from slivo.distill.pairs import _in_order
from slivo.errors import RecipeError, SlivoError
from slivo.zoo import small_cnn


def block(width, stride):
    return nn.Sequential(nn.Conv2d(width, width, 3, stride, 1), nn.ReLU())


class Stages(nn.Module):
    """Stages that halve the image, each of some blocks."""

    def __init__(self, blocks, width=4):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(nn.Sequential(nn.Conv2d(width, width, 3, 2 - bool(b), 1), nn.ReLU()) for b in range(blocks))
            )
            for _ in range(3)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


def net(blocks, width=4, seed=0):
    torch.manual_seed(seed)
    return Stages(blocks, width).eval()


X = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_stages_of_another_depth_are_paired_by_resolution_and_order():
    student, teacher = net(1), net(4, width=6, seed=1)
    found = propose(student, teacher, X, count=3)
    assert len(found) == 3
    assert [pair.student.split(".")[1] for pair in found] == ["0", "1", "2"]
    assert [pair.teacher.split(".")[1] for pair in found] == ["0", "1", "2"]
    assert all(pair.shapes[0][1:] == pair.shapes[1][1:] for pair in found)
    assert str(found).count("\n") == 2
    assert "alignment 0." in str(found[0])


def test_a_model_is_paired_with_itself():
    model = net(3)
    for pair in propose(model, model, X, count=50):
        assert pair.alignment == pytest.approx(1, abs=1e-4)
        one, other = (features_at(model, path) for path in (pair.student, pair.teacher))
        assert relations.cka(one, other).item() == pytest.approx(0, abs=1e-4)


def features_at(model, path):
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda *args: seen.append(args[2]))
    model(X)
    handle.remove()
    return seen[0].detach()


def test_pairs_are_what_losses_take():
    student, teacher = net(1), net(2, width=6, seed=1)
    pairs = propose(student, teacher, X, count=2)
    batch = X, torch.zeros(16, dtype=torch.int64)
    made = distillation(
        teacher, lambda model, batch: model(batch[0]), lambda out, batch: F.cross_entropy(out, batch[1]),
        [losses.hint(at=pairs.at)],
    ).prepare(student, batch)  # fmt: skip
    assert len(made(student, batch)) == 3
    assert features.hint.__name__ == "hint"
    assert not any(module._forward_hooks for net in (student, teacher) for module in net.modules())


def test_models_without_blocks_are_paired_by_layers():
    teacher = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    found = propose(small_linear(), teacher, X.mean((2, 3)), count=2)
    assert [pair.student for pair in found] == ["0", "2"]


def small_linear():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def test_inputs_may_be_named_or_several():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 3))

        def forward(self, x, y):
            return {"logits": self.body(x) + y, "nothing": None}

    x = X.mean((2, 3))
    for batch in ({"x": x, "y": x}, (x, x)):
        assert len(propose(Two(), Two(), batch, count=1)) == 1
    assert len(propose(Two(), Two(), x, count=1, forward=lambda model, batch: model(batch, batch))) == 1


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_the_pairs_are_the_best_in_order(rows, columns, seed):
    scores = np.random.default_rng(seed).random((rows, columns))
    found = _in_order(scores)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(found))

    def best(i, j):
        if i == rows or j == columns:
            return 0.0
        return max(best(i + 1, j), best(i, j + 1), scores[i, j] + best(i + 1, j + 1))

    assert sum(scores[i, j] for i, j in found) == pytest.approx(best(0, 0))


def test_what_makes_no_sense_is_refused():
    model = small_cnn(width=4)
    with pytest.raises(RecipeError, match="count is 0"):
        propose(model, model, torch.randn(4, 1, 8, 8), count=0)
    with pytest.raises(SlivoError, match=r"the student \(Small.*\) has no module that puts out features of 2 samples"):
        propose(model, model, torch.randn(1, 1, 8, 8))
