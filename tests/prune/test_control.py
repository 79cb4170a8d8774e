"""Steps of cut and recovery, and what validation makes of them."""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import slivo
from slivo import edits
from slivo.edits.follow import follow
from slivo.errors import SlivoError, TargetError
from slivo.measure import cost
from slivo.prune import Budget, iterate, steps

X = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))


def net(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 2))


def train(model, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(X) - X[:, :2]).square().mean().backward()
        optimizer.step()


def test_steps_end_at_the_bytes():
    found = iterate(net(), X, keep=Budget(bytes=0.5), recover=lambda small: None, steps=3)
    least, wider = (cost(net(width), X).size_bytes for width in (found.model[0].out_features + each for each in (0, 1)))
    assert least <= cost(net(), X).size_bytes // 2 < wider


@pytest.mark.parametrize(
    ("kind", "keep"),
    [
        ("linear", Budget(macs=0.25)),
        ("exponential", Budget(params=116)),
        ("cubic", Budget(macs=0.5, params=0.25)),
    ],
)
def test_steps_follow_the_schedule(kind, keep):
    model, seen = net(), []
    found = iterate(model, X, keep=keep, recover=lambda small: seen.append(small[0].out_features), kind=kind, steps=3)
    # 7 MACs and 8 parameters a unit, and 2 biases.
    expected = []
    for number in range(3):
        fits = [64]
        if keep.macs is not None:
            fits.append(int(steps(kind, 3, keep.macs)[number] * 448) // 7)
        if keep.params is not None:
            share = 116 / 514 if keep.params == 116 else keep.params
            fits.append((int(steps(kind, 3, share)[number] * 514 + 1e-6) - 2) // 8)
        expected.append(min(fits))
    assert seen == expected
    assert found.met
    assert all(trial.held and math.isnan(trial.score) for trial in found.trials)
    assert found.model[0].out_features == seen[-1]
    assert len(edits.record(found.model)) == 3
    assert model[0].out_features == 64


@pytest.mark.parametrize(("kind", "least"), [("linear", 16), ("linear", 17), ("linear", 64), ("cubic", 33)])
def test_the_smallest_that_holds_is_found_and_returned(kind, least):
    """Against a network that is good down to a width: the rate falls, and ends within its last fraction of a step."""
    rates = []

    def validate(model):
        rates.append(model[0].out_features)
        return 1.0 if model[0].out_features >= least else 0.5

    found = iterate(
        net(), X, keep=Budget(macs=0.25), recover=lambda small: None, validate=validate, max_drop=0.1, kind=kind,
        steps=4, halvings=3,
    )  # fmt: skip
    assert found.model[0].out_features >= least
    assert found.met == (least <= 16)
    assert all(trial.held == (width >= least) for trial, width in zip(found.trials, rates[1:], strict=True))
    widths = [width for trial, width in zip(found.trials, rates[1:], strict=True) if trial.held]
    assert all(one >= other for one, other in pairwise(widths))
    assert found.model[0].out_features == (widths or [64])[-1]
    if not found.met:
        assert not found.trials[-1].held
        # 4 steps of 8 fractions each: the last refused was one fraction further.
        shares = [1.0, *steps(kind, 32, 0.25)]
        held = min(64, found.trials[-1].keep.macs // 7)
        assert any(int(share * 448 + 1e-6) // 7 == held < least for share in shares)
        assert max(one - other for one, other in pairwise(shares)) * 64 + 1 >= found.model[0].out_features - held


def test_scores_that_are_not_numbers_do_not_hold():
    found = iterate(net(), X, keep=Budget(macs=0.5), recover=lambda small: None, validate=lambda m: 1.0, max_drop=0.0)
    assert found.met
    scores = iter([1.0, *[math.nan] * 9])
    model = net()
    found = iterate(
        model, X, keep=Budget(macs=0.5), recover=lambda small: None, validate=lambda m: next(scores), max_drop=1.0
    )
    assert found.model is model
    assert [trial.held for trial in found.trials] == [False] * 4


def test_the_allowance_is_that_of_the_uncut_model():
    """And not that of the step before: small drops do not add up."""
    scores = iter([0.9, 0.85, 0.81, 0.79, 0.8])
    found = iterate(
        net(), X, keep=Budget(macs=0.5), recover=lambda m: None, validate=lambda m: next(scores), max_drop=0.095,
        steps=3, halvings=1, kind="linear",
    )  # fmt: skip
    assert [(trial.score, trial.held) for trial in found.trials] == [
        (0.85, True),
        (0.81, True),
        (0.79, False),
        (0.8, False),
    ]
    assert [trial.keep.macs for trial in found.trials] == [373, 298, 224, 261]


def test_an_optimizer_goes_on_with_what_it_remembers():
    """As by hand, cut for cut: prune, follow, train."""
    model, other = net(), net()
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, adam)
    other.load_state_dict(model.state_dict())
    found = iterate(model, X, keep=Budget(macs=0.25), recover=train, optimizer=adam, steps=3)
    by_hand, last = torch.optim.Adam(other.parameters(), lr=0.01), other
    by_hand.load_state_dict(adam.state_dict())
    for share in steps("cubic", 3, 0.25):
        small = slivo.prune(last, X, keep=Budget(macs=int(share * 448)))
        by_hand, last = follow(by_hand, last, small), small
        train(last, by_hand)
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), last.parameters(), strict=True))
    assert found.optimizer.state[found.model[0].weight]["step"] == 12
    assert adam.state[model[0].weight]["step"] == 3


