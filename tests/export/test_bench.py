"""Benchmarks of runtimes: what is there is timed, what is not is told, and accuracy is that of the runtime."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import slivo
from slivo.errors import SlivoError
from slivo.export import RUNTIMES, bench, onnx
from slivo.export.bench import sized

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def net(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def test_each_runtime_has_rows_or_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    model, seen = net().train(), []

    def judge(network):
        seen.append(network(X))
        return {"sum": seen[-1].sum().item()}

    rows = bench(
        model, X, teacher=net(32), runtimes=["eager", "onnxruntime", "openvino"], batches=[1, 6], repeats=5, judge=judge
    )
    assert [(row.runtime, row.batch) for row in rows] == [
        ("eager", 1), ("eager", 6), ("onnxruntime", 1), ("onnxruntime", 6), ("openvino", 0),
    ]  # fmt: skip
    for row in rows[:4]:
        assert 0 < row.p50_ms <= row.p95_ms
        assert row.faster > 0
        assert row.teacher_p50_ms > 0
        assert row.metrics["sum"] == pytest.approx(model(X).sum().item(), abs=1e-4)
    assert "pip install 'slivo[openvino]'" in rows[4].reason
    assert rows[4].p50_ms is None
    assert model.training
    assert len(seen) == 2


def test_openvino_is_given_the_file_and_the_threads(monkeypatch):
    given = {}

    class Core:
        def compile_model(self, file, device, settings):
            given.update(settings, device=device)
            run = onnx.runner(file)
            return lambda inputs: dict(enumerate(run(*inputs)))

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core, __version__="1"))
    small = slivo.quantize(net(), "int8-dynamic", batches=[X])
    judge = lambda network: {"gap": (network(X) - small(X)).abs().max().item()}  # noqa: E731
    (row,) = bench(small, X, runtimes=["openvino"], batches=[2], threads=2, repeats=5, judge=judge)
    assert (given["device"], given["INFERENCE_NUM_THREADS"], row.version, row.threads) == ("CPU", 2, "1", 2)
    assert row.metrics["gap"] < 1e-4
    assert row.faster is None


def test_inputs_by_name_and_sizes():
    args, kwargs = sized(((torch.arange(3), 7), {"mask": torch.arange(3)}), 5)
    assert args[0].tolist() == [0, 1, 2, 0, 1]
    assert args[1] == 7
    assert kwargs["mask"].tolist() == [0, 1, 2, 0, 1]


def test_dynamic_layers_agree_with_onnx_runtime_on_all_sizes(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 5, bias=False))
    small = slivo.quantize(model, "int8-dynamic", batches=[X])
    file = onnx.export(small, tmp_path / "net.onnx", X)
    for x in (X[:1], torch.randn(9, 6) * 30, torch.zeros(2, 6)):
        np.testing.assert_allclose(onnx.runner(file)(x.numpy())[0], small(x).numpy(), rtol=1e-4, atol=1e-4)
    with pytest.raises(SlivoError, match="takes linear layers alone"):
        slivo.quantize(nn.Conv1d(6, 2, 1), "int8-dynamic", batches=[torch.randn(2, 6, 3)])


@pytest.mark.parametrize(
    ("options", "words"),
    [({"runtimes": ["tvm"]}, "'tvm' is no runtime"), ({"threads": 0}, "threads is 0"), ({"batches": [0]}, "batches")],
)
def test_what_is_wrong_is_said(options, words):
    with pytest.raises(SlivoError, match=words):
        bench(net(), X, **options)
    assert set(RUNTIMES) == {"eager", "compile", "onnxruntime", "openvino"}
