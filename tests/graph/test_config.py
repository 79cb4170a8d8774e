"""A model that is made from a configuration can be made again from that of the pruned one, where one can say it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slivo
from slivo.prune import Plan, cut


class Config:
    """What transformers calls a configuration, as far as it matters."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


class Stack(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.layers != 2:
            raise ValueError("two layers, please")
        self.config = config
        self.first = nn.ModuleList([nn.Linear(6, config.inner) for _ in range(config.layers)])
        self.last = nn.ModuleList([nn.Linear(config.inner, 6) for _ in range(config.layers)])

    def forward(self, x: Tensor) -> Tensor:
        for first, last in zip(self.first, self.last, strict=True):
            x = x + last(first(x).relu())
        return x


def stack() -> Stack:
    return Stack(Config(layers=2, inner=16, seldom=True, name="stack", ratio=16.0))


X = torch.randn(3, 6)


def by(first: int, second: int) -> Plan:
    return Plan(
        {"first.0 out": 16, "first.1 out": 16},
        {"first.0 out": tuple(range(first)), "first.1 out": tuple(range(second))},
    )


def test_equal_cuts_are_said_by_the_configuration(tmp_path: Path) -> None:
    model = stack()
    small = cut(model, X, by(10, 10))
    assert small.config.to_dict() == {**model.config.to_dict(), "inner": 10}
    assert model.config.inner == 16
    again = Stack(copy.deepcopy(small.config))
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(X), small(X))
    loaded = slivo.load(slivo.save(small, tmp_path / "net"), factory=stack)
    assert loaded.config.inner == 10
    twice = cut(small, X, Plan({"first.0 out": 10, "first.1 out": 10}, {"first.0 out": (1, 2), "first.1 out": (3, 4)}))
    assert twice.config.inner == 2


@pytest.mark.parametrize("sizes", [(10, 9), (16, 9)])
def test_what_a_configuration_cannot_say_leaves_it_as_it_is(sizes: tuple[int, int]) -> None:
    small = cut(stack(), X, by(*sizes))
    assert small.config.inner == 16
    assert small(X).shape == (3, 6)


def test_a_config_of_another_kind_is_left_alone() -> None:
    model = stack()
    model.config = {"inner": 16}  # type: ignore[assignment]
    assert cut(model, X, by(10, 10)).config == {"inner": 16}
