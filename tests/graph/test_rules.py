"""Every operator that has a rule: the axes that pass through it are right (they permute), and are found at all."""

from __future__ import annotations

import pytest
import torch
from oracles.permutation import error, outputs, permuted
from torch import nn
from torch.nn import functional as F

import slivo
from slivo.errors import ShapeError, TargetError
from slivo.graph.infer import RULES
from slivo.prune import Plan, cut


class Around(nn.Module):
    """An operator between two linears (or convolutions), so that its dimensions are axes with members."""

    def __init__(self, function, width: int = 12, out: int | None = None, image: bool = False):
        super().__init__()
        self.image = image
        self.before = nn.Conv2d(3, width, 1) if image else nn.Linear(3, width)
        self.other = nn.Parameter(torch.randn(width))
        self.after = nn.Linear(out or width, 2)
        self.function = function

    def forward(self, x):
        x = self.function(self, self.before(x))
        if self.image:
            x = x.flatten(2).mean(-1)
        return self.after(x)


# name: function, number of prunable axes that must be found, options
LINES = {
    "view": (lambda s, x: x.view(2, 5, 3, 4).reshape(2, 5, 12), 2, {}),
    "view_infer": (lambda s, x: x.view(2, 5, -1, 4).flatten(2), 2, {}),
    "unflatten": (lambda s, x: x.unflatten(-1, (3, 4)).flatten(-2), 2, {}),
    "view_as": (lambda s, x: x.view(2, 5, 3, 4).view_as(x), 2, {}),
    "permute": (lambda s, x: x.permute(2, 0, 1).permute(1, 2, 0), 1, {}),
    "transpose": (lambda s, x: x.transpose(1, 2).mT, 1, {}),
    "movedim": (lambda s, x: x.movedim(-1, 0).movedim((0, 1), (2, 0)), 1, {}),
    "squeeze": (lambda s, x: x.unsqueeze(1).squeeze(1).unsqueeze(0).squeeze(), 1, {}),
    "expand": (lambda s, x: x + s.other.expand(2, 5, -1), 1, {}),
    "expand_as": (lambda s, x: x * s.other[None, None].expand_as(x), 1, {}),
    "repeat": (lambda s, x: x.repeat(1, 1, 2), 2, {"out": 24}),
    "repeat_interleave": (lambda s, x: x.repeat_interleave(2, dim=-1), 2, {"out": 24}),
    "cat": (lambda s, x: torch.cat([x, x.relu()], -1), 1, {"out": 24}),
    "stack": (lambda s, x: torch.stack([x, x.tanh()], 0).sum(0), 1, {}),
    "split": (lambda s, x: x.split([4, 8], -1)[1], 2, {"out": 8}),
    "split_size": (lambda s, x: sum(x.split(4, -1)), 1, {"out": 4}),
    "chunk": (lambda s, x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1].sigmoid(), 1, {"out": 6}),
    "unbind": (lambda s, x: x.view(2, 5, 3, 4).unbind(2)[0], 1, {"out": 4}),
    "slice": (lambda s, x: x[..., 3:9], 3, {"out": 6}),
    "slice_step": (lambda s, x: x[..., ::2] + x[..., 1::2], 1, {"out": 6}),
    "narrow": (lambda s, x: x.narrow(-1, 0, 6), 0, {"out": 6}),
    "select": (lambda s, x: x[:, 0], 1, {}),
    "index": (lambda s, x: x[:, torch.tensor([0, 1])], 1, {}),
    "index_columns": (lambda s, x: x[..., torch.tensor([0, 1])], 0, {"out": 2}),
    "index_mask": (lambda s, x: x[:, torch.tensor([True, False, True, False, True])], 0, {}),
    "index_select": (lambda s, x: x.index_select(1, torch.tensor([1, 0])), 1, {}),
    "gather": (lambda s, x: x.gather(1, torch.zeros(2, 1, 12, dtype=torch.long)), 1, {}),
    "scatter": (lambda s, x: torch.zeros_like(x).scatter(1, torch.zeros(2, 5, 12, dtype=torch.long), x), 1, {}),
    "index_put": (lambda s, x: x.index_put((torch.tensor([0]),), torch.tensor(1.0, dtype=x.dtype)), 1, {}),
    "slice_scatter": (lambda s, x: x.slice_scatter(x[:, :2].relu(), 1, 0, 2), 1, {}),
    "select_scatter": (lambda s, x: x.select_scatter(x[:, 0].relu(), 1, 0), 1, {}),
    "pad": (lambda s, x: F.pad(x, (2, 1)), 1, {"out": 15}),
    "pad_rows": (lambda s, x: F.pad(x, (0, 0, 1, 1), mode="reflect"), 1, {}),
    "roll": (lambda s, x: x.roll(1, 1) + x.roll(2, -1), 0, {}),
    "flip": (lambda s, x: x.flip(1), 1, {}),
    "cumsum": (lambda s, x: x.cumsum(1), 1, {}),
    "softmax": (lambda s, x: x.softmax(-1) + x.log_softmax(-1), 1, {}),
    "mean": (lambda s, x: x - x.mean(-1, keepdim=True) + x.sum((0, 1)), 1, {}),
    "var": (lambda s, x: x / (x.var(-1, keepdim=True) + 1) + x.std(-1, keepdim=True), 1, {}),
    "var_mean": (lambda s, x: x * torch.var_mean(x, -1, keepdim=True)[0], 1, {}),
    "var_of_all": (lambda s, x: x * x.var() + x.std(dim=1, keepdim=True), 1, {}),
    "norm": (lambda s, x: F.normalize(x, dim=-1) * x.norm(), 1, {}),
    "max": (lambda s, x: x + x.max(1, keepdim=True)[0] + x.max() + torch.maximum(x, x.tanh()), 1, {}),
    "amax": (lambda s, x: x - x.amax(-1, keepdim=True), 1, {}),
    "argmax": (lambda s, x: x * x.argmax(1, keepdim=True), 1, {}),
    "topk": (lambda s, x: x.topk(2, dim=1)[0], 1, {}),
    "topk_last": (lambda s, x: x.topk(4)[0], 1, {"out": 4}),
    "picked_channels": (lambda s, x: x + x.gather(-1, x.topk(4)[1]).sum(-1, keepdim=True), 1, {}),
    "best_channel": (lambda s, x: x * x.gather(-1, x.argmax(-1, keepdim=True)) + x.max(-1, keepdim=True)[0], 1, {}),
    "best_weight": (
        lambda s, x: x + s.other[x.argmax(-1)][..., None] * s.other.index_select(0, x[0].argmax(-1))[:, None],
        1,
        {},
    ),
    "told_channel": (lambda s, x: x + x.argmax(-1, keepdim=True), 0, {}),
    "told_best": (lambda s, x: x.topk(4)[1].to(x.dtype), 0, {"out": 4}),
    "marked_channels": (lambda s, x: x * torch.zeros_like(x).scatter(-1, x.topk(4)[1], 1.0), 1, {}),
    "sort": (lambda s, x: x.sort(dim=1)[0], 1, {}),
    "glu": (lambda s, x: F.glu(x), 1, {"out": 6}),
    "prelu": (lambda s, x: F.prelu(x.transpose(1, 2), s.other).transpose(1, 2), 1, {}),
    "layer_norm": (lambda s, x: F.layer_norm(x, (12,), s.other, s.other), 1, {}),
    "rms_norm": (lambda s, x: F.rms_norm(x, (12,), s.other), 1, {}),
    "matmul": (lambda s, x: (x @ x.transpose(1, 2)) @ x, 1, {}),
    "bmm": (lambda s, x: torch.bmm(x.transpose(1, 2), x), 0, {}),
    "vector": (lambda s, x: torch.mv(x[0], s.other)[:, None] * x[0] + torch.dot(s.other, s.other), 1, {}),
    "addmm": (lambda s, x: torch.addmm(s.other, x[0], x[0].t() @ x[0]), 1, {}),
    "baddbmm": (lambda s, x: torch.baddbmm(x, x, x.transpose(1, 2) @ x), 1, {}),
    "einsum": (lambda s, x: torch.einsum("bnc,bmc->bnm", x, x) @ torch.einsum("...c,c->...c", x, s.other), 1, {}),
    "einsum_implicit": (lambda s, x: torch.einsum("bnc,c", x, s.other)[..., None] * x, 1, {}),
    "cosine_similarity": (lambda s, x: F.cosine_similarity(x, x.relu(), dim=-1)[..., None] * x, 1, {}),
    "attention": (
        lambda s, x: (
            F.scaled_dot_product_attention(*[x.view(2, 5, 3, 4).transpose(1, 2)] * 3).transpose(1, 2).flatten(2)
        ),
        2,
        {},
    ),
    "grouped_attention": (
        lambda s, x: (
            F.scaled_dot_product_attention(
                x.view(2, 5, 3, 4).transpose(1, 2), *[x.view(2, 5, 3, 4)[:, :, :1].transpose(1, 2)] * 2, enable_gqa=True
            )
            .transpose(1, 2)
            .flatten(2)
        ),
        2,
        {},
    ),
    "masked_attention": (
        lambda s, x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(5, 5).tril().bool()),
        1,
        {},
    ),
    "masked_fill": (lambda s, x: x.masked_fill(torch.ones(5, 1).bool().tril(-1), 0.0), 1, {}),
    "where": (lambda s, x: torch.where(x > 0, x, s.other), 1, {}),
    "filled": (lambda s, x: x + torch.zeros(5, 12) + x.new_ones(12) + torch.full((12,), 2.0), 1, {}),
    "arange": (lambda s, x: x + torch.arange(12), 0, {}),
    "triu": (lambda s, x: x.triu(), 0, {}),
    "no_grad": (lambda s, x: x + no_grad(x), 1, {}),
    "autocast": (lambda s, x: x + autocast(x), 1, {}),
    "in_place": (lambda s, x: x.clone().add_(s.other).relu_().mul_(2), 1, {}),
    "outer": (lambda s, x: torch.outer(x[0, :, 0], s.other) + x, 0, {}),
    "tensordot": (lambda s, x: torch.tensordot(x, x, ([2], [2])).sum((2, 3))[..., None] * x, 1, {}),
    "hstack": (lambda s, x: torch.hstack([x, x.relu()]), 1, {}),
    "kron": (lambda s, x: torch.kron(x[0], torch.ones(1, 2, dtype=x.dtype)), 2, {"out": 24}),
    "cdist": (lambda s, x: torch.cdist(x, x) @ x, 1, {}),
    "pairwise_distance": (lambda s, x: F.pairwise_distance(x, x.relu())[..., None] * x, 1, {}),
    "meshgrid": (lambda s, x: sum(torch.meshgrid(s.other, s.other, indexing="ij")) @ s.other * x, 1, {}),
    "vdot": (lambda s, x: torch.vdot(s.other, s.other) * x, 2, {}),
    "diff": (lambda s, x: x.diff(dim=1), 1, {}),
    "nanmean": (lambda s, x: x - x.nanmean(-1, keepdim=True), 1, {}),
    "quantile": (lambda s, x: x * torch.quantile(x, 0.5, dim=1, keepdim=True), 1, {}),
    "argsort": (lambda s, x: x * x.argsort(1), 1, {}),
    "multi_dot": (lambda s, x: torch.linalg.multi_dot([x[0], x[0].T, x[0]]), 1, {}),
    "matrix_power": (lambda s, x: torch.linalg.matrix_power(x @ x.mT, 2) @ x, 1, {}),
    "lp_pool": (lambda s, x: F.lp_pool1d(x.mT, 2, 2).mT, 1, {}),
    "response_norm": (lambda s, x: F.local_response_norm(x.mT, 3).mT, 0, {}),
    "loss": (lambda s, x: x * F.mse_loss(x, x.sigmoid()), 1, {}),
    "cross_entropy": (lambda s, x: x * F.binary_cross_entropy_with_logits(x, x.sigmoid()), 1, {}),
    "addbmm": (lambda s, x: torch.addbmm(x[0], x @ x.mT, x), 1, {}),
    "unsafe_chunk": (lambda s, x: x.unsafe_chunk(2, -1)[0], 2, {"out": 6}),
    "rot90": (lambda s, x: x.rot90(1, (0, 1)).rot90(-1, (0, 1)), 1, {}),
    "count_nonzero": (lambda s, x: x * x.count_nonzero(-1)[..., None], 1, {}),
    "aminmax": (lambda s, x: x - torch.aminmax(x, dim=-1, keepdim=True)[0], 1, {}),
    "smaller": (lambda s, x: torch.max(x, s.other) - torch.min(x, x.tanh()), 1, {}),
    "cummax": (lambda s, x: x.cummax(1)[0], 1, {}),
    "histc": (lambda s, x: x * torch.histc(x, 4).sum(), 1, {}),
    "complex": (lambda s, x: torch.view_as_real(torch.view_as_complex(x.view(2, 5, 6, 2)) * 2).flatten(2), 1, {}),
    "fft": (
        lambda s, x: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=5, dim=1) + torch.fft.fft2(x, dim=(0, 1)).real,
        1,
        {},
    ),
    "unfold": (lambda s, x: x.unfold(1, 2, 1).sum(-1), 1, {}),
    "diagonal": (lambda s, x: (x @ x.mT).diagonal(dim1=1, dim2=2)[..., None] * x, 1, {}),
    "cross": (lambda s, x: torch.linalg.cross(x[:, :3], x[:, :3].relu(), dim=1), 1, {}),
    "scatter_reduce": (lambda s, x: x.scatter_reduce(1, torch.zeros(2, 5, 12, dtype=torch.long), x, "sum"), 1, {}),
    "scatter_short": (lambda s, x: x.scatter(1, torch.zeros(2, 5, 6, dtype=torch.long), x[..., :6]), 0, {}),
    "index_add": (lambda s, x: x.index_add(1, torch.tensor([0, 1]), x[:, :2]), 1, {}),
    "index_fill": (lambda s, x: x.index_fill(1, torch.tensor([0, 1]), 0.0), 1, {}),
    "index_put_rows": (lambda s, x: x.index_put((torch.tensor([0]),), s.other.expand(5, 12)), 1, {}),
    "index_put_columns": (lambda s, x: filled_column(x, s.other), 1, {}),
    "index_put_mask": (lambda s, x: x.index_put((torch.ones(2, 5).bool(),), s.other), 1, {}),
    "masked_scatter": (lambda s, x: x.masked_scatter(torch.ones(5, 1).bool(), x.relu()), 0, {}),
    "searchsorted": (lambda s, x: x * torch.searchsorted(torch.tensor([0.0, 1.0], dtype=x.dtype), x), 1, {}),
    "bucketize": (lambda s, x: x * torch.bucketize(x, torch.tensor([0.0, 1.0], dtype=x.dtype)), 1, {}),
    "weight_norm": (
        lambda s, x: x @ torch._weight_norm(s.after.weight.T @ s.after.weight, s.after.weight[:1], 1),
        1,
        {},
    ),
    "renorm": (lambda s, x: x.renorm(2, 0, 1.0), 1, {}),
    "empty": (lambda s, x: torch.cat([x[..., :12], x[..., 12:]], -1), 1, {}),
    "randperm": (lambda s, x: x + 0 * torch.randperm(5)[:, None], 1, {}),
    "unknown": (lambda s, x: torch.linalg.matrix_exp(x[:, :4, :4]).sum() + x, 1, {}),
}


