"""The mask names weights that hold zeros, and where zeros may lie; it changes nothing."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from slivo import artifact, edits
from slivo.edits import Mask
from slivo.edits.mask import Pattern
from slivo.errors import ArtifactError, RecipeError, ShapeError


def net():
    return nn.Sequential(nn.Linear(8, 4), nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(4, 6, 2))


MASK = Mask({"0.weight": "2:4", "1.weight": "4x2", "2.weight": "1:2@0", "0.bias": "unstructured"})


def test_masks_survive_json():
    assert edits.from_json(json.loads(json.dumps(edits.to_json([MASK])))) == (MASK,)


def test_a_mask_changes_nothing_but_the_record():
    model = net()
    same = edits.apply(model, MASK)
    assert edits.record(same) == (MASK,)
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in model.state_dict().items())


def test_artifacts_keep_the_mask_and_the_zeros(tmp_path):
    model = net()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    again = artifact.load(artifact.save(edits.apply(model, MASK), tmp_path / "net"), factory=net)
    assert edits.record(again) == (MASK,)
    assert torch.equal(again[0].weight, model[0].weight)


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        ({"9.weight": "2:4"}, r"no parameter '9\.weight'"),
        ({"1.weight": "2:3"}, r"1\.weight has shape \[8, 4, 3, 3\].* dim 1 into groups of 3, and there are 4 entries"),
        ({"1.weight": "3x2"}, r"dim 0 into groups of 3, and there are 8"),
        ({"0.bias": "2:4"}, r"0\.bias has shape \[4\].*dim 1.*none"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_does_not_fit_is_told(patterns, told, device):
    with torch.device(device):
        model = net()
    with pytest.raises(ShapeError, match=told):
        Mask(patterns).apply_(model)


@pytest.mark.parametrize("written", ["", "4:2", "2:2", "0:4", "0x4", "4x", "2:4@", "dense", None, 3, "2:4 "])
def test_patterns_that_are_none_are_told(written):
    with pytest.raises(RecipeError, match=r"pattern is .*give 'unstructured', N:M as '2:4'"):
        Mask({"weight": written})
    with pytest.raises(ArtifactError, match="newer slivo"):
        edits.from_json([{"kind": "mask", "patterns": {"weight": written}}])


@given(
    st.sampled_from(["unstructured", "2:4", "1:3@0", "2x3", "3x4", "1x1", "1:2@2"]),
    st.lists(st.integers(1, 2), min_size=3, max_size=4),
)
def test_tiles_are_those_of_the_weight_and_go_back(written, times):
    pattern = Pattern.parse(written)
    sides = [*pattern.tile, 1, 1, 1, 1]
    shape = tuple(each * side for each, side in zip(times, sides, strict=False))
    weight = torch.arange(torch.Size(shape).numel()).reshape(shape)
    tiles = pattern.tiles(weight)
    # One by one: the entries whose indices, divided by the tile's sides, are the same.
    slow: dict[tuple[int, ...], list[int]] = {}
    for index in itertools.product(*map(range, shape)):
        tile = tuple(place // side for place, side in zip(index, sides, strict=False))
        slow.setdefault(tile, []).append(int(weight[index]))
    assert sorted(map(sorted, tiles.tolist())) == sorted(slow.values())
    assert torch.equal(pattern.untiled(tiles, shape), weight)


def test_holds_looks_at_every_tile():
    two = Pattern.parse("2:4")
    assert two.holds(torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 1]]))
    assert not two.holds(torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 1]]))
    block = Pattern.parse("2x2")
    assert block.holds(torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0]]))
    assert not block.holds(torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0]]))
    assert Pattern.parse("unstructured").holds(torch.tensor([[0.0, 1.0]]))
