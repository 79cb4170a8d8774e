"""Quantized models compute nearly what their sources do, take a quarter of the bytes, and survive saving."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from safetensors.torch import save
from torch import nn
from torch.utils import _pytree as pytree
from zoo import ZOO, build

import slivo
from slivo import edits
from slivo.edits.quantize import QuantizedLayer
from slivo.errors import SlivoError
from slivo.graph import as_args
from slivo.quantize import SCHEMES, quantize

# Left out: one with a constant in float64, which does not run in float32, one whose only linear layer is tied, and one
# whose layers all compute their weights.
MODELS = sorted(set(ZOO) - {"SuperResolution", "LanguageModel", "NormalizedWeights"})
CASES = [(name, "int8-static") for name in MODELS] + [("ResNet", "int8-weights"), ("Transformer", "int8-weights")]
CASES += [("ResNet", "int4-weights"), ("Transformer", "int4-weights")]
CASES += [("Transformer", "int8-dynamic")]


def single(value):
    return pytree.tree_map_only(torch.Tensor, lambda x: x.float() if x.is_floating_point() else x, value)


def source(name):
    model, inputs = build(name)
    return model.float(), single(inputs)


@torch.no_grad()
def outputs(model, inputs):
    args, kwargs = as_args(inputs)
    return pytree.tree_leaves(model(*args, **kwargs))


def loss(new, model, inputs):
    """Root mean square of the change, in units of the outputs' own."""
    pairs = zip(outputs(new, inputs), outputs(model, inputs), strict=True)
    return max(float((a - b).square().mean().sqrt() / b.square().mean().sqrt()) for a, b in pairs)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_any_model_keeps_its_outputs_and_survives_saving(name, scheme, tmp_path):
    model, inputs = source(name)
    before = copy.deepcopy(model.state_dict())
    new = quantize(model, scheme, batches=[inputs])
    assert any(isinstance(module, QuantizedLayer) for module in new.modules())
    # A code of 7 bits errs by 1/250 of its range at most, and one of 4 by 1/30; a few layers add up.
    assert loss(new, model, inputs) < (0.3 if scheme == "int4-weights" else 0.03)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert edits.record(model) == ()
    make = ZOO[name][0]
    again = slivo.load(slivo.save(new, tmp_path / "model"), factory=lambda: make().float())
    assert edits.record(again) == edits.record(new)
    assert all(map(torch.equal, outputs(again, inputs), outputs(new, inputs)))


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


BATCHES = [torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def test_every_scheme_is_tested():
    assert {scheme for _, scheme in CASES} == set(SCHEMES)


def test_weights_take_a_quarter_of_the_bytes():
    model = cnn()
    sizes = [len(save(net.state_dict())) for net in (model, quantize(model, batches=BATCHES))]
    assert sizes[1] < 0.28 * sizes[0]  # scales, biases and names are the rest


def test_more_bits_lose_less():
    model = cnn().eval()
    lost = [loss(quantize(model, "int8-weights", batches=BATCHES, weight_bits=b), model, BATCHES[0]) for b in (3, 5, 8)]
    assert lost[0] > 2 * lost[1] > 4 * lost[2]


def test_the_model_is_left_as_it_was():
    model = cnn().train()
    new = quantize(model, batches=iter(BATCHES))
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not new.training
    assert int(model[1].num_batches_tracked) == 0


def test_excluded_layers_stay_in_floating_point():
    new = quantize(cnn(), batches=BATCHES, exclude=["0", "1*"])
    kinds = {name: type(module) for name, module in new.named_children()}
    assert (kinds["0"], kinds["1"], kinds["3"], kinds["10"]) == (nn.Conv2d, nn.BatchNorm2d, QuantizedLayer, nn.Linear)


def test_tied_weights_stay_in_floating_point():
    model, tokens = source("Transformer")
    new = quantize(model, batches=[tokens])
    assert new.head.weight is new.embed.weight


def test_a_model_that_cannot_be_captured_is_quantized_without_folding(caplog):
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.conv(torch.from_numpy(x.numpy() + 1)))

    model = Choosing().eval()
    x = torch.randn(4, 2, 5)
    with caplog.at_level(logging.WARNING, "slivo"):
        new = quantize(model, batches=[x])
    assert "batch norms are not folded" in caplog.text
    assert isinstance(new.norm, nn.BatchNorm1d)
    assert loss(new, model, x) < 0.03


def test_quantizing_after_pruning_replays_both(tmp_path):
    model = cnn().eval()
    small = slivo.prune(model, BATCHES[0], keep=slivo.Budget(macs=0.5))
    new = slivo.quantize(small, batches=BATCHES)
    assert [edit.kind for edit in edits.record(new)] == ["cut", "quantize"]
    again = slivo.load(slivo.save(new, tmp_path / "new"), factory=cnn)
    assert torch.equal(again(BATCHES[0]), new(BATCHES[0]))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            cnn,
            {"scheme": "int4"},
            "'int4' is no scheme of quantization; there are int8-static, int8-dynamic, int8-weights",
        ),
        (cnn, {"batches": []}, "there are no batches to calibrate on"),
        (cnn, {"exclude": ["head"]}, "'head' matches no layer that can be quantized; there are 0, 3"),
        (cnn, {"exclude": ["*"]}, "nothing to quantize"),
        (nn.ReLU, {}, "nothing to quantize"),
        (cnn, {"weight_bits": 0}, "2 to 8 bits"),
        (cnn, {"weight_bits": 9, "scheme": "int8-weights"}, "2 to 8 bits"),
    ],
)
def test_mistakes_are_explained(model, options, message):
    with pytest.raises(SlivoError, match=message):
        quantize(model(), **{"batches": BATCHES, **options})
