"""A training does what it says, and leaves nothing behind but the trained model."""

import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from slivo.errors import SlivoError
from slivo.train import Hook, OptimizerSpec, fit

PLAIN = OptimizerSpec(lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant")


def batches(size=8, batch_size=4, **options):
    data = torch.randn(size, 3, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(data, data.sum(1, keepdim=True)), batch_size=batch_size, **options)


def objective(model, batch):
    error = model(batch[0]) - batch[1]
    return {"square": error.square().mean(), "size": 0.1 * error.abs().mean()}


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def equal(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)


def test_steps_are_plain_gradient_descent_on_the_sum_of_terms():
    model, reference = linear(), linear()
    fit(model, batches(), objective, epochs=2, optimizer=PLAIN)
    for _ in range(2):
        for batch in batches():
            reference.zero_grad()
            sum(objective(reference, batch).values()).backward()
            with torch.no_grad():
                for parameter in reference.parameters():
                    parameter -= 0.1 * parameter.grad
    assert all(torch.allclose(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_rows_say_what_happened():
    seen = []
    model = linear()
    rows = fit(
        model,
        batches(6),
        objective,
        epochs=3,
        optimizer=PLAIN,
        validate=lambda m: {"mode": m.training},
        on_epoch=seen.append,
    )
    assert rows == seen
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert set(row) == {"epoch", "loss", "terms", "lr", "val", "seconds", "samples_per_second"}
        assert set(row["terms"]) == {"square", "size"}
        assert row["loss"] == sum(row["terms"].values())
        assert row["lr"] == 0.1
        assert row["val"] == {"mode": 0.0}
    assert rows[2]["loss"] < rows[0]["loss"]
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_terms_are_means_over_samples_not_batches():
    model = nn.Linear(1, 1)
    data = DataLoader(TensorDataset(torch.tensor([[1.0], [1.0], [1.0], [5.0]])), batch_size=3)
    tiny = OptimizerSpec(lr=1e-12, schedule="constant")
    rows = fit(model, data, lambda m, b: {"x": b[0].mean() + 0 * m(b[0]).mean()}, epochs=1, optimizer=tiny)
    assert rows[0]["terms"]["x"] == pytest.approx(2.0)


def test_batches_may_be_mappings_or_hold_no_tensor():
    model = nn.Linear(1, 1)
    data = [{"name": "a", "x": torch.tensor(1.0)}, {"name": "b", "x": torch.tensor(2.0)}]
    seen = []

    def names(model, batch):
        seen.append(batch["name"])
        return {"x": model(batch["x"].view(-1, 1)).square().mean()}

    fit(model, DataLoader(data, batch_size=2), names, epochs=1)
    fit(model, DataLoader(["ab", "c"], batch_size=None), lambda m, b: {"n": m(torch.ones(1)).sum() * len(b)}, epochs=1)
    assert seen == [["a", "b"]]


def test_hooks_are_called_at_their_points_in_order():
    calls = []

    class Spy(Hook):
        def __init__(self, name):
            self.name = name

    for point in ("fit_start", "step_start", "gradients", "step_end", "epoch_end", "fit_end"):

        def note(self, state, point=point):
            gradients = state.model.weight.grad is not None
            calls.append((self.name, point, state.epoch, state.step, gradients))

        setattr(Spy, f"on_{point}", note)
    fit(linear(), batches(4), objective, epochs=2, hooks=[Spy("a"), Spy("b")])
    expected = [
        ("fit_start", 0, 0, False),
        ("step_start", 1, 0, False),
        ("gradients", 1, 0, True),
        ("step_end", 1, 1, True),
        ("epoch_end", 1, 1, True),
        ("step_start", 2, 1, True),
        ("gradients", 2, 1, True),
        ("step_end", 2, 2, True),
        ("epoch_end", 2, 2, True),
        ("fit_end", 2, 2, True),
    ]
    assert calls == [(name, *row) for row in expected for name in "ab"]


def test_extra_parameters_are_trained_too():
    model, adapter = linear(), nn.Linear(1, 1)
    before = adapter.weight.detach().clone()
    fit(
        model,
        batches(),
        lambda m, b: {"x": adapter(m(b[0])).square().mean()},
        epochs=1,
        extra_parameters=adapter.parameters(),
    )
    assert not torch.equal(adapter.weight, before)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 1))


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_training_is_a_function_of_its_seed_and_leaves_the_callers_randomness_alone(shuffle):
    def run(seed):
        model = net()
        fit(model, batches(shuffle=shuffle), objective, epochs=2, seed=seed)
        return model

    first = run(1)
    draws = []
    for _ in range(2):
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    model = net()
    torch.manual_seed(5)
    fit(model, batches(shuffle=shuffle), objective, epochs=2, seed=1)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == draws[0] == draws[1]
    assert equal(first, model)
    assert not equal(first, run(2))


@pytest.mark.parametrize("own", [False, True])
def test_the_order_is_a_function_of_seed_and_epoch(own):
    def orders(epochs, seed):
        options = {"generator": torch.Generator()} if own else {}
        seen = []

        def spy(model, batch):
            seen.append(batch[0].flatten().tolist())
            return {"x": model(batch[0]).square().mean()}

        data = DataLoader(TensorDataset(torch.arange(32.0).view(-1, 1)), batch_size=32, shuffle=True, **options)
        # A model that draws random numbers of its own must not change the order.
        model = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1)) if epochs == 3 else nn.Linear(1, 1)
        fit(model, data, spy, epochs=epochs, seed=seed)
        return seen

    assert orders(3, seed=4)[:2] == orders(2, seed=4)
    assert len({tuple(order) for order in orders(3, seed=4) + orders(2, seed=5)}) == 5


