"""Whole networks of low rank: as close as can be, within budgets, saved as they are, whatever they are made of."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import slivo
from slivo import Budget, SlivoError, TargetError, edits
from slivo.edits.factorize import Factorize, Factors
from slivo.factorize.ladder import Ladder, allocate, cost, kinds, steps
from slivo.factorize.sites import find
from slivo.graph import Call
from slivo.measure import cost as measured


def mlp(*widths: int) -> nn.Sequential:
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def conv_net(width: int = 8, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, **options),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, (3, 5), stride=2, padding=(1, 2), **options),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, 12),
    )


def random_net(seed: int) -> tuple[nn.Module, Tensor]:
    """A network of random widths and depths: of images or of vectors."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    if seed % 2:
        return mlp(*(chance.randint(20, 60) for _ in range(chance.randint(3, 6)))), torch.randn(3, 0)
    return conv_net(chance.randint(8, 14), padding_mode=chance.choice(["zeros", "reflect"])), torch.randn(3, 3, 9, 8)


def net_and_input(seed: int) -> tuple[nn.Module, Tensor]:
    net, x = random_net(seed)
    return net.eval(), x if x.numel() else torch.randn(3, net[0].in_features)


def edit_of(model: nn.Module) -> Factorize:
    found = edits.record(model)[-1]
    assert isinstance(found, Factorize)
    return found


def ranks_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: each.ranks for name, each in edit_of(model).modules.items()}


def weight_of(thin: nn.Module) -> Tensor:
    return thin[1].weight @ thin[0].weight


# Budgets.


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("what", ["params", "macs", "bytes"])
def test_budgets_are_hit_and_never_exceeded(seed: int, what: str) -> None:
    net, x = net_and_input(seed)
    before = measured(net, x)
    names = {"params": "params", "macs": "macs", "bytes": "size_bytes"}
    sites, _ = find(net, Call((x,)), (), ())
    for share in (0.8, 0.6):
        small = slivo.factorize(net, x, keep=Budget(**{what: share}))
        limit, found = share * getattr(before, names[what]), getattr(measured(small, x), names[what])
        chosen = edit_of(small).modules
        # The least that any layer could still take: no step may fit in what room is left.
        gaps = []
        for name, site in sites.items():
            now = cost(site, chosen.get(name), [what])[0]
            ladder = [Factors(kind, each) for kind in kinds(site, "auto") for each in steps(site, kind, 1)]
            gaps += [more - now for each in (*ladder, None) if (more := cost(site, each, [what])[0]) > now]
        assert found <= limit
        assert found >= 0.99 * limit or limit - found < max(gaps) or not gaps
        assert found >= 0.9 * limit


def test_several_things_are_held_at_once() -> None:
    net, x = net_and_input(0)
    small, before = slivo.factorize(net, x, keep=Budget(params=0.7, macs=0.6)), measured(net, x)
    after = measured(small, x)
    assert after.params <= 0.7 * before.params
    assert after.macs <= 0.6 * before.macs


def test_a_count_in_place_of_a_share_and_a_budget_that_all_fits() -> None:
    net, x = net_and_input(1)
    limit = measured(net, x).params - 500
    assert limit - 60 < measured(slivo.factorize(net, x, keep=Budget(params=limit)), x).params <= limit
    whole = slivo.factorize(net, x, keep=Budget(params=1.0))
    assert not edit_of(whole).modules
    assert set(edit_of(whole).left.values()) == {"the budget leaves it"}
    assert torch.equal(whole(x), net(x))


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    net = mlp(32, 32, 32)
    with pytest.raises(
        TargetError, match=r"cannot be met by factorizing: parameters: .* 128 \(of 2,048\) is the least"
    ):
        slivo.factorize(net, torch.randn(2, 32), keep=Budget(params=0.05))
    with pytest.raises(TargetError, match="lower round_to"):
        slivo.factorize(net, torch.randn(2, 32), keep=Budget(params=0.3), round_to=8)
    with pytest.raises(TargetError, match="0 in all, 0"):
        slivo.factorize(net, torch.randn(2, 32), keep=Budget(params=0.1), ranks={"*": 8})


