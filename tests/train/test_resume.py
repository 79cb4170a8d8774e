"""A training that was broken off and resumed ends bit-identical to one that was not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from slivo.errors import ArtifactError
from slivo.tasks import classification, forward, loader
from slivo.tasks.digits import Shifted
from slivo.train import EMA, Hook, OptimizerSpec, fit
from slivo.train.checkpoint import read, write
from slivo.zoo import mlp
from train import killed


class BrokenOffError(Exception):
    pass


class Stops(Hook):
    """Breaks a training off at a point of an epoch, once."""

    def __init__(self, point, epoch):
        self.armed = True
        self.epoch = epoch
        setattr(self, point, self.stop)

    def stop(self, state):
        if self.armed and state.epoch == self.epoch:
            self.armed = False
            raise BrokenOffError


def timeless(rows):
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


def assert_same(a, b):
    ours, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (a, b))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
        assert ours[name].stride() == theirs[name].stride(), name


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("point", ["on_step_start", "on_gradients", "on_step_end", "on_epoch_end", "on_fit_end"])
def test_resumed_is_bit_identical(tmp_path, shuffle, kind, point):
    whole = killed.model()
    expected = killed.train(whole, None, shuffle=shuffle, kind=kind, hooks=[Hook()])
    resumed = killed.model()
    stops = Stops(point, epoch=killed.EPOCHS if point == "on_fit_end" else 3)
    options = {"shuffle": shuffle, "kind": kind, "hooks": [stops]}
    with pytest.raises(BrokenOffError):
        killed.train(resumed, tmp_path / "state", **options)
    torch.manual_seed(99)
    resumed = nn.Sequential(*(killed.model().apply(scramble)))
    rows = killed.train(resumed, tmp_path / "state", **options)
    assert timeless(rows) == timeless(expected)
    assert_same(resumed, whole)


def scramble(module):
    """What a model holds before it resumes must not matter."""
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data.fill_(7)


def test_broken_off_every_epoch_in_the_callers_callback(tmp_path):
    whole = killed.model()
    expected = killed.train(whole, None)
    seen = []

    def stop(row):
        seen.append(row["epoch"])
        raise BrokenOffError

    for _ in range(killed.EPOCHS):
        with pytest.raises(BrokenOffError):
            killed.train(killed.model(), tmp_path / "state", on_epoch=stop)
    resumed = killed.model()
    rows = killed.train(resumed, tmp_path / "state", on_epoch=stop)
    assert seen == [1, 2, 3, 4]
    assert timeless(rows) == timeless(expected)
    assert_same(resumed, whole)


def test_killed_and_resumed_is_bit_identical(tmp_path):
    checkpoint = tmp_path / "state"
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, killed.__file__, checkpoint, "3"], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert read(checkpoint)["epoch"] == 2
    resumed, whole = killed.model(), killed.model()
    rows = killed.train(resumed, checkpoint, hooks=[killed.Kill(0)])
    assert timeless(rows) == timeless(killed.train(whole, None))
    assert_same(resumed, whole)


@pytest.mark.parametrize("seed", [None, 0])
def test_a_tasks_loader_goes_on_with_the_epoch_that_was_broken_off(tmp_path, seed):
    labels = torch.arange(10) % 2
    data = Shifted(torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(0)), labels)
    task = classification("spots", data, data, data, classes="ab", example_inputs=(data.images[:2],))

    def run(checkpoint=None, hooks=()):
        seen = []

        def objective(model, batch):
            seen.append(batch[0])
            return {"ce": task.loss(forward(task, model, batch), batch)}

        torch.manual_seed(0)
        batches = loader(task, "train", batch_size=4, seed=seed)
        fit(mlp(16, 4, 2), batches, objective, epochs=4, hooks=hooks, checkpoint=checkpoint)
        return seen

    whole = run(hooks=[Hook()])
    stops = [Stops("on_step_start", epoch=3)]
    with pytest.raises(BrokenOffError):
        run(tmp_path / "state", stops)
    rest = run(tmp_path / "state", stops)
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[6:], strict=True))
    assert torch.equal(whole[0], whole[3]) == (seed is None)


def simple(checkpoint, *, model=None, epochs=2, hooks=(), extra=(), **options):
    data = DataLoader(TensorDataset(torch.ones(4, 3)), batch_size=2)
    model = model or nn.Linear(3, 1)
    return fit(
        model,
        data,
        lambda m, b: {"x": m(b[0]).square().mean() + sum(p.sum() for p in extra)},
        epochs=epochs,
        hooks=hooks,
        checkpoint=checkpoint,
        extra_parameters=extra,
        **options,
    )


def test_extra_parameters_resume(tmp_path):
    extra = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(()))]
    simple(tmp_path / "state", extra=extra)
    fresh = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(()))]
    simple(tmp_path / "state", extra=fresh)
    assert all(torch.equal(a, b) for a, b in zip(extra, fresh, strict=True))


def test_state_of_hooks_of_any_nesting_resumes(tmp_path):
    class Counts(Hook):
        def __init__(self):
            self.state = {"steps": (0, [torch.zeros(2)], {"names": ["a", None]})}

        def on_step_end(self, _):
            steps, (total,), names = self.state["steps"]
            self.state = {"steps": (steps + 1, [total + 1], names)}

        def state_dict(self):
            return self.state

        def load_state_dict(self, state):
            self.state = state

    first, second = Counts(), Counts()
    simple(tmp_path / "state", hooks=[first])
    simple(tmp_path / "state", hooks=[second])
    steps, (total,), names = second.state["steps"]
    assert (steps, total.tolist(), names) == (4, [4.0, 4.0], {"names": ["a", None]})
    assert type(second.state["steps"]) is tuple


def test_a_finished_training_is_not_repeated(tmp_path):
    model, again = nn.Linear(3, 1), nn.Linear(3, 1)
    rows = simple(tmp_path / "state", model=model)
    seen = []
    assert simple(tmp_path / "state", model=again, on_epoch=seen.append) == rows
    assert not seen
    assert_same(model, again)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"epochs": 3}, "epochs is 3, there 2"),
        ({"seed": 1}, "seed is 1, there 0"),
        ({"optimizer": OptimizerSpec(lr=0.2)}, "optimizer is"),
        ({"hooks": [EMA()]}, r"hooks are \['EMA'\], there \[\]"),
        ({"model": nn.Linear(3, 2)}, r"tensor 'bias' has shape \(2,\), there \(1,\)"),
        ({"model": nn.Sequential(nn.Linear(3, 1))}, "tensor '0.bias' has shape"),
        ({"extra": [nn.Parameter(torch.ones(1))]}, "tensor 'extra 0' has shape"),
        ({"precision": "bf16"}, "precision is bf16, there fp32"),
    ],
)
def test_the_checkpoint_of_another_training_is_refused(tmp_path, other, words):
    simple(tmp_path / "state")
    with pytest.raises(ArtifactError, match=f"belongs to another training .*{words}.*; remove it, or give another"):
        simple(tmp_path / "state", **other)


def test_other_frozen_parameters_are_refused(tmp_path):
    model = nn.Linear(3, 1)
    simple(tmp_path / "state", model=model)
    model.bias.requires_grad_(False)
    with pytest.raises(ArtifactError, match="other parameters are trained"):
        simple(tmp_path / "state", model=model)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="is a folder; give a file"):
        simple(tmp_path)
    write(tmp_path / "state", {})
    with pytest.raises(ArtifactError, match="is none of a training"):
        simple(tmp_path / "state")
    Path(tmp_path / "state").write_bytes(b"torn")
    with pytest.raises(ArtifactError, match="is damaged"):
        simple(tmp_path / "state")
