"""Artifacts: complete or not there, undamaged or told so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import slivo
from slivo.artifact import read, resolve, size_bytes, verify
from slivo.errors import ArtifactError


def make(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))


@pytest.fixture
def saved(tmp_path) -> Path:
    model = slivo.prune(make(), torch.randn(4, 3), keep=slivo.Budget(params=0.6))
    return slivo.save(model, tmp_path / "model", factory="torch.nn:Identity", meta={"note": "é"})


def test_what_is_saved_is_loaded(tmp_path):
    model = make(12)
    model(torch.randn(5, 3))
    small = slivo.prune(model, torch.randn(4, 3), keep=slivo.Budget(params=0.6)).eval()
    folder = slivo.save(small, tmp_path / "a" / "b", args={"width": 12})
    again = slivo.load(folder, factory=make)
    x = torch.randn(4, 3)
    assert torch.equal(again(x), small(x))
    assert not again.training
    assert {name: value.dtype for name, value in again.state_dict().items()} == {
        name: value.dtype for name, value in small.state_dict().items()
    }


def test_there_is_no_pickle(saved):
    assert sorted(file.name for file in saved.iterdir()) == ["model.safetensors", "slivo.json"]
    assert read(saved)["meta"] == {"note": "é"}
    assert size_bytes(saved) == sum(file.stat().st_size for file in saved.iterdir())


@pytest.mark.parametrize("name", ["slivo.json", "model.safetensors"])
def test_any_flipped_byte_is_found(saved, name):
    file = saved / name
    whole = file.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 60)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x01
        file.write_bytes(bytes(damaged))
        with pytest.raises(ArtifactError, match=r"damaged|format|artifact"):
            verify(saved)
    file.write_bytes(whole)
    verify(saved)


@pytest.mark.parametrize("name", ["slivo.json", "model.safetensors"])
def test_missing_and_cut_off_files_are_named(saved, name):
    whole = (saved / name).read_bytes()
    (saved / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match=name):
        verify(saved)
    (saved / name).unlink()
    with pytest.raises(ArtifactError, match=f"no {name}"):
        verify(saved)


def test_a_newer_format_is_refused(saved):
    from slivo.artifact.store import _seal

    manifest = read(saved)
    (saved / "slivo.json").write_text(_seal({**manifest, "format": 99}))
    with pytest.raises(ArtifactError, match="format 99; this version reads up to 1: upgrade"):
        slivo.load(saved)


def test_a_factory_of_another_shape_is_told(saved):
    with pytest.raises(ArtifactError, match="edits do not fit"):
        slivo.load(saved, factory=lambda: nn.Linear(3, 3))


def test_another_dtype_is_told(tmp_path):
    folder = slivo.save(make(), tmp_path / "m")
    with pytest.raises(ArtifactError, match=r"0\.weight is torch\.float32 .*model has torch\.float64"):
        slivo.load(folder, factory=lambda: make().double())


class Caching(nn.Module):
    """Keeps what it computed in the last run out of its checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache = torch.arange(len(x))[:, None]
        return self.linear(x) + self.cache


def test_a_cache_may_have_any_shape(tmp_path):
    model = Caching()
    model(torch.randn(3, 2))
    again = slivo.load(slivo.save(model, tmp_path / "m"), factory=Caching)
    assert torch.equal(again.cache, torch.arange(3)[:, None])
    assert "cache" not in again.state_dict()


def test_missing_and_extra_tensors_are_named(tmp_path):
    folder = slivo.save(nn.Sequential(nn.Linear(2, 2, bias=False)), tmp_path / "m")
    with pytest.raises(ArtifactError, match=r"no tensor .0\.bias"):
        slivo.load(folder, factory=lambda: nn.Sequential(nn.Linear(2, 2)))
    folder = slivo.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "m")
    with pytest.raises(ArtifactError, match=r"0\.bias. that the factory.s model lacks"):
        slivo.load(folder, factory=lambda: nn.Sequential(nn.Linear(2, 2, bias=False)))


def test_without_a_factory_it_says_so(tmp_path):
    with pytest.raises(ArtifactError, match="does not name a factory"):
        slivo.load(slivo.save(make(), tmp_path / "m"))


def test_an_artifact_is_replaced_and_other_folders_are_left_alone(tmp_path):
    slivo.save(make(8), tmp_path / "m")
    slivo.save(make(4), tmp_path / "m")
    assert slivo.load(tmp_path / "m", factory=lambda: make(4))[0].out_features == 4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="exists and is no slivo artifact"):
        slivo.save(make(), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["m", "mine"]


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        slivo.save(make(), tmp_path / "file" / "m")


def test_values_that_are_no_json_leave_nothing_behind(tmp_path):
    with pytest.raises(ArtifactError, match="must be JSON values"):
        slivo.save(make(), tmp_path / "m", args={"width": object()})
    assert list(tmp_path.iterdir()) == []


class Constant(nn.Module):
    """Keeps a tensor that is no buffer, so it cannot be made without numbers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.offset = torch.tensor([1.0, 2.0])

    def forward(self, x):
        return self.linear(x) + self.offset


class Counting(nn.Module):
    """Its constructor asks a tensor for a number."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, int(torch.ones(3).sum().item()))

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("factory", [Constant, Counting])
def test_models_that_need_numbers_when_they_are_made(tmp_path, factory):
    model, x = factory(), torch.randn(1, 2)
    again = slivo.load(slivo.save(model, tmp_path / "m"), factory=factory)
    assert torch.equal(again(x), model(x))


def test_tied_weights_are_stored_once(tmp_path):
    def tied():
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        model[1].weight = model[0].weight
        return model

    model = tied()
    folder = slivo.save(model, tmp_path / "m")
    again = slivo.load(folder, factory=tied)
    assert again[1].weight is again[0].weight
    assert json.loads((folder / "slivo.json").read_text())["slivo"]["tied"] == {"1.weight": "0.weight"}


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("torch.nn", "not of the form package.module:callable"),
        (":Linear", "not of the form"),
        ("no_such_module:f", "module 'no_such_module' cannot be imported"),
        ("torch.nn:Lineal", "torch.nn has no 'Lineal'; it has"),
        ("torch:version", "not a callable"),
    ],
)
def test_references_that_lead_nowhere(reference, told):
    with pytest.raises(ArtifactError, match=told):
        resolve(reference)


def test_a_module_that_fails_while_it_is_imported_is_told(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ArtifactError, match="cannot be imported: division by zero"):
        resolve("broken_module:f")
    sys.modules.pop("broken_module", None)
