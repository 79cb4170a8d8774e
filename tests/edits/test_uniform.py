"""Uniform quantizers against the formula in float64, and codes that come back from bytes as they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slivo.edits.uniform import Grid, encode, fit, from_codes, pack, to_codes, unpack
from slivo.errors import SlivoError

SHARINGS = ["tensor", "channel", 4, 5, 64]


def weights(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3


def decoded(weight, grid):
    coded = encode(weight, grid)
    return from_codes(coded.codes, grid, coded.scale, coded.zero_point)


def parts(grid, shape):
    """For each entry of a matrix the number of the entries that share a scale with it."""
    rows, columns = shape
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    if grid.sharing == "tensor":
        return torch.zeros(shape, dtype=torch.long)
    width = columns if grid.sharing == "channel" else grid.sharing
    return row * columns + column // width


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_the_formula_taken_entry_by_entry(bits, symmetric, sharing):
    grid, weight = Grid(bits, symmetric, sharing), weights(0, 3, 12)
    coded = encode(weight, grid)
    low, high = (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    found = from_codes(coded.codes, grid, coded.scale, coded.zero_point)
    for row in range(3):
        for column in range(12):
            at = (0, 0) if sharing == "tensor" else (row, 0 if sharing == "channel" else column // sharing)
            step, zero = float(coded.scale[at]), 0 if symmetric else int(coded.zero_point[at])
            code = min(high, max(low, round(float(weight[row, column]) / step) + zero))
            assert code == int(coded.codes[row, column])
            assert float(found[row, column]) == pytest.approx(step * (code - zero), rel=1e-15)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**32), st.booleans(), st.sampled_from(SHARINGS))
def test_no_part_loses_more_than_by_covering_its_extremes(bits, seed, symmetric, sharing):
    grid, weight = Grid(bits, symmetric, sharing), weights(seed, 4, 9)
    found, part = decoded(weight, grid), parts(Grid(bits, symmetric, sharing), (4, 9))
    for number in part.unique():
        each = weight[part == number]
        low, high = grid.limits
        least, most = each.min().clamp(max=0), each.max().clamp(min=0)
        step = torch.maximum(-least, most) / high if symmetric else (most - least) / high
        step = step.bfloat16().double() if isinstance(sharing, int) else step
        zero = 0 if symmetric else (-least / ((most - least) / high)).round()
        plain = (((each / step).round() + zero).clamp(low, high) - zero) * step
        assert (found[part == number] - each).square().sum() <= (plain - each).square().sum() * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**32), st.booleans(), st.sampled_from(SHARINGS))
def test_zeros_stay_exactly_zero(bits, seed, symmetric, sharing):
    weight = weights(seed, 4, 9) + 0.5
    weight[:, ::2] = 0
    weight[1] = 0
    found = decoded(weight.float(), Grid(bits, symmetric, sharing))
    assert (found[weight == 0] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_on_a_grid_comes_back(symmetric):
    grid = Grid(4, symmetric)
    codes = torch.arange(*grid.limits).repeat(3, 1)
    codes = torch.cat([codes, codes.new_full((3, 1), grid.limits[1])], 1)
    weight = (codes - (0 if symmetric else 5)) * torch.tensor([[0.5], [2.0], [0.125]])
    coded = encode(weight, grid)
    assert torch.equal(coded.codes.long(), codes)
    assert torch.equal(from_codes(coded.codes, grid, coded.scale, coded.zero_point), weight)


def test_a_normal_distribution_in_two_bits_is_clipped_as_it_is_best():
    """Of three levels −S, 0, S the best S for a normal distribution is 1.224 standard deviations (Max 1960)."""
    weight = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    scale, _ = fit(weight, Grid(2))
    assert float(scale) == pytest.approx(1.224, abs=0.05)  # the search goes by 2 % of the greatest, 4.6


def test_least_scales_are_kept():
    floor = torch.full((2, 1), 3.0)
    coded = encode(torch.ones(2, 4), Grid(8), floor=floor)
    assert torch.equal(coded.scale, floor)
    assert (coded.codes == 0).all()


def test_a_convolution_has_groups_along_inputs_and_places():
    weight = weights(0, 3, 4, 2, 2)
    flat = encode(weight.flatten(1), Grid(4, sharing=8))
    coded = encode(weight, Grid(4, sharing=8))
    assert torch.equal(coded.codes, flat.codes.reshape(weight.shape))
    assert torch.equal(coded.scale, flat.scale)
    assert coded.scale.shape == (3, 2)
    assert torch.equal(to_codes(weight, Grid(4, sharing=8), coded.scale, None), coded.codes)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(0, 40), st.integers(0, 2**32))
def test_packing_is_a_bit_stream(bits, count, seed):
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == (count if bits == 8 else -(-count // 8) * bits)
    stream = sum(code << bits * place for place, code in enumerate(codes.tolist()))
    assert int.from_bytes(bytes(packed.tolist()), "little") == stream
    assert torch.equal(unpack(packed, bits, count).long(), codes)


@pytest.mark.parametrize("bits", [1, 9, 4.0, True])
def test_impossible_widths_are_refused(bits):
    with pytest.raises(SlivoError, match="codes have 2 to 8 bits"):
        Grid(bits)


@pytest.mark.parametrize("group", [0, -1, 2.5, "row", True])
def test_impossible_groups_are_refused(group):
    with pytest.raises(SlivoError, match=r"group_size is .*; a count of weights as 64, or 'channel', or 'tensor'"):
        Grid(4, sharing=group)
