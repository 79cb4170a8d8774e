"""What one run of a model shows."""

import importlib

import pytest
import torch
from torch import nn
from zoo import build

import slivo
from slivo.graph.inputs import Call
from slivo.graph.survey import survey


class Reading(nn.Module):
    """Reads one of its numbers, and asks for a value if it is told to."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.asks, self.width, self.unread = asks, 3, 3
        self.inner = nn.Linear(3, 3)
        self.again = self.inner

    def forward(self, x):
        if self.asks and float(x.sum()) < 0:
            return x
        return self.again(self.inner(x)).reshape(-1, self.width)


@pytest.mark.parametrize("asks", [False, True])
def test_it_says_what_is_called_and_read(asks):
    found = survey(Reading(asks), Call((torch.ones(2, 3),)))
    assert found.shapes is not asks
    assert not found.calls  # the inner module is called twice
    assert ("", "width") in found.reads
    assert ("", "unread") not in found.reads
    assert {("inner", "weight"), ("again", "weight")} <= found.reads


@pytest.mark.parametrize("name", ["Keeping", "Coupled"])
def test_it_leaves_the_model_and_the_inputs_alone(name):
    model, inputs = build(name)
    before = {key: value.clone() for key, value in [*model.named_parameters(), *model.named_buffers()]}
    args = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    given = [each.clone() for each in args]
    found = survey(model.train(), Call(args))
    assert model.training
    assert found.calls
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(map(torch.equal, args, given))


def test_what_fails_says_so():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        survey(Reading(asks=False), Call((torch.ones(2, 4),)))


def test_no_run_is_spent_on_an_attribute_that_is_not_read(monkeypatch):
    """They are many in large models: sizes that the code used once, to make its layers."""
    search = importlib.import_module("slivo.graph.search")
    tried = []
    put = search.set_
    monkeypatch.setattr(search, "set_", lambda model, settings: (tried.extend(settings), put(model, settings))[1])
    model, inputs = build("Coupled")
    for block in model.blocks:
        block.unread = block.heads
    slivo.prune(model, inputs, keep=slivo.Budget(params=0.6), scope="uniform")
    assert tried
    assert not any(attribute == "unread" for _, attribute, _ in tried)