@pytest.mark.parametrize("before", [None, "no", "bf16"])
def test_no_state_of_accelerate_is_left_behind(before):
    kinds = (AcceleratorState, PartialState, GradientState)
    try:
        if before:
            Accelerator(cpu=True, mixed_precision=before)
        states = [dict(kind._shared_state) for kind in kinds]
        for precision in ("fp32", "bf16", "auto"):
            fit(linear(), batches(), objective, epochs=1, precision=precision)
        assert [dict(kind._shared_state) for kind in kinds] == states
    finally:
        for kind in kinds:
            kind._shared_state.clear()


def test_bf16_computes_in_bf16_and_keeps_fp32_weights():
    model = linear()
    dtypes = []

    def spy(model, batch):
        output = model(batch[0])
        dtypes.append(output.dtype)
        return {"x": (output.float() - batch[1]).square().mean()}

    rows = fit(model, batches(), spy, epochs=4, precision="bf16")
    assert set(dtypes) == {torch.bfloat16}
    assert model.weight.dtype == torch.float32
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("size", [9, 5, 1])
def test_a_last_batch_of_one_does_not_break_batch_norm(size):
    steps = []
    model = net() if size > 1 else nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))

    def spy(model, batch):
        steps.append(len(batch[0]))
        return objective(model, batch)

    fit(model, batches(size), spy, epochs=2)
    assert steps == [4] * (size // 4) * 2 if size > 1 else [1, 1]


def test_without_batch_norm_no_sample_is_left_out():
    rows = []
    fit(linear(), batches(9), lambda m, b: rows.append(len(b[0])) or objective(m, b), epochs=1)
    assert rows == [4, 4, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_it_does_harm(bad):
    model = linear()
    weights = []

    def breaks(model, batch):
        weights.append(model.weight.detach().clone())
        factor = bad if len(weights) == 4 else 1.0
        return {"ce": objective(model, batch)["square"] * factor, "kd": model.weight.sum() * 0}

    with pytest.raises(SlivoError, match=r"epoch 2, step 4 \(ce = (nan|inf), kd = 0\); lower the learning rate \(now"):
        fit(model, batches(), breaks, epochs=2)
    assert torch.equal(model.weight, weights[-1])


def test_impossible_trainings_are_refused():
    class Endless(IterableDataset):
        def __iter__(self):
            yield torch.ones(3)

    with pytest.raises(SlivoError, match="epochs is 0"):
        fit(linear(), batches(), objective, epochs=0)
    with pytest.raises(SlivoError, match="no batches"):
        fit(linear(), batches(2, drop_last=True), objective, epochs=1)
    with pytest.raises(SlivoError, match="no length"):
        fit(linear(), DataLoader(Endless()), objective, epochs=1)
    with pytest.raises(SlivoError, match="nothing to train"):
        fit(nn.ReLU(), batches(), objective, epochs=1)