def test_a_step_that_is_taken_back_leaves_no_trace():
    """Neither in weights nor in the optimizer: what comes after is as if it had not been tried."""
    scores = iter([1.0, 1.0, 0.0, 0.0, 0.0])
    runs = []
    for validate, keep in ((lambda m: next(scores), 0.2), (lambda m: 1.0, 0.6)):
        model = net()
        adam = torch.optim.Adam(model.parameters(), lr=0.01)
        found = iterate(
            model, X, keep=Budget(macs=keep), recover=train, optimizer=adam, validate=validate, max_drop=0.5,
            kind="linear", steps=2 if keep == 0.2 else 1, halvings=1,
        )  # fmt: skip
        runs.append(found)
    one, other = (run.model for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert torch.equal(
        runs[0].optimizer.state[one[0].weight]["exp_avg"], runs[1].optimizer.state[other[0].weight]["exp_avg"]
    )


def test_recovery_may_return_another_model_and_cuts_may_be_any():
    from_cut = []

    def recover(small):
        from_cut.append(small)
        return nn.Sequential(*small)

    cutter = functools.partial(slivo.prune, criterion="l1", round_to=8)
    found = iterate(net(), X, keep=Budget(macs=0.5), recover=recover, steps=2, prune=cutter)
    assert found.model is not from_cut[-1]
    assert found.model[0] is from_cut[-1][0]
    assert found.model[0].out_features == 32


def test_bad_input_is_told():
    def run(**options):
        given = {"keep": Budget(macs=0.5), "recover": lambda m: None, **options}
        return iterate(net(), X, **given)

    for kind, told, options in (
        (SlivoError, "recover is None; give a function", {"recover": None}),
        (SlivoError, "validate is 1; give a function", {"validate": 1}),
        (SlivoError, "max_drop is -1; 0 or more", {"max_drop": -1, "validate": len}),
        (SlivoError, "give validate=", {"max_drop": 0.1}),
        (SlivoError, "steps is 0; an int of at least 1", {"steps": 0}),
        (SlivoError, "halvings is 0.5; an int", {"halvings": 0.5}),
        (SlivoError, "no schedule is called 'square'", {"kind": "square"}),
        (SlivoError, "recover returned 3; it must return a model", {"recover": lambda m: 3}),
        (SlivoError, "validate returned {}; it must return a number", {"validate": lambda m: {}}),
        (SlivoError, "it must return a new model", {"prune": lambda m, x, keep: m}),
        (TargetError, "keep is 0.5, no Budget", {"keep": 0.5}),
        (TargetError, "the budget cannot be met", {"keep": Budget(macs=0.01)}),
        (TargetError, "a budget of latency has no steps", {"keep": Budget(latency=0.5)}),
    ):
        with pytest.raises(kind, match=told):
            run(**options)