def filled_column(x, values):
    x = x.clone()
    x[..., torch.tensor([0])] = values[:1]
    return x


@torch.no_grad()
def no_grad(x):
    return x.sigmoid()


def autocast(x):
    with torch.autocast("cpu", enabled=False):
        return x.sigmoid()


IMAGES = {
    "pool": (lambda s, x: F.max_pool2d(F.avg_pool2d(x, 2), 2), 1, {}),
    "adaptive": (lambda s, x: F.adaptive_avg_pool2d(x, 2) + F.adaptive_max_pool2d(x, 2), 1, {}),
    "interpolate": (lambda s, x: F.interpolate(x, scale_factor=2) + F.interpolate(x, size=16, mode="bilinear"), 1, {}),
    "pixel_shuffle": (lambda s, x: F.pixel_shuffle(x, 2), 1, {"out": 3}),
    "pixel_unshuffle": (lambda s, x: F.pixel_unshuffle(x, 2), 1, {"out": 48}),
    "channel_shuffle": (lambda s, x: F.channel_shuffle(x, 3), 2, {}),
    "batch_norm": (lambda s, x: F.batch_norm(x, s.other, s.other.exp(), s.other, s.other), 1, {}),
    "instance_norm": (lambda s, x: F.instance_norm(x, weight=s.other), 1, {}),
    "group_norm": (lambda s, x: F.group_norm(x, 3, s.other), 2, {}),
    "grid_sample": (lambda s, x: F.grid_sample(x, torch.zeros(2, 4, 4, 2).double(), align_corners=False), 1, {}),
    "channel_pad": (lambda s, x: F.pad(x, (0, 0, 0, 0, 1, 2)), 1, {"out": 15}),
    "fold": (lambda s, x: F.fold(F.unfold(x, 3, padding=1), (8, 8), 3, padding=1), 1, {}),
    "unfolded": (lambda s, x: F.unfold(x, 2, stride=2)[..., None], 1, {"out": 48}),
    "channels_last": (lambda s, x: F.layer_norm(x.permute(0, 2, 3, 1), (12,)).permute(0, 3, 1, 2), 1, {}),
}


