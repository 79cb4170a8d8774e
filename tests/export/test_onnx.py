"""An exported file computes what its source does, at any batch size, or is not there."""

from __future__ import annotations

import logging
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from zoo import build

from slivo import edits
from slivo.edits import Quantize
from slivo.edits.quantize import ActivationSpec, QuantSpec, Ranges
from slivo.errors import SlivoError
from slivo.export.onnx import difference, export, runner
from slivo.graph import as_args
from slivo.quantize import quantize


def single(value):
    return pytree.tree_map_only(torch.Tensor, lambda x: x.float() if x.is_floating_point() else x, value)


def ran(path, inputs):
    args, kwargs = as_args(inputs)
    return runner(path)(*(x.numpy() for x in (*args, *kwargs.values())))


@torch.no_grad()
def outputs(model, inputs):
    args, kwargs = as_args(inputs)
    return [x.numpy() for x in pytree.tree_leaves(model(*args, **kwargs))]


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10),
    )  # fmt: skip


BATCH = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def float_file(tmp_path_factory):
    return export(cnn(), tmp_path_factory.mktemp("onnx") / "deep" / "float.onnx", BATCH[:1])


@pytest.fixture(scope="module")
def int8_model():
    return quantize(cnn(), batches=[BATCH])


@pytest.fixture(scope="module")
def int8_file(int8_model, tmp_path_factory):
    return export(int8_model, tmp_path_factory.mktemp("onnx") / "int8.onnx", BATCH[:2])


@pytest.mark.parametrize("name", ["TorchEncoder", "UNet"])
def test_models_of_many_kinds_keep_their_outputs(name, tmp_path):
    model, inputs = build(name)
    model, inputs = model.float(), single(inputs)
    path = export(model, tmp_path / "model.onnx", inputs)
    for found, wanted in zip(ran(path, inputs), outputs(model, inputs), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 16])
def test_the_batch_size_is_free(float_file, size):
    (found,) = runner(float_file, threads=2)(BATCH[:size].numpy())
    np.testing.assert_allclose(found, outputs(cnn().eval(), BATCH[:size])[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1, 16])
def test_int8_files_compute_what_the_quantized_model_does(int8_file, int8_model, size):
    (found,) = runner(int8_file)(BATCH[:size].numpy())
    (wanted,) = outputs(int8_model, BATCH[:size])
    # A value between two codes may be rounded to either: a few steps of the last layer's codes.
    step = float(int8_model[9].input_scale) * float(int8_model[9].weight.abs().amax())
    np.testing.assert_allclose(found, wanted, atol=4 * step)


def test_int8_weights_are_stored_as_int8(int8_file):
    content = onnx.load(int8_file)
    onnx.checker.check_model(content, full_check=True)
    stored = {each.name: each for each in content.graph.initializer if each.name.endswith("weight_codes")}
    assert {each.data_type for each in stored.values()} == {onnx.TensorProto.INT8}
    assert len(stored) == 4
    kinds = Counter(node.op_type for node in content.graph.node)
    assert (kinds["Conv"], kinds["Gemm"], kinds["BatchNormalization"]) == (2, 2, 0)
    assert kinds["QuantizeLinear"] == 5  # four inputs, and the output of the convolution that a mean follows