def test_latency_is_what_the_timer_says() -> None:
    net, x = mlp(40, 40, 40), torch.randn(2, 40)
    timed: list[float] = []

    def timer(model: nn.Module) -> float:
        assert all(each.isfinite().all() for each in model.parameters())
        timed.append(1.0 + sum(each.numel() for each in model.parameters()) / 1000)
        return timed[-1]

    whole = timer(net)
    small = slivo.factorize(net, x, keep=Budget(latency=0.7), timer=timer)
    assert 0.65 * whole < timer(small) <= 0.7 * whole
    small = slivo.factorize(net, x, keep=Budget(latency_ms=2.5, params=0.9), timer=timer)
    assert 2.3 < timer(small) <= 2.5
    loose = slivo.factorize(net, x, keep=Budget(latency=1.0, params=0.6), timer=timer)
    assert measured(loose, x).params <= 0.6 * measured(net, x).params
    for keep, told in ((Budget(latency=0.1), r"latency 10.0% asked for"), (Budget(latency_ms=0.5), r"latency 0.5 ms")):
        with pytest.raises(TargetError, match=told):
            slivo.factorize(net, x, keep=keep, timer=timer)
    with pytest.raises(TargetError, match="parameters"):
        slivo.factorize(net, x, keep=Budget(latency=0.9, params=0.01), timer=timer)


def test_what_loses_least_for_its_cost_is_chosen() -> None:
    def ladder(name: str, lost: list[float], costs: list[float]) -> Ladder:
        choices = (*(Factors("svd", (rank + 1,)) for rank in range(len(lost) - 1)), None)
        return Ladder(name, choices, np.array(lost), np.array(costs)[:, None])

    easy = ladder("easy", [0.3, 0.01, 0.0], [1, 2, 10])
    hard = ladder("hard", [0.9, 0.5, 0.0], [1, 5, 10])
    assert allocate([easy, hard], {"params": 12.0}) == [Factors("svd", (2,)), None]
    assert allocate([easy, hard], {"params": 7.0}) == [Factors("svd", (2,)), Factors("svd", (2,))]
    assert allocate([easy, hard], {"params": 20.0}) == [None, None]
    # By the price alone all would be cheapest; what room is left is used by what saves most and fits.
    assert allocate([easy, hard], {"params": 3.9}) == [Factors("svd", (2,)), Factors("svd", (1,))]


# What ranks come from.


def test_energy_keeps_its_share_of_each_layer() -> None:
    torch.manual_seed(0)
    net, x = mlp(30, 30, 30), torch.randn(2, 30)
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(30, 4) @ torch.randn(4, 30))
    small = slivo.factorize(net, x, energy=0.9)
    values = np.linalg.svd(net[0].weight.detach().double().numpy(), compute_uv=False) ** 2
    rank = int(np.argmax(values.cumsum() / values.sum() >= 0.9)) + 1
    assert ranks_of(small) == {"0": (rank,)}
    assert edit_of(small).left == {"2": "no rank that saves keeps the energy"}


def test_ranks_are_given_by_name_and_glob_and_others_follow_the_budget() -> None:
    net, x = mlp(32, 32, 32, 32), torch.randn(2, 32)
    assert ranks_of(slivo.factorize(net, x, ranks={"0": 3, "*": 5})) == {"0": (3,), "2": (5,), "4": (5,)}
    # What a glob says of layers among others is for those that it makes smaller.
    assert not ranks_of(slivo.factorize(net, x, ranks={"*": 16}))
    small = slivo.factorize(net, x, ranks={"2": 2}, keep=Budget(params=0.5))
    assert ranks_of(small)["2"] == (2,)
    assert 0.48 < measured(small, x).params / measured(net, x).params <= 0.5