def check(model: nn.Module, x: torch.Tensor, wanted: int) -> slivo.trace:
    model = model.double().eval()
    graph, expected = slivo.trace(model, x), outputs(model, x)
    assert len(graph.prunable) == wanted, [(axis.name, axis.size, axis.fixed) for axis in graph.axes]
    for axis in graph.prunable:
        assert error(outputs(permuted(model, axis), x), expected) < 1e-12, axis.name
    return graph


@pytest.mark.parametrize("name", LINES)
def test_operators_on_rows(name):
    function, wanted, options = LINES[name]
    torch.manual_seed(0)
    graph = check(Around(function, **options), torch.randn(2, 5, 3).double(), wanted)
    # A size that depends on values has no rule either.
    assert bool(graph.unknown_ops) == (name in {"unknown", "index_mask"})


@pytest.mark.parametrize("name", IMAGES)
def test_operators_on_images(name):
    function, wanted, options = IMAGES[name]
    torch.manual_seed(0)
    graph = check(Around(function, image=True, **options), torch.randn(2, 3, 8, 8).double(), wanted)
    assert not graph.unknown_ops


def test_an_operator_without_a_rule_fixes_what_it_touches_and_is_listed():
    graph = slivo.trace(Around(LINES["unknown"][0]), torch.randn(2, 5, 3))
    assert "matrix_exp" in " ".join(graph.unknown_ops)
    assert any("has no rule" in (axis.fixed or "") for axis in graph.axes)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, groups=2),
        nn.Conv3d(4, 6, 1),
        nn.ConvTranspose1d(4, 6, 3, groups=2),
        nn.ConvTranspose3d(4, 6, 1),
        nn.Bilinear(4, 4, 6),
        nn.EmbeddingBag(5, 6),
        nn.LazyLinear(6),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers(layer):
    torch.manual_seed(0)
    space = {"Conv1d": (5,), "ConvTranspose1d": (5,), "Conv3d": (2, 2, 2), "ConvTranspose3d": (2, 2, 2)}
    shape = space.get(type(layer).__name__)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 4)
            self.layer, self.last = layer, nn.Linear(6, 2)

        def forward(self, x):
            if isinstance(self.layer, nn.EmbeddingBag):
                return self.last(self.layer(x.long() % 5))
            x = self.first(x)
            if shape is not None:
                x = x.view(2, 4, *[1] * len(shape)).expand(2, 4, *shape)
            x = self.layer(x, x.relu()) if isinstance(self.layer, nn.Bilinear) else self.layer(x)
            return self.last(x.flatten(2).mean(-1) if shape else x)

    x = torch.randn(2, 3)
    model = Net()
    model(x)
    wanted = {"Conv1d": 2, "ConvTranspose1d": 2, "EmbeddingBag": 1}.get(type(layer).__name__, 2)
    graph = slivo.trace(model, x)
    assert len(graph.prunable) >= wanted
    model = model.double()
    for axis in graph.prunable:
        assert error(outputs(permuted(model, axis), x.double()), outputs(model, x.double())) < 1e-12


