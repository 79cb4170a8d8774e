"""GPTQ against the formula taken column by column, AWQ by what it must not do, and whole models by their outputs."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import save
from torch import nn

import slivo
from slivo.edits.quantize import QuantizedLayer
from slivo.edits.uniform import Grid, encode, from_codes
from slivo.errors import SlivoError
from slivo.export import onnx
from slivo.measure import cost
from slivo.quantize.awq import awq, smoothing
from slivo.quantize.gptq import gptq, loss

GRIDS = [
    Grid(3),
    Grid(4, sharing=8),
    Grid(3, symmetric=False, sharing=5),
    Grid(2, symmetric=False),
    Grid(4, True, "tensor"),
]


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def correlated(rows, columns):
    """Inputs that tell something of one another, some louder than others."""
    return noise(rows, columns) @ (torch.eye(columns).double() + 0.5 * noise(columns, columns)) * noise(columns).exp()


def decoded(coded, grid):
    return from_codes(coded.codes, grid, coded.scale, coded.zero_point)


def slow(weight, hessian, grid, act_order):
    """Round column by column; the inverse is that of the columns left, computed anew for each."""
    weight, size = weight.clone(), len(hessian)
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(size))
    group, fitted = grid.sharing if isinstance(grid.sharing, int) else size, {}
    for place, column in enumerate(order):
        left, here = order[place:], column // group
        inverse = torch.linalg.inv(hessian[left][:, left])[0]
        if here not in fitted:
            coded = encode(weight[:, here * group : (here + 1) * group], grid)
            fitted[here] = coded.scale[:, 0], 0 if grid.symmetric else coded.zero_point[:, 0]
        step, zero = fitted[here]
        rounded = (((weight[:, column] / step).round() + zero).clamp(*grid.limits) - zero) * step
        weight[:, left] -= ((weight[:, column] - rounded) / inverse[0])[:, None] * inverse
        weight[:, column] = rounded
    return weight


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("columns", [7, 100])
@pytest.mark.parametrize("grid", GRIDS)
def test_gptq_is_the_formula_where_that_is_better_than_rounding(grid, columns, act_order):
    torch.manual_seed(0)
    weight, x = noise(6, 20), correlated(60, 20)
    gram = x.T @ x
    damped = gram + 0.02 * gram.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    found = decoded(gptq(weight, gram, grid, damping=0.02, columns=columns, act_order=act_order), grid)
    formula, nearest = slow(weight, damped, grid, act_order), decoded(encode(weight, grid), grid)
    better = loss(weight, formula, gram) < loss(weight, nearest, gram)
    assert better.sum() >= 3
    torch.testing.assert_close(found, torch.where(better[:, None], formula, nearest))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("seed", range(3))
def test_no_row_errs_more_than_by_rounding(grid, seed):
    torch.manual_seed(seed)
    weight, x = noise(8, 16), correlated(10, 16)  # fewer samples than inputs
    gram = x.T @ x
    nearest = loss(weight, decoded(encode(weight, grid), grid), gram)
    assert (loss(weight, decoded(gptq(weight, gram, grid), grid), gram) <= nearest).all()
    scaled = awq(weight[None], gram[None], x.abs().mean(0)[None], grid)
    assert loss(weight, decoded(scaled, grid) / scaled.divisor, gram).sum() <= nearest.sum()


def test_gptq_does_not_mind_the_order_of_inputs_and_outputs():
    torch.manual_seed(0)
    weight, x = noise(5, 18), correlated(50, 18)
    rows, columns = torch.randperm(5), torch.randperm(18)
    plain = gptq(weight, x.T @ x, Grid(3)).codes
    moved = gptq(weight[rows][:, columns], x[:, columns].T @ x[:, columns], Grid(3)).codes
    assert torch.equal(moved, plain[rows][:, columns])


@pytest.mark.parametrize("grid", [Grid(4), Grid(8, sharing=6)])
def test_what_is_on_the_grid_already_is_kept(grid):
    torch.manual_seed(0)
    x = correlated(40, 12)
    codes = torch.randint(grid.limits[0], grid.limits[1] + 1, (4, 12))
    codes[:, ::6] = grid.limits[1]
    weight = codes.double() * 0.25
    assert torch.equal(decoded(gptq(weight, x.T @ x, grid), grid), weight)
    assert (awq(weight[None], (x.T @ x)[None], x.abs().mean(0)[None], grid).divisor == 1).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_pruned_weights_stay_zero(grid):
    torch.manual_seed(0)
    weight, x = noise(6, 16), correlated(60, 16)
    weight[torch.rand(6, 16) < 0.5] = 0
    gram = x.T @ x
    scaled = awq(weight[None], gram[None], x.abs().mean(0)[None], grid)
    for found in (gptq(weight, gram, grid), scaled):
        assert (decoded(found, grid)[weight == 0] == 0).all()


def test_without_any_activity_codes_are_the_nearest():
    weight, nothing = noise(3, 8), torch.zeros(8, 8, dtype=torch.float64)
    assert torch.equal(gptq(weight, nothing, Grid(4)).codes, encode(weight, Grid(4)).codes)
    assert torch.equal(
        awq(weight[None], nothing[None], torch.zeros(1, 8), Grid(4)).codes, encode(weight, Grid(4)).codes
    )


def test_smoothing_is_centered_and_bounded():
    found = smoothing(torch.tensor([16.0, 1.0, 0.0625]), 0.5)
    assert found.tolist() == [4.0, 1.0, 0.25]
    assert smoothing(torch.tensor([0.0, 1.0]), 1.0).tolist() == [0.010009765625, 100.0]


# Whole models.


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 40), nn.ReLU(), nn.Linear(40, 5),
    ).eval()  # fmt: skip


BATCHES = [torch.rand(8, 2, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def blocks():
    torch.manual_seed(0)
    block = [nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(3)]
    return nn.Sequential(nn.Sequential(*block), nn.Linear(16, 4)).eval()


@torch.no_grad()
def apart(new, model, batches):
    return float(sum((new(x) - model(x)).square().sum() for x in batches))


@pytest.mark.parametrize("options", [{}, {"method": "gptq"}, {"method": "awq"}, {"method": "gptq", "act_order": False}])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("make", [net, blocks])
def test_models_survive_saving_bit_by_bit(make, symmetric, options, tmp_path):
    model, batches = make(), BATCHES if make is net else [torch.randn(24, 16) for _ in range(2)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    new = slivo.quantize(model, "int4-weights", batches=batches, group_size=24, symmetric=symmetric, **options)
    assert apart(new, model, batches) < 0.1 * apart(lambda x: 0 * model(x), model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = slivo.load(slivo.save(new, tmp_path / "model"), factory=make)
    assert all(torch.equal(again(x), new(x)) for x in batches)
    assert cost(again, batches[0]).params == cost(new, batches[0]).params


@pytest.mark.parametrize("make", [net, blocks])
def test_samples_help(make):
    """A network's output moves less; with so few bits rounding is far from the best."""
    model = make()
    batches = BATCHES if make is net else [torch.randn(24, 16) @ torch.randn(16, 16) for _ in range(4)]
    found = {
        method: apart(
            slivo.quantize(model, "int4-weights", batches=batches, weight_bits=3, method=method), model, batches
        )
        for method in ("round", "gptq")
    }
    assert found["gptq"] < found["round"]