def test_a_rank_that_saves_nothing_is_refused() -> None:
    net, x = mlp(32, 16, 32), torch.randn(2, 32)
    # 32 · 16 / (32 + 16) = 10.67
    assert ranks_of(slivo.factorize(net, x, ranks={"0": 10})) == {"0": (10,)}
    with pytest.raises(
        SlivoError, match=r"0 is given rank 11, which saves nothing: .*512 weights.*528; below 11 saves"
    ):
        slivo.factorize(net, x, ranks={"0": 11})
    with pytest.raises(SlivoError, match="no rank of it saves any"):
        slivo.factorize(nn.Linear(1, 4), torch.randn(2, 1), ranks={"": 1})
    conv = nn.Sequential(nn.Conv2d(16, 2, 3))
    with pytest.raises(SlivoError, match="loses nothing at 2; give less"):
        slivo.factorize(conv, torch.randn(1, 16, 5, 5), ranks={"0": 3}, method="channel")
    with pytest.raises(SlivoError, match=r"ranks \[16, 2\], which saves nothing: the convolution"):
        slivo.factorize(conv, torch.randn(1, 16, 5, 5), ranks={"0": (16, 2)})


def test_two_ranks_are_those_of_tucker() -> None:
    net, x = nn.Sequential(nn.Conv2d(12, 12, 3), nn.Conv2d(12, 12, 3)), torch.randn(1, 12, 6, 6)
    small = slivo.factorize(net, x, ranks={"0": (4, 5), "1": 3})
    assert edit_of(small).modules == {"0": Factors("tucker2", (4, 5)), "1": Factors("outputs", (3,))}
    one = slivo.factorize(net, x, ranks={"1": (3,)}, method="spatial")
    assert edit_of(one).modules == {"1": Factors("spatial", (3,))}
    with pytest.raises(SlivoError, match="given two ranks, which only tucker2 has"):
        slivo.factorize(net, x, ranks={"0": (4, 5)}, method="spatial")
    with pytest.raises(SlivoError, match="given one rank, and tucker2 has two"):
        slivo.factorize(net, x, ranks={"0": 4}, method="tucker2")


def test_ranks_are_multiples() -> None:
    net, x = conv_net(16).eval(), torch.randn(2, 3, 9, 9)
    for kw in ({}, {"method": "tucker2"}, {"method": "spatial"}):
        small = slivo.factorize(net, x, keep=Budget(params=0.7), round_to=4, **kw)
        assert ranks_of(small)
        assert all(rank % 4 == 0 for ranks in ranks_of(small).values() for rank in ranks)


@pytest.mark.parametrize("method", ["auto", "channel", "spatial", "tucker2", "cp"])
def test_methods_make_their_kinds(method: Any) -> None:
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Conv2d(6, 7, 3), nn.Conv2d(7, 7, 1), nn.Conv2d(7, 6, (1, 3))).eval(),
        torch.randn(2, 6, 7, 7),
    )
    small = slivo.factorize(net, x, keep=Budget(params=0.5), method={"0": method, "*": "auto"})
    allowed = {
        "auto": {"outputs", "inputs", "spatial", "tucker2"},
        "channel": {"outputs", "inputs"},
    }.get(method, {method})
    found = edit_of(small).modules
    assert found["0"].kind in allowed
    assert found.get("1", Factors("outputs", (1,))).kind == "outputs"
    assert found.get("2", Factors("outputs", (1,))).kind in ("outputs", "inputs")
    assert small(x).isfinite().all()


def test_auto_takes_what_loses_least() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(8, 8, 3)).eval(), torch.randn(2, 8, 9, 9)
    with torch.no_grad():  # columns times rows, as the spatial kind has them
        net[0].weight.copy_(torch.einsum("riy,orx->oiyx", torch.randn(2, 8, 3), torch.randn(8, 2, 3)))
    small = slivo.factorize(net, x, energy=0.999)
    assert edit_of(small).modules == {"0": Factors("spatial", (2,))}
    torch.testing.assert_close(small(x), net(x), atol=1e-4, rtol=1e-4)


# Activations.


