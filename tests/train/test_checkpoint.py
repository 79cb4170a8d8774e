"""Checkpoints come back as they were written, and are never half there."""

from pathlib import Path

import pytest
import torch

from slivo.errors import ArtifactError
from slivo.train.checkpoint import read, write


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


TREES = {
    "empty": {},
    "scalars": {"int": 3, "float": 0.1 + 0.2, "inf": float("inf"), "none": None, "true": True, "text": "Ä\n"},
    "nested": {"a": [1, (2, [3, ()]), {"b": {"c": []}}]},
    "int keys": {"state": {0: {"x": 1}, 10: {"x": 2}}},
    "keys like the encoding's": {"$tensor": 1, "$tuple": {"$pairs": torch.ones(1)}},
    "dtypes": {
        str(dtype): torch.ones(3).to(dtype) for dtype in (torch.bfloat16, torch.float64, torch.int8, torch.bool)
    },
    "shapes": {"scalar": torch.tensor(2.5), "none": torch.empty(0, 3), "many": torch.arange(24).view(2, 3, 4)},
    "parameter": {"p": torch.nn.Parameter(torch.ones(2))},
    "same key, other kind": {1: torch.zeros(1), "1": torch.ones(1)},
}


@pytest.mark.parametrize("name", TREES)
def test_round_trip(tmp_path, name):
    write(tmp_path / "state", TREES[name])
    assert same(TREES[name], read(tmp_path / "state"))


def test_layouts_are_kept(tmp_path):
    shared = torch.randn(4, 3, 2, 5)
    tree = {
        "last": shared.to(memory_format=torch.channels_last),
        "turned": shared.permute(2, 0, 3, 1),
        "slice": shared[:, 1],
        "again": shared,
    }
    write(tmp_path / "state", tree)
    back = read(tmp_path / "state")
    assert same(tree, back)
    assert {name: back[name].stride() for name in ("last", "turned")} == {
        name: tree[name].stride() for name in ("last", "turned")
    }


def test_missing_folders_are_made_and_nothing_is_left_beside(tmp_path):
    write(tmp_path / "a" / "b" / "state", {"x": 1})
    write(tmp_path / "a" / "b" / "state", {"x": 2})
    assert read(tmp_path / "a" / "b" / "state") == {"x": 2}
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["state"]


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.99])
def test_a_torn_file_is_refused_and_says_what_to_do(tmp_path, share):
    path = tmp_path / "state"
    write(path, {"weight": torch.randn(100)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ArtifactError, match=r"state is damaged .*; remove it to train from the start"):
        read(path)


def test_any_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "state"
    write(path, {"weight": torch.ones(4), "n": 1})
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ArtifactError, match="remove it to train from the start"):
            read(path)


@pytest.mark.parametrize("fault", ["fsync", "replace"])
def test_the_old_checkpoint_stays_whole_until_the_new_one_is(tmp_path, monkeypatch, fault):
    path = tmp_path / "state"
    write(path, {"x": torch.zeros(3)})

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*(("os.fsync", fail) if fault == "fsync" else (Path, "replace", fail)))
        with pytest.raises(ArtifactError, match="cannot be written: No space left on device"):
            write(path, {"x": torch.ones(3)})
    assert same(read(path), {"x": torch.zeros(3)})
    write(path, {"x": torch.ones(3)})
    assert same(read(path), {"x": torch.ones(3)})


def test_what_it_cannot_hold_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="cannot hold /hooks/0/f: function"):
        write(tmp_path / "state", {"hooks": [{"f": same}]})
    assert not list(tmp_path.iterdir())


def test_missing_and_newer_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ArtifactError, match="nothing cannot be read"):
        read(tmp_path / "nothing")
    write(tmp_path / "state", {})
    monkeypatch.setattr("slivo.train.checkpoint.FORMAT", 2)
    with pytest.raises(ArtifactError, match="is of format 1, this version reads 2"):
        read(tmp_path / "state")