@pytest.mark.parametrize("bits", range(2, 9))
def test_bytes_are_those_of_the_bits(bits):
    model = nn.Sequential(nn.Linear(256, 512, bias=False))
    new = slivo.quantize(model, "int4-weights", batches=[torch.randn(2, 256)], weight_bits=bits, group_size=128)
    codes, scales = 256 * 512 * bits // 8, 2 * 2 * 512
    assert 0 <= len(save(new.state_dict())) - codes - scales < 400  # of a header
    assert new[0].weight.shape == (512, 256)
    assert cost(new, torch.randn(2, 256)).params == 256 * 512


def test_a_mask_is_kept_in_a_whole_model():
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(40, 16)
    with torch.no_grad():
        model[0].weight[:, ::3] = 0
    for options in ({}, {"method": "gptq"}, {"method": "awq"}, {"symmetric": False}):
        new = slivo.quantize(model, "int4-weights", batches=[x], group_size=5, **options)
        assert (new[0].weight[:, ::3] == 0).all()


def test_a_lone_layer_and_half_precision():
    layer, x = nn.Linear(16, 8).bfloat16(), torch.randn(40, 16).bfloat16()
    new = slivo.quantize(layer, "int4-weights", batches=[x], method="gptq")
    assert isinstance(new, QuantizedLayer)
    assert new(x).dtype == torch.bfloat16
    assert "weight=4 bits" in repr(new)
    assert "group_size=4" in repr(slivo.quantize(layer, "int4-weights", batches=[x], group_size=4))


def test_layers_that_are_not_seen_are_told_and_rounded(caplog):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.register_forward_pre_hook(lambda module, args: None)

        def forward(self, x):
            weight = self.two.weight.clone()  # no view of it is multiplied
            self.two.forward = lambda x: nn.functional.linear(x, weight)
            try:
                return self.two(self.one(x))
            finally:
                del self.two.forward

    with caplog.at_level(logging.WARNING, "slivo"):
        slivo.quantize(Own().eval(), "int4-weights", batches=[torch.randn(8, 4)], method="gptq")
    assert "two are rounded to the nearest codes" in caplog.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [{"method": "awq"}, {"weight_bits": 3, "symmetric": False}])
def test_exported_weights_are_the_same(options, tmp_path):
    model = net()
    new = slivo.quantize(model, "int4-weights", batches=BATCHES, group_size=24, **options)
    run = onnx.runner(onnx.export(new, tmp_path / "new.onnx", BATCHES[0]))
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(run(BATCHES[1].numpy())[0]), new(BATCHES[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gpt"}, "method is 'gpt'; one of round, gptq, awq"),
        ({"group_size": 0}, "group_size is 0; a count of weights"),
        ({"group_size": "tensor", "method": "gptq"}, "gptq has no use for one scale a tensor"),
        ({"damping": 0.0, "method": "gptq"}, "damping is 0.0; a positive number"),
        ({"weight_bits": 1}, "codes have 2 to 8 bits"),
        ({"scheme": "int8-static", "group_size": 32}, "group_size is an option of int8-weights, int4-weights"),
        ({"batches": [torch.full((2, 2, 6, 6), torch.nan)], "method": "gptq"}, "what 0 reads is NaN or infinite"),
    ],
)
def test_mistakes_are_explained(options, message):
    with pytest.raises(SlivoError, match=message):
        slivo.quantize(net(), **{"scheme": "int4-weights", "batches": BATCHES, **options})