def test_later_layers_are_measured_behind_those_before() -> None:
    torch.manual_seed(0)
    net = mlp(10, 10, 10, 10).double().eval()
    batches = [torch.randn(25, 10, dtype=torch.float64) * torch.linspace(0.1, 4, 10) for _ in range(3)]
    small = slivo.factorize(net, batches[0], ranks={"*": 3}, batches=batches, damping=0.0)
    x = torch.cat(batches)
    with torch.no_grad():
        for at in (0, 2, 4):
            weight = net[at].weight
            left = torch.linalg.svd(weight @ x.T)[0][:, :3]
            torch.testing.assert_close(weight_of(small[at]), left @ left.T @ weight, atol=1e-8, rtol=0)
            x = F.linear(x, weight_of(small[at]), net[at].bias).relu()


class Blocks(nn.Module):
    """Residual blocks, with layers before and behind them."""

    def __init__(self, width: int = 12, many: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.blocks = nn.ModuleList(mlp(width, 2 * width, width) for _ in range(many))
        self.head = nn.Linear(width, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_blocks_are_taken_one_by_one() -> None:
    torch.manual_seed(0)
    net = Blocks().double().eval()
    batches = [torch.randn(40, 6, dtype=torch.float64) for _ in range(2)]
    told: list[tuple[str, int, int]] = []

    def report(label: str, done: int, total: int, fields: Any) -> None:
        assert 0 < fields["kept"] < 1
        told.append((label, done, total))

    options: dict[str, Any] = {"ranks": {"*": 3}, "batches": batches, "damping": 0.0}
    small = slivo.factorize(net, batches[0], report=report, **options)
    assert told == [
        ("first", 1, 8), ("blocks.0", 3, 8), ("blocks.1", 5, 8), ("blocks.2", 7, 8), ("head", 8, 8),
    ]  # fmt: skip
    assert torch.equal(small(batches[0]), slivo.factorize(net, batches[0], hold="cpu", **options)(batches[0]))
    plain = slivo.factorize(net, batches[0], ranks={"*": 3})
    x, y = torch.cat(batches), net(torch.cat(batches))
    assert (small(x) - y).norm() < (plain(x) - y).norm()


@pytest.mark.parametrize("method", ["channel", "spatial", "tucker2", "auto"])
def test_samples_make_outputs_closer(method: Any) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(6, 10, 3, padding=1)).eval(), torch.randn(20, 6, 8, 8).cumsum(2)
    x = x * torch.linspace(0.1, 3, 6)[:, None, None]
    keep = Budget(params=0.5)
    aware = slivo.factorize(net, x, keep=keep, batches=[x], method=method, damping=0.0)
    plain = slivo.factorize(net, x, keep=keep, method=method)
    assert (aware(x) - net(x)).norm() <= (plain(x) - net(x)).norm()


def test_sensitivity_gives_ranks_to_what_the_outputs_hang_on() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.faint = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            return self.loud(x) + 0.01 * self.faint(x)

    torch.manual_seed(0)
    net, batches = Two().eval(), [torch.randn(32, 24)]
    by_loss = ranks_of(slivo.factorize(net, batches[0], keep=Budget(params=0.6), batches=batches))
    small = slivo.factorize(net, batches[0], keep=Budget(params=0.6), batches=batches, by="sensitivity")
    found = ranks_of(small)
    assert abs(by_loss.get("loud", (12,))[0] - by_loss.get("faint", (12,))[0]) <= 3
    assert "loud" not in found or found["loud"][0] > 2 * found["faint"][0]
    assert measured(small, batches[0]).params <= 0.6 * measured(net, batches[0]).params


def test_sensitivity_of_a_model_without_chances() -> None:
    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp(16, 16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x).sum(1)

    net, x = Vector().eval(), torch.randn(20, 16)
    small = slivo.factorize(net, x, keep=Budget(params=0.7), batches=[x], by="sensitivity")
    assert ranks_of(small)

    class Mute(Vector):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x).argmax(1)

    with pytest.raises(SlivoError, match="gives out no logits"):
        slivo.factorize(Mute(), x, keep=Budget(params=0.7), batches=[x], by="sensitivity")
    alone = slivo.factorize(nn.Linear(16, 16), x, keep=Budget(params=0.7), batches=[x], by="sensitivity")
    assert ranks_of(alone) == {"": (5,)}


