"""The hooks that ship do what they say."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from slivo.errors import SlivoError
from slivo.train import EMA, ClipGradients, Hook, OptimizerSpec, Progress, fit


def run(model, *hooks, scale=1.0, epochs=2):
    data = DataLoader(TensorDataset(torch.linspace(-1, 1, 24).view(8, 3)), batch_size=4)
    spec = OptimizerSpec(lr=0.1, schedule="constant")
    return fit(
        model,
        data,
        lambda m, b: {"x": scale * (m(b[0]) - 1).square().mean()},
        epochs=epochs,
        optimizer=spec,
        hooks=hooks,
    )


@pytest.mark.parametrize("limit", [0.01, 1e9])
def test_gradients_are_clipped_to_the_limit_and_keep_their_direction(limit):
    norms = []

    class Watch(Hook):
        def on_gradients(self, state):
            norms.append(torch.cat([p.grad.flatten() for p in state.model.parameters()]))

    run(nn.Linear(3, 1), Watch(), ClipGradients(limit), Watch(), scale=100.0)
    for raw, clipped in zip(norms[::2], norms[1::2], strict=True):
        assert clipped.norm() <= limit * 1.001
        assert torch.allclose(clipped / clipped.norm(), raw / raw.norm(), atol=1e-4)
        if raw.norm() <= limit:
            assert torch.equal(clipped, raw)


def test_ema_leaves_the_running_mean_in_the_model():
    seen = []

    class Watch(Hook):
        def on_fit_start(self, state):
            seen.append(state.model.weight.detach().clone())

        def on_step_end(self, state):
            seen.append(state.model.weight.detach().clone())

    model = nn.Linear(3, 1)
    run(model, Watch(), EMA(0.75))
    mean = seen[0].double()
    for weight in seen[1:]:
        mean = 0.75 * mean + 0.25 * weight
    assert torch.allclose(model.weight.double(), mean)


def test_ema_averages_statistics_and_keeps_counts():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    run(model, EMA(0.0))
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    run(plain)
    assert model[1].num_batches_tracked == plain[1].num_batches_tracked == 4


@pytest.mark.parametrize("make", [lambda: EMA(1.0), lambda: EMA(-0.1), lambda: ClipGradients(0.0)])
def test_impossible_settings_are_refused(make):
    with pytest.raises(SlivoError, match="is"):
        make()


def test_progress_is_told_of_every_few_steps_and_of_epochs():
    told = []
    rows = run(nn.Linear(3, 1), Progress(lambda *words: told.append(words), "teacher", every=2))
    assert [(label, done, total) for label, done, total, _ in told] == [
        ("teacher", done, 4) for done in (0, 2, 2, 4, 4)
    ]
    assert told[-1][3] == {"epoch": 2.0, "loss": rows[-1]["loss"], "lr": 0.1}