def test_experts_share_what_they_read_and_write():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.after = nn.Linear(4, 16), nn.Linear(16, 4)
            self.up, self.down = nn.Parameter(torch.randn(2, 16, 32)), nn.Parameter(torch.randn(2, 32, 16))

        def forward(self, x):
            ends = torch.tensor([4, 8], dtype=torch.int32)
            x = F.grouped_mm(self.before(x).bfloat16(), self.up.bfloat16(), offs=ends).relu()
            return self.after(F.grouped_mm(x, self.down.bfloat16(), offs=ends).float())

    graph = slivo.trace(Experts(), torch.randn(8, 4))
    assert not graph.unknown_ops
    assert sorted(axis.size for axis in graph.prunable) == [16, 16, 32]
    assert graph.macs * 8 == 8 * (4 * 16 + 16 * 32 + 32 * 16 + 16 * 4)


class Routed(nn.Module):
    """Experts as the libraries run them: rows are sorted by their experts, and each run of rows has its matrix."""

    def __init__(self, leak: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.leak, self.count, self.router = leak, 6, nn.Linear(8, 6)
        self.up, self.down = nn.Parameter(torch.randn(6, 8, 32)), nn.Parameter(torch.randn(6, 32, 8))

    def forward(self, x):
        weights, experts = self.router(x).softmax(-1).topk(2)
        experts, order = experts.flatten().sort()
        counts = torch.histc(experts.to(x.dtype), bins=self.count, min=0, max=self.count - 1)
        rows = x[order // 2].bfloat16()
        ends = counts.cumsum(0, dtype=torch.int32)
        rows = F.grouped_mm(rows, self.up.bfloat16(), offs=ends).relu()
        rows = F.grouped_mm(rows, self.down.bfloat16(), offs=ends).float()
        if self.leak == "order":
            rows = rows.cumsum(0)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        rows = (rows * weights.flatten()[order][:, None])[back].view(len(x), 2, 8).sum(1)
        return {"": rows, "order": rows, "ends": (rows, ends), "rows": (rows, experts)}[self.leak]


def test_experts_are_an_axis():
    model, x = Routed().eval(), torch.randn(5, 8)
    graph = slivo.trace(model, x)
    axis = graph["experts"]
    assert not graph.unknown_ops
    assert (axis.size, axis.fixed, axis.least, axis.routed) == (6, None, 2, True)
    assert {member.tensor for member in axis.members} == {"router.weight", "router.bias", "up", "down"}
    assert error(outputs(permuted(model, axis), x), outputs(model, x)) < 1e-5
    assert {axis.multiple for axis in graph.axes if axis.size == 32} == {8}


@pytest.mark.parametrize("leak", ["order", "ends", "rows"])
def test_experts_stay_where_their_order_shows(leak):
    graph = slivo.trace(Routed(leak), torch.randn(5, 8))
    assert [axis.fixed is not None for axis in graph.axes if axis.size == 6] == [True]


def test_experts_go_for_parameters_or_on_request_only():
    model, x = Routed().eval(), torch.randn(5, 8)
    small = slivo.prune(model, x, keep=slivo.Budget(macs=0.6))
    assert len(small.up) == 6
    small = slivo.prune(model, x, keep=slivo.Budget(params=0.4), scope="uniform")
    assert 2 <= len(small.up) == len(small.down) == small.count < 6
    assert small.up.shape[2] % 8 == 0
    assert small(torch.randn(9, 8)).shape == (9, 8)  # no number of rows is written into it
    few = slivo.prune(model, x, keep=slivo.Budget(params=0.4), only=["experts"])
    assert few.up.shape == (2, 8, 32)
    assert cut(model, x, Plan({"experts": 6}, {"experts": (1, 4)}))(x).shape == (5, 8)
    with pytest.raises(ShapeError, match=r"keep at least 2 of them, each once, not \[4\]"):
        cut(model, x, Plan({"experts": 6}, {"experts": (4,)}))
    with pytest.raises(TargetError, match="cannot be met"):
        slivo.prune(model, x, keep=slivo.Budget(params=0.1), only=["experts"], min_width=1)


def test_a_rule_that_cannot_read_its_arguments_fixes_what_passes(monkeypatch):
    def misfit(*_):
        raise TypeError("an argument of a form that nobody thought of")

    monkeypatch.setitem(RULES, torch.ops.aten.cumsum, misfit)
    graph = slivo.trace(Around(LINES["cumsum"][0]), torch.randn(2, 5, 3))
    assert graph.unknown_ops == {"cumsum": 1}
    assert any("has no rule" in (axis.fixed or "") for axis in graph.axes)