def test_a_layer_too_small_for_any_rank_stays() -> None:
    net, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1)), torch.randn(8, 16)
    small = slivo.factorize(net, x, keep=Budget(params=0.7), batches=[x], by="sensitivity")
    assert edit_of(small).left == {"1": "the budget leaves it"}


# What networks are made of.


FACTORIES: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: mlp(16, 24, 16),
    "conv": conv_net,
    "reflect": lambda: conv_net(padding_mode="reflect"),
    "bf16": lambda: mlp(16, 24, 16).to(torch.bfloat16),
    "one layer": lambda: nn.Linear(16, 16),
    "conv1d": lambda: nn.Sequential(nn.Conv1d(16, 12, 5, padding=2, stride=2), nn.Flatten(), nn.LazyLinear(4)),
}


def inputs(name: str) -> Tensor:
    if name in ("conv", "reflect"):
        return torch.randn(4, 3, 9, 9)
    if name == "conv1d":
        return torch.randn(3, 16, 9)
    return torch.randn(6, 16, dtype=torch.bfloat16 if name == "bf16" else torch.float32)


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("samples", [False, True])
def test_saved_and_loaded_it_is_the_same_to_the_bit(name: str, samples: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = inputs(name)

    def make() -> nn.Module:
        net = FACTORIES[name]()
        if name == "conv1d":
            net[2] = nn.Linear(60, 4)
        return net

    net = make().eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    small = slivo.factorize(net, x, keep=Budget(params=0.7), batches=[x] if samples else None)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not edits.record(net)
    again = slivo.load(slivo.save(small, tmp_path / "small"), factory=make)
    assert edits.record(again) == edits.record(small)
    assert torch.equal(again(x), small(x))
    assert all(each.dtype == x.dtype and each.isfinite().all() for each in small.parameters())


def test_pruned_masked_and_quantized_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 9, 9)
    net = slivo.prune(conv_net(16).eval(), x, keep=Budget(macs=0.7))
    net = slivo.sparsify(net, sparsity=0.3)
    small = slivo.factorize(net, x, keep=Budget(params=0.7), batches=[x])
    assert [edit.kind for edit in edits.record(small)] == ["cut", "mask", "factorize"]
    int8 = slivo.quantize(small, batches=[x])
    again = slivo.load(slivo.save(int8, tmp_path / "int8"), factory=lambda: conv_net(16))
    assert torch.equal(again(x), int8(x))
    cut = slivo.prune(small, x, keep=Budget(params=0.8))
    assert torch.equal(slivo.load(slivo.save(cut, tmp_path / "cut"), factory=lambda: conv_net(16))(x), cut(x))
    rest = slivo.quantize(conv_net(16).eval(), batches=[x], exclude=["8"])
    mixed = slivo.factorize(rest, x, ranks={"8": 2})
    assert edit_of(mixed).left["0"] == "it is quantized: factorize first, quantize then"
    assert mixed(x).isfinite().all()


def test_it_can_be_factorized_twice_and_trained() -> None:
    net, x = mlp(32, 32, 32), torch.randn(8, 32)
    small = slivo.factorize(slivo.factorize(net, x, ranks={"0": 15}), x, ranks={"2": 4, "0.0": 4})
    assert len(edits.record(small)) == 2
    small(x).square().sum().backward()
    assert all(each.grad is not None for each in small.parameters())


def test_a_llama_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    net = LlamaForCausalLM(config).eval()
    call = {"input_ids": torch.randint(40, (4, 12))}
    small = slivo.factorize(net, call, keep=Budget(params=0.7), batches=[call])
    found = edit_of(small)
    assert found.left["lm_head"] == "its weight is tied"
    assert measured(small, call).params <= 0.7 * measured(net, call).params
    assert any("self_attn" in name for name in found.modules)
    assert small(**call).logits.shape == (4, 12, 40)
    assert len(small.generate(**call, max_new_tokens=2, do_sample=False)[0]) == 14


