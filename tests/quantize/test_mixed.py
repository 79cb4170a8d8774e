"""Mixed precision: the layers that suffer least are quantized, within what was asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slivo.edits.quantize import QuantizedLayer
from slivo.errors import SlivoError, TargetError
from slivo.quantize import mixed, quantize, sensitivity


def net():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    return made.eval()


X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def size(model):
    return sum(each.numel() * each.element_size() for each in model.state_dict().values())


def test_the_damage_of_a_layer_is_that_of_a_model_in_which_it_alone_is_quantized():
    model = net()
    found = sensitivity(model, "int8-weights", batches=[X[:40], X[40:]], weight_bits=3)
    assert [each.layer for each in found] == [e.layer for e in sorted(found, key=lambda e: e.damage)]
    right = model(X).log_softmax(-1)
    for each in found:
        others = [name for name in ("0", "3", "5") if name != each.layer]
        one = quantize(model, "int8-weights", batches=[X], weight_bits=3, exclude=others)
        wanted = (right.exp() * (right - one(X).log_softmax(-1))).sum(1).mean()
        assert each.damage == pytest.approx(wanted.item(), rel=1e-3, abs=1e-6)
        assert each.quantized_bytes < each.bytes


def test_a_limit_of_damage_is_held_by_all_together():
    model = net()
    whole = mixed(model, "int8-weights", batches=[X], weight_bits=2, max_damage=10.0)
    assert whole.kept == ()
    limit = (whole.layers[0].damage + whole.damage) / 2
    some = mixed(model, "int8-weights", batches=[X], weight_bits=2, max_damage=limit)
    assert some.damage <= limit
    assert some.kept
    for name in ("0", "3", "5"):
        assert isinstance(some.model.get_submodule(name), QuantizedLayer) == (name not in some.kept)
    with pytest.raises(TargetError, match="alone does damage"):
        mixed(model, "int8-weights", batches=[X], weight_bits=2, max_damage=0.0)


def test_a_limit_of_bytes_is_held_with_as_few_layers_as_it_takes():
    model = net()
    least = size(quantize(model, batches=[X]))

    def metric(net):
        return net(X).mean().item()

    worst = sensitivity(model, batches=[X], metric=metric)[-1].layer
    limit = size(quantize(model, batches=[X], exclude=[worst]))
    found = mixed(model, batches=[X], max_bytes=limit, metric=metric)
    assert size(found.model) <= limit
    assert worst in found.kept
    assert len(found.kept) < 3
    assert mixed(model, batches=[X], max_bytes=least).kept == ()
    with pytest.raises(TargetError, match="with all layers quantized"):
        mixed(model, batches=[X], max_bytes=least - 1)
    with pytest.raises(SlivoError, match="nothing to quantize"):
        mixed(model, batches=[X], max_bytes=10**6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "one of them"),
        ({"max_bytes": 1, "max_damage": 1}, "one of them"),
        ({"max_bytes": 0.5}, "max_bytes is 0.5"),
        ({"max_damage": -1}, "max_damage is -1"),
    ],
)
def test_wrong_limits_are_refused(options, words):
    with pytest.raises(SlivoError, match=words):
        mixed(net(), batches=[X], **options)


def test_a_lone_layer():
    (one,) = sensitivity(nn.Linear(6, 3), batches=[X])
    assert one.layer == ""
