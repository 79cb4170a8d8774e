"""Quantized layers compute what integer arithmetic says, and replaying the edit gives the same tensors to fill."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from slivo import edits, quantize
from slivo.edits import Quantize
from slivo.edits.quantize import ActivationSpec, QuantSpec, Ranges, affine
from slivo.errors import SlivoError

BYTE = ActivationSpec(8)
STATIC = QuantSpec(7, 0, BYTE)


def quantized(layer, spec=STATIC, ranges=Ranges((-2.0, 3.0))):  # noqa: B008  (frozen)
    return edits.apply(nn.Sequential(layer), Quantize({"0": spec}, {}, {"0": ranges})).eval()[0]


def layers():
    torch.manual_seed(0)
    return {
        "linear": (nn.Linear(12, 5), torch.randn(3, 12)),
        "linear without bias": (nn.Linear(12, 5, bias=False), torch.randn(3, 4, 12)),
        "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 9)),
        "conv2d": (nn.Conv2d(4, 6, 3, groups=2, padding="same"), torch.randn(2, 4, 5, 5)),
        "reflected": (nn.Conv2d(4, 6, (3, 5), padding=(1, 2), padding_mode="reflect"), torch.randn(2, 4, 5, 6)),
        "circular": (nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="circular"), torch.randn(2, 4, 5, 6)),
        "valid": (nn.Conv1d(4, 6, 3, padding="valid", padding_mode="replicate"), torch.randn(2, 4, 5)),
        "conv3d": (nn.Conv3d(2, 4, 2, dilation=2), torch.randn(2, 2, 4, 4, 4)),
    }


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("name", list(layers()))
def test_a_quantized_layer_is_integer_arithmetic(name, axis):
    layer, x = layers()[name]
    new = quantized(layer, QuantSpec(7, axis, BYTE))
    # The same by hand, in float64, which holds all the integers: sums of (code - zero point) times code, then scales.
    scale, zero = float(new.input_scale), int(new.input_zero_point)
    # The nearest code; where a value lies between two, as PyTorch's multiplication by 1/scale rounds it.
    codes = ((x * (1.0 / scale)).round() + zero).clamp(0, 255).double() - zero
    reference = copy.deepcopy(layer).double()
    reference.weight.data = new.weight_codes.double()
    weight_scale = new.weight_scale.double().expand(len(new.weight_codes))
    if layer.bias is not None:
        reference.bias.data = new.bias.double()
    channels = (-1, *[1] * (layer.weight.dim() - 2)) if name[:4] == "conv" or layer.weight.dim() > 2 else (-1,)
    expected = reference(codes) * (weight_scale * scale).view(channels)
    torch.testing.assert_close(new(x).double(), expected, rtol=1e-5, atol=1e-5)


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.integers(2, 8))
def test_activation_codes_cover_the_range_and_hit_zero(a, b, bits):
    low, high = sorted((a, b))
    scale, zero = affine((low, high), bits)
    levels = 2**bits - 1
    assert scale > 0
    assert 0 <= zero <= levels
    # The ends may lie half a step outside, because zero is put on a step.
    assert -zero * scale <= min(low, 0) + 0.5001 * scale
    assert (levels - zero) * scale >= max(high, 0) - 0.5001 * scale


@pytest.mark.parametrize("bits", [1, 9])
def test_impossible_widths_are_refused(bits):
    with pytest.raises(SlivoError, match="2 to 8 bits"):
        affine((0.0, 1.0), bits)


def test_a_channel_without_weights_keeps_its_bias():
    layer = nn.Linear(3, 4)
    nn.init.zeros_(layer.weight)
    layer.weight.data[1] = 1e-12
    layer.bias.data = torch.tensor([0.3, -2.0, 1e4, 0.0])
    new = quantized(layer, STATIC, Ranges((0.0, 1e-3)))
    torch.testing.assert_close(new(torch.ones(1, 3))[0], layer.bias.detach(), rtol=1e-6, atol=1e-7)


def test_a_layer_whose_calibration_inputs_were_all_zero_keeps_its_bias():
    layer = nn.Linear(3, 4)
    new = quantized(layer, STATIC, Ranges((0.0, 0.0)))
    # Half a step of the bias's grid, which is the weight's.
    torch.testing.assert_close(
        new(torch.zeros(1, 3))[0], layer.bias.detach(), rtol=0, atol=float(new.weight_scale.max()) / 2
    )


def test_output_codes():
    layer = nn.Linear(6, 3)
    x = torch.randn(40, 6)
    new = quantized(layer, QuantSpec(8, 0, None, ActivationSpec(3)), Ranges(None, (-1.0, 1.0)))
    out = new(x)
    assert len(out.unique()) <= 8
    inside = (out - F.linear(x, new.weight, new.bias)).abs()[layer(x).abs() < 0.9]
    assert float(inside.max()) <= 0.5001 * float(new.output_scale)


def test_folding_a_batch_norm_changes_nothing_in_float64():
    torch.manual_seed(0)
    for affine_, bias in ((True, True), (False, False), (True, False)):
        net = nn.Sequential(nn.Conv2d(3, 5, 3, bias=bias), nn.BatchNorm2d(5, affine=affine_), nn.ReLU()).double().eval()
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.1, 3)
        if affine_:
            nn.init.normal_(net[1].weight)
            nn.init.normal_(net[1].bias)
        x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
        folded = edits.apply(net, Quantize({}, {"1": "0"}))
        assert isinstance(folded[1], nn.Identity)
        torch.testing.assert_close(folded(x), net(x), rtol=1e-12, atol=1e-12)


def network():
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def test_replay_without_numbers_makes_the_same_tensors():
    edit = Quantize({"0": STATIC, "4": QuantSpec(4, None, BYTE, ActivationSpec(4))}, {"1": "0"})
    with torch.device("meta"):
        skeleton = network()
    made, filled = (edits.apply(net, edit) for net in (skeleton, network()))
    shapes = [{name: (x.shape, x.dtype) for name, x in net.state_dict().items()} for net in (made, filled)]
    assert shapes[0] == shapes[1]
    assert all(x.is_meta for x in made.state_dict().values())


def test_the_edit_survives_json_without_its_ranges():
    edit = Quantize({"a": QuantSpec(4, None, BYTE), "b": QuantSpec(8, 0, None, BYTE)}, {"n": "a"}, {"a": Ranges()})
    (again,) = edits.from_json(json.loads(json.dumps(edits.to_json([edit]))))
    assert again == edit
    assert again.ranges == {}


def test_a_shared_layer_is_replaced_under_all_its_names():
    shared = nn.Linear(4, 4)
    net = edits.apply(nn.ModuleDict({"a": shared, "b": shared, "c": nn.Sequential(shared)}), Quantize({"a": STATIC}))
    assert net["a"] is net["b"] is net["c"][0]


def test_a_lone_layer_is_replaced_itself():
    new = edits.apply(nn.Linear(4, 2), Quantize({"": STATIC}))
    assert new.weight_codes.shape == (2, 4)
    assert len(edits.record(new)) == 1


def test_only_layers_and_norms_are_accepted():
    with pytest.raises(SlivoError, match="0 is a ReLU; only Linear, Conv1d"):
        edits.apply(nn.Sequential(nn.ReLU()), Quantize({"0": STATIC}))
    with pytest.raises(SlivoError, match="LayerNorm cannot be folded"):
        edits.apply(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), Quantize({}, {"1": "0"}))


def test_training_a_quantized_layer_is_refused():
    new = quantized(nn.Linear(4, 2)).train()
    with pytest.raises(SlivoError, match="cannot be trained"):
        new(torch.ones(1, 4))
    with torch.no_grad():
        new(torch.ones(1, 4))


def test_a_quantized_layer_looks_like_the_layer():
    layer = nn.Conv2d(4, 6, 3, stride=2, dtype=torch.bfloat16)
    new = quantized(layer, QuantSpec(7, 0, BYTE, BYTE))
    assert (new.in_channels, new.out_channels, new.stride) == (4, 6, (2, 2))
    assert new.weight.shape == layer.weight.shape
    assert new(torch.ones(1, 4, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert "[6, 4, 3, 3], weight=7 bits, activation=8 bits, output=8 bits" in repr(new)


def test_encoders_of_pytorch_run_without_gradients_too():
    torch.manual_seed(0)
    net, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 3, 8)
    spans = {"linear1": Ranges((-4.0, 4.0)), "linear2": Ranges((0.0, 4.0))}
    new = edits.apply(net, Quantize(dict.fromkeys(spans, STATIC), {}, spans)).eval()
    with torch.no_grad():  # where PyTorch would take its fused layer, which reads weights
        fast = new(x)
    torch.testing.assert_close(fast, new(x).detach())
    torch.testing.assert_close(fast, net(x).detach(), atol=0.1, rtol=0)


def test_codes_of_older_artifacts_stay_one_a_byte():
    """What was written before codes were packed says neither groups nor packing."""
    old = {"modules": {"0": {"weight_bits": 4, "weight_axis": 0, "activation": None, "output": None}}, "folded": {}}
    (edit,) = edits.from_json([{"kind": "quantize", **old}])
    layer = edits.apply(nn.Sequential(nn.Linear(6, 3)), edit)[0]
    held = {name: (each.shape, each.dtype) for name, each in layer.state_dict().items()}
    assert held == {
        "weight_codes": ((3, 6), torch.int8),
        "weight_scale": ((3,), torch.float32),
        "bias": ((3,), torch.float32),
    }


def test_integer_kernels_read_no_groups():
    with pytest.raises(SlivoError, match="integer kernels read plain codes"):
        QuantSpec(4, 0, BYTE, group_size=32)


def test_inputs_are_divided_channel_by_channel():
    for layer, x in (layers()["linear"], layers()["conv2d"]):
        new = quantized(layer, QuantSpec(8, divided=True), Ranges())
        plain = quantized(layer, QuantSpec(8), Ranges())
        new.input_divisor.copy_(torch.tensor([0.5, 2.0, 4.0, 1.0]).repeat(x.shape[1 if x.dim() > 3 else -1] // 4))
        shape = (-1, 1, 1) if x.dim() > 3 else (-1,)
        assert torch.equal(new(x), plain(x / new.input_divisor.float().view(shape)))


def test_compilers_are_given_the_zero_points_that_inductor_wants():
    seen = []

    def look(graph, _):
        seen.extend(node for node in graph.graph.nodes if "dequantize_per_channel" in str(node.target))
        return graph.forward

    torch.manual_seed(0)
    x = torch.randn(8, 6)
    small = quantize(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), batches=[x])
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(small, backend=look)(x), small(x), rtol=0, atol=0)
    assert len(seen) == 4  # two weights, two biases
    assert all(node.args[2] is not None for node in seen)