def test_encoders_of_pytorch_run_in_every_mode(tmp_path: Path) -> None:
    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        return nn.TransformerEncoder(layer, 2)

    torch.manual_seed(0)
    net, x = make().eval(), torch.randn(3, 5, 16)
    small = slivo.factorize(net, x, ranks={"*linear*": 5}, batches=[x])
    assert set(ranks_of(small)) == {f"layers.{at}.linear{of}" for at in (0, 1) for of in (1, 2)}
    assert "NonDynamicallyQuantizableLinear" in edit_of(small).left["layers.0.self_attn.out_proj"]
    with torch.no_grad():
        assert small(x).shape == x.shape
        assert net.layers[0].activation_relu_or_gelu == 1
        again = slivo.load(slivo.save(small, tmp_path / "small"), factory=make)
        assert torch.equal(again(x), small(x))
    assert small.train()(x).requires_grad


class Strange(nn.Module):
    """Layers that cannot be factorized, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16)
        self.twin = nn.Linear(16, 16)
        self.twin.weight = self.tied.weight
        self.read = nn.Linear(16, 16)
        self.unused = nn.Linear(16, 16)
        self.by_function = nn.Linear(16, 16)
        self.hooked = nn.Linear(16, 16)
        self.hooked.register_forward_hook(lambda _, __, output: output * 2)
        self.normed = parametrizations.weight_norm(nn.Linear(16, 16))
        self.grouped = nn.Conv1d(16, 16, 1, groups=2)
        self.back = nn.ConvTranspose1d(16, 16, 1)
        self.complex = nn.Linear(2, 2, dtype=torch.complex64)
        self.recurrent, self.table = nn.GRU(16, 16), nn.Embedding(3, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twin(self.tied(self.plain(input=x)))
        x = self.read(x) * self.read.weight.mean()
        x = self.normed(self.hooked(F.linear(x, self.by_function.weight)))
        x = self.back(self.grouped(x[..., None]))[..., 0]
        return x + self.complex(x[:, :2].to(torch.complex64)).real.sum(1, keepdim=True)


def test_what_cannot_be_factorized_is_left_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    net, x = Strange().eval(), torch.randn(4, 16)
    with caplog.at_level(logging.INFO, "slivo"):
        small = slivo.factorize(net, x, energy=0.5, batches=[x, x])
    assert set(ranks_of(small)) == {"plain"}
    assert edit_of(small).left == {
        "tied": "its weight is tied",
        "twin": "its weight is tied",
        "read": "code outside of it reads its weight",
        "unused": "no call of it was seen on the first batch",
        "by_function": "no call of it was seen on the first batch",
        "hooked": "hooks or parametrizations compute with it",
        "normed": "it is a ParametrizedLinear, and only Linear, Conv1d and Conv2d themselves are factorized",
        "grouped": "it has groups",
        "back": "it is a ConvTranspose1d, and only Linear, Conv1d and Conv2d themselves are factorized",
        "complex": "its weight is of complex64",
        "recurrent": "it is a GRU, and only Linear, Conv1d and Conv2d themselves are factorized",
    }
    assert "grouped stays as it is: it has groups" in caplog.text
    assert small(x).shape == (4, 16)


def test_a_layer_that_is_called_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(20, 20)
            self.again = self.layer

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.layer(x).relu())

    net, x = Twice(), torch.randn(4, 20)
    small = slivo.factorize(net, x, keep=Budget(macs=0.5), batches=[x])
    assert small.again is small.layer
    assert measured(small, x).macs == 2 * 2 * 20 * 5
    assert ranks_of(small) == {"layer": (5,)}


def test_channels_last_and_images_without_a_batch() -> None:
    net, x = conv_net().to(memory_format=torch.channels_last).eval(), torch.randn(4, 3, 9, 9)
    small = slivo.factorize(net, x, keep=Budget(params=0.6), batches=[x])
    other = slivo.factorize(conv_like(net), x, keep=Budget(params=0.6), batches=[x])
    assert edit_of(small) == edit_of(other)
    torch.testing.assert_close(small(x), other(x), atol=1e-4, rtol=1e-4)
    single = nn.Sequential(nn.Conv2d(8, 8, 3))
    few = slivo.factorize(single, (torch.randn(8, 6, 6),), ranks={"0": 3}, batches=[(torch.randn(8, 6, 6),)])
    assert few(torch.randn(8, 6, 6)).shape == (8, 4, 4)


def conv_like(net: nn.Module) -> nn.Module:
    other = conv_net().eval()
    other.load_state_dict(net.state_dict())
    return other


def test_products_that_are_not_seen_are_told(caplog: pytest.LogCaptureFixture) -> None:
    net, x = mlp(16, 16), torch.randn(8, 16)

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = net[0]

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.layer(x)

    small = slivo.factorize(Hidden(), x, ranks={"layer": 4}, batches=[x])
    assert "layer is factorized by its weight alone" in caplog.text
    plain = slivo.factorize(net, x, ranks={"0": 4})
    torch.testing.assert_close(weight_of(small.layer), weight_of(plain[0]))


# What cannot be.


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, r"nothing says how small the layers become; give keep=Budget"),
        ({"keep": 0.5}, r"keep is 0\.5, no Budget"),
        ({"keep": Budget(params=0.5), "energy": 0.9}, "there are keep and energy; give one of them"),
        ({"energy": 1.5}, r"energy is 1\.5; a share between 0 and 1"),
        ({"energy": True}, "energy is True; a share"),
        ({"ranks": 4}, "ranks is 4; a mapping of names or globs"),
        ({"ranks": {"x": 4}}, r"ranks names 'x', which can not be factorized; there are 0, 2"),
        ({"ranks": {3: 4}}, "ranks names 3"),
        ({"ranks": {"0": 0}}, "the rank of '0' is 0; an int of at least 1"),
        ({"ranks": {"0": (1, 2, 3)}}, r"the rank of '0' is \(1, 2, 3\); an int"),
        ({"ranks": {"0": (1, 2)}}, "0 is given two ranks"),
        ({"energy": 0.9, "by": "luck"}, "by is 'luck'; one of loss, sensitivity"),
        ({"energy": 0.9, "by": "sensitivity"}, "by='sensitivity' measures on batches"),
        ({"energy": 0.9, "method": "svd"}, "method is 'svd'; one of auto, channel, spatial, tucker2, cp"),
        ({"energy": 0.9, "method": {"*": 3}}, "method is 3; one of"),
        ({"energy": 0.9, "round_to": 0}, "round_to is 0; an int of at least 1"),
        ({"energy": 0.9, "damping": -1.0}, r"damping is -1\.0; 0 or a positive number"),
        ({"energy": 0.9, "only": "conv*"}, r"'conv\*' matches no linear layer or convolution; there are 0, 2"),
        ({"energy": 0.9, "exclude": ["*"]}, "nothing can be factorized: there is no linear layer"),
        ({"energy": 0.9, "batches": []}, "there are no batches"),
        ({"energy": 0.9, "batches": torch.randn(2, 16)}, "batches is of type Tensor"),
        ({"energy": 0.9, "batches": [torch.full((2, 16), torch.nan)]}, r"what 0\.weight reads is NaN or infinite"),
    ],
)
def test_bad_options_are_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(SlivoError, match=told):
        slivo.factorize(mlp(16, 16, 16), torch.randn(2, 16), **options)


def test_weights_that_are_not_finite_are_named() -> None:
    net = mlp(16, 16, 16)
    with torch.no_grad():
        net[2].weight[0, 0] = torch.nan
    with pytest.raises(SlivoError, match=r"2\.weight: it holds NaN"):
        slivo.factorize(net, torch.randn(2, 16), energy=0.9)


def test_a_model_without_layers_says_so() -> None:
    with pytest.raises(SlivoError, match="matches no linear layer or convolution; there are none"):
        slivo.factorize(nn.ReLU(), torch.randn(2, 3), energy=0.9, only="x")
    with pytest.raises(SlivoError, match="nothing can be factorized: 0: it has groups"):
        slivo.factorize(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), torch.randn(1, 4, 5, 5), energy=0.9)