def test_the_runtime_uses_integer_kernels(int8_file, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(int8_file, options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert (kinds["QLinearConv"], kinds["QGemm"]) == (2, 2)
    assert kinds["Conv"] == kinds["FusedConv"] == kinds["Gemm"] == 0


def test_files_hold_little_more_than_weights(float_file, int8_file):
    weights, channels, nodes = 72 + 1152 + 256 + 160, 50, 40
    # Names and node structure take some hundred bytes a node; a trace of the source code would take thousands.
    assert float_file.stat().st_size < 4 * (weights + channels) + 300 * nodes
    assert int8_file.stat().st_size < weights + 13 * channels + 300 * nodes
    for file in (float_file, int8_file):
        assert list(file.parent.iterdir()) == [file]


def test_narrow_activations_are_clipped(tmp_path):
    edit = Quantize({"0": QuantSpec(4, 0, ActivationSpec(3))}, {}, {"0": Ranges((-1.0, 1.0))})
    model = edits.apply(nn.Sequential(nn.Linear(6, 4)), edit).eval()
    x = torch.linspace(-3, 3, 30).reshape(5, 6)
    (found,) = ran(export(model, tmp_path / "model.onnx", x), x)
    np.testing.assert_allclose(found, outputs(model, x)[0], rtol=1e-5, atol=1e-5)


class Mixed(nn.Module):
    """Keyword inputs in any order, a mask without a batch, and infinities in the output."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x, mask, *, y):
        return {"scores": self.layer(x).masked_fill(mask, float("-inf")), "none": torch.full_like(y, float("inf"))}


def test_only_the_batch_is_free_and_keywords_are_bound(tmp_path):
    model = Mixed().train()
    mask = torch.tensor([True, False, False, True])
    path = export(model, tmp_path / "model.onnx", {"y": torch.ones(2, 5), "mask": mask, "x": torch.ones(2, 3)})
    assert model.training
    names = [each.name for each in onnx.load(path).graph.input]
    assert sorted(names) == ["mask", "x", "y"]
    given = {"y": np.ones((3, 5), "f"), "mask": mask.numpy(), "x": np.ones((3, 3), "f")}
    scores, none = runner(path)(*(given[name] for name in names))
    assert scores.shape == (3, 4)
    assert np.isneginf(scores[:, [0, 3]]).all()
    assert np.isposinf(none).all()


class Choosing(nn.Module):
    """What it computes depends on a value, which PyTorch reports at length."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_export_is_quiet(tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO)
    export(nn.Linear(3, 2), tmp_path / "model.onnx", torch.ones(2, 3))
    with pytest.raises(SlivoError, match="Choosing cannot be exported to ONNX with a free batch size: "):
        export(Choosing(), tmp_path / "other.onnx", torch.ones(2, 3))
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name.startswith("torch.onnx")]
    assert logging.root.manager.disable == 0


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1) * 2


class Forgetful(nn.Module):
    """Computes something else every time it is called."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (FixedBatch(), "FixedBatch cannot be exported to ONNX with a free batch size: "),
        (Forgetful(), "computes something else: output 0 differs by 0.5 of its size, 0.0001 is allowed"),
    ],
)
def test_a_failed_export_leaves_what_was_there(model, message, tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(SlivoError, match=message):
        export(model, path, torch.ones(2, 3))
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"old")
    with pytest.raises(SlivoError):
        export(model, path, torch.ones(2, 3))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_be_written(tmp_path):
    model, x = nn.Linear(3, 2), torch.ones(2, 3)
    (tmp_path / "file").write_text("")
    with pytest.raises(SlivoError, match=r"cannot be written: .*file is a file, not a folder"):
        export(model, tmp_path / "file" / "model.onnx", x)
    with pytest.raises(SlivoError, match="is a folder; give the path of a file"):
        export(model, tmp_path, x)
    with pytest.raises(SlivoError, match="cannot be written: File name too long"):
        export(model, tmp_path / "new" / ("a" * 300), x)
    assert {each.name for each in tmp_path.iterdir()} <= {"file", "new"}


def test_files_that_are_no_onnx(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(SlivoError, match=r"cannot read .*bad\.onnx"):
        runner(tmp_path / "bad.onnx")


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SlivoError, match=r"onnxruntime is not installed .* pip install 'slivo\[export\]'"):
        runner(tmp_path / "model.onnx")


def test_differences_are_relative_to_the_output():
    wanted = np.array([[100.0, -50.0]], np.float32)
    assert difference(wanted, wanted, quantized=False)[0] == 0
    assert difference(wanted + 1, wanted, quantized=False)[0] == pytest.approx(0.01)
    assert difference(wanted + 1, wanted, quantized=True)[0] == pytest.approx(1 / np.sqrt((100**2 + 50**2) / 2))
    assert difference(wanted[:, :1], wanted, quantized=True)[0] == np.inf
    assert np.isnan(difference(wanted * np.nan, wanted, quantized=True)[0])
    assert difference(np.array([True]), np.array([True]), quantized=False)[0] == 0
    assert difference(np.array([np.inf]), np.array([np.inf]), quantized=False)[0] == 0
    assert difference(np.zeros((0, 3)), np.zeros((0, 3)), quantized=False) == (0, 0)


def test_eight_bit_weights_that_overflow_would_be_found():
    # What kernels without VNNI do: sums of two products are cut off at the ends of int16.
    generator = np.random.default_rng(0)
    x, w = generator.integers(0, 256, (64, 32)), generator.integers(-127, 128, (32, 10))
    right = (x[:, :, None] * w).astype(np.int64)
    wrong = np.clip(right[:, ::2] + right[:, 1::2], -(2**15), 2**15 - 1).sum(1)
    gap, limit = difference(wrong.astype(float), right.sum(1).astype(float), quantized=True)
    assert gap > limit
    seven = (x[:, :, None] * (w / 127 * 63).round()).astype(np.int64)
    assert np.abs(seven[:, ::2] + seven[:, 1::2]).max() < 2**15
