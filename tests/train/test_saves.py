"""Trainings that are saved in the midst of epochs, go back when the loss is lost, and use the checkpoint before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from slivo.errors import ArtifactError, SlivoError
from slivo.quantize import QuantizationAware
from slivo.share import TrainValues, share
from slivo.train import EMA, ClipGradients, Hook, OptimizerSpec, Saves, Stopped, fit, read
from train import killed
from train.test_resume import assert_same, timeless


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Samples that draw from the generator that the training draws from, and count how often they are read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read.append(index)
        return torch.randn(4) + index, torch.tensor(index % 2)


def stop_at(step: int) -> Saves:
    asked = count(1)
    return Saves(stop=lambda: next(asked) == step)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 2))


def train(
    model: nn.Module, data: DataLoader[Any], checkpoint: Path | None, *hooks: Hook, **options: Any
) -> list[dict[str, Any]]:
    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        return {"ce": nn.functional.cross_entropy(model(batch[0]), batch[1])}

    spec = options.pop("optimizer", OptimizerSpec("adamw", lr=0.01))
    return fit(
        model, data, objective, epochs=3, optimizer=spec, hooks=hooks, checkpoint=checkpoint, seed=5,
        validate=lambda model: {"drawn": float(torch.rand(()))}, **options,
    )  # fmt: skip


def loaders(dataset: Dataset[Any]) -> dict[str, DataLoader[Any]]:
    own = torch.Generator()
    return {
        "in order": DataLoader(dataset, batch_size=4),
        "shuffled": DataLoader(dataset, batch_size=4, shuffle=True),
        "own generator": DataLoader(dataset, batch_size=4, shuffle=True, generator=own),
        "replacement": DataLoader(dataset, batch_size=4, sampler=RandomSampler(dataset, True, 22)),  # type: ignore[arg-type]
        "single": DataLoader(dataset, batch_size=None),
        "processes": DataLoader(dataset, batch_size=4, shuffle=True, num_workers=2),
    }


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        *((kind, step) for kind in ("in order", "shuffled", "own generator") for step in (1, 5, 6, 9, 18)),
        ("replacement", 8), ("single", 27), ("processes", 9),
    ],
)  # fmt: skip
def test_a_training_stopped_within_an_epoch_goes_on_to_the_bit(kind: str, step: int, tmp_path: Path) -> None:
    whole, resumed = net(), net()
    hooks = ClipGradients(1.0), EMA(0.9)
    if kind == "single":  # batch norm in training needs more than a row
        whole, resumed = (nn.Sequential(model[0], model[2], model[4]) for model in (whole, resumed))  # type: ignore[index]
    expected = train(whole, loaders(Noisy())[kind], None, *hooks, Saves())
    with pytest.raises(Stopped):
        train(resumed, loaders(Noisy())[kind], tmp_path / "state", *hooks, stop_at(step))
    assert read(tmp_path / "state.inside")["step"] == step
    for tensor in (*resumed.parameters(), *resumed.buffers()):
        tensor.data.fill_(3)
    torch.manual_seed(12)
    data = Noisy()
    rows = train(resumed, loaders(data)[kind], tmp_path / "state", ClipGradients(1.0), EMA(0.9), Saves())
    assert timeless(rows) == timeless(expected)
    assert_same(resumed, whole)
    assert not (tmp_path / "state.inside").exists()
    if kind not in ("processes", "single"):  # what was passed over was not read
        probes = 1 + 4  # of the first batch, to see what the model does
        assert len(data.read) <= 3 * 22 - min(4 * step, 22 * (step // 6) + 4 * (step % 6)) + 4 * probes


def test_checkpoints_come_every_so_often_and_the_last_two_epochs_are_kept(tmp_path: Path) -> None:
    there = list[bool]()

    class Sees(Hook):
        def on_step_start(self, _: Any) -> None:
            there.append((tmp_path / "state.inside").exists())

    train(net(), loaders(Noisy())["shuffled"], tmp_path / "state", Saves(1e-9), Sees())
    assert there[:2] == [False, True]  # after the first step; the next when that has cost a twentieth of the time
    assert [read(tmp_path / name)["epoch"] for name in ("state", "state.previous")] == [3, 2]
    with pytest.raises(SlivoError, match="Saves every is 0; a number of seconds above 0"):
        Saves(0)


def test_a_second_training_is_stopped_where_it_has_no_checkpoint() -> None:
    with pytest.raises(Stopped):
        train(net(), loaders(Noisy())["shuffled"], None, stop_at(2))


@pytest.mark.parametrize("how", ["flip", "cut", "empty"])
def test_of_damaged_checkpoints_the_one_before_is_used(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, resumed = killed.model(), killed.model()
    expected = killed.train(whole, None)

    def stop(row: Mapping[str, Any]) -> None:
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed.train(resumed, tmp_path / "state", on_epoch=stop)
    content = (tmp_path / "state").read_bytes()
    middle = len(content) // 2
    damaged = {
        "flip": content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :],
        "cut": content[:middle],
        "empty": b"",
    }[how]
    (tmp_path / "state").write_bytes(damaged)
    seen = list[Any]()
    rows = killed.train(resumed, tmp_path / "state", on_epoch=seen.append)
    assert [row["epoch"] for row in seen] == [3, 4]
    assert "state is damaged" in caplog.text
    assert "goes on from another that is whole" in caplog.text
    assert timeless(rows) == timeless(expected)
    assert_same(resumed, whole)


def test_without_any_that_is_whole_it_says_so_and_removing_the_file_begins_anew(tmp_path: Path) -> None:
    killed.train(killed.model(), tmp_path / "state")
    for name in ("state", "state.previous"):
        (tmp_path / name).write_bytes(b"torn")
    with pytest.raises(ArtifactError, match=r"state is damaged .*; remove it to train from the start"):
        killed.train(killed.model(), tmp_path / "state")
    (tmp_path / "state").unlink()
    seen = list[Any]()
    killed.train(killed.model(), tmp_path / "state", on_epoch=seen.append)
    assert len(seen) == 4


class Loses:
    """An objective whose loss is lost at some calls in training, unless the rate is low."""

    def __init__(self, *, epoch: int, above: float, value: float = math.nan) -> None:
        self.epoch, self.above, self.value = epoch, above, value
        self.state: Any = None

    def __call__(self, model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        loss = model(batch[0]).square().mean()
        state = self.state
        if state is not None and state.epoch == self.epoch and state.scheduler.base_lrs[0] > self.above:
            loss = loss * self.value
        return {"square": loss}

    def hook(self) -> Hook:
        outer = self

        class Tells(Hook):
            def on_step_start(self, state: Any) -> None:
                outer.state = state

        return Tells()


def losing(
    model: nn.Module, checkpoint: Path | None, above: float, *hooks: Hook, epoch: int = 2, **options: Any
) -> list[dict[str, Any]]:
    data = DataLoader(TensorDataset(torch.randn(12, 4, generator=torch.Generator().manual_seed(0))), 4, shuffle=True)
    objective = Loses(epoch=epoch, above=above)
    return fit(
        model, data, objective, epochs=3, optimizer=OptimizerSpec(lr=0.1, schedule="constant"),
        hooks=[objective.hook(), EMA(0.5), *hooks], checkpoint=checkpoint, **{"rollbacks": 3, **options},
    )  # fmt: skip


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_lost_loss_goes_back_and_halves_the_rate_until_it_holds(epoch: int, tmp_path: Path) -> None:
    there, here = net(), net()
    rows = losing(there, None, 0.03, epoch=epoch)
    assert timeless(losing(here, tmp_path / "state", 0.03, epoch=epoch)) == timeless(rows)
    assert_same(there, here)
    notes = rows[epoch - 1]["rolled_back"]
    assert [note["lr"] for note in notes] == [0.05, 0.025]
    assert {(note["epoch"], note["step"]) for note in notes} == {(epoch, 3 * epoch - 2)}
    assert notes[0]["why"].startswith(f"the loss is not finite at epoch {epoch}, step")
    assert all(row["lr"] == 0.025 for row in rows[epoch - 1 :])
    assert [row["epoch"] for row in rows if "rolled_back" in row] == [epoch]


def test_what_was_before_the_loss_is_lost_does_not_matter_after() -> None:
    """A training that went back is one whose rate was halved at the start of that epoch."""

    class Halves(Hook):
        def on_epoch_end(self, state: Any) -> None:
            if state.epoch == 1:
                state.scheduler.base_lrs = [rate / 2 for rate in state.scheduler.base_lrs]
                for group in state.optimizer.param_groups:
                    group["lr"] /= 2

    back, halved = net(), net()
    losing(back, None, 0.05, Hook())
    losing(halved, None, 1.0, Halves())
    assert_same(back, halved)


def test_a_training_gives_up_with_the_reason_and_at_once_unless_told_otherwise() -> None:
    with pytest.raises(SlivoError, match=r"the loss is not finite .*; the training went back 3 times .* in vain"):
        losing(net(), None, 0.0)
    with pytest.raises(SlivoError, match=r"not finite at epoch 2, step 4 \(square = nan\); lower the learning rate"):
        losing(net(), None, 0.0, rollbacks=0)
    with pytest.raises(SlivoError, match="rollbacks is -1; 0 or more"):
        losing(net(), None, 0.0, rollbacks=-1)


def test_weights_that_are_lost_in_the_last_step_of_an_epoch_are_no_good_epoch(tmp_path: Path) -> None:
    class Spoils(Hook):
        def on_step_end(self, state: Any) -> None:
            if state.step == 6 and state.scheduler.base_lrs[0] > 0.05:
                with torch.no_grad():
                    next(state.model.parameters()).fill_(math.inf)

    rows = losing(net(), tmp_path / "state", 1.0, Spoils())
    (note,) = rows[1]["rolled_back"]
    assert note["why"] == "the weights are not finite after epoch 2, step 6"
    assert all(math.isfinite(row["loss"]) for row in rows)


@pytest.mark.parametrize("step", [4, 5, 6, 7])
def test_a_training_that_went_back_resumes_to_the_bit(step: int, tmp_path: Path) -> None:
    whole, resumed = net(), net()
    expected = losing(whole, None, 0.03, Saves())
    with pytest.raises(Stopped):
        losing(resumed, tmp_path / "state", 0.03, stop_at(step))
    rows = losing(resumed, tmp_path / "state", 0.03, Saves())
    assert timeless(rows) == timeless(expected)
    assert_same(resumed, whole)


@pytest.mark.parametrize("kind", ["share", "aware"])
def test_hooks_that_hold_weights_go_back_too(kind: str, tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, Hook]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        if kind == "share":
            return share(model, 4), TrainValues("mean")
        return model, QuantizationAware([torch.randn(4, 4, generator=torch.Generator().manual_seed(1))])

    (whole, hook), (resumed, first), (_, second) = made(), made(), made()
    expected = losing(whole, None, 0.05, hook, Saves())
    assert expected[1]["rolled_back"]
    with pytest.raises(Stopped):
        losing(resumed, tmp_path / "state", 0.05, first, stop_at(5))
    assert timeless(losing(resumed, tmp_path / "state", 0.05, second, Saves())) == timeless(expected)
    assert_same(resumed, whole)
