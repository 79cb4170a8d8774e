"""Models and inputs at the edge: each is cut right, or refused with words that help, and left as it was."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.permutation import error, outputs, permuted
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import slivo
from slivo import cli, edits
from slivo.edits.follow import follow
from slivo.errors import CaptureError, SlivoError, TargetError
from slivo.graph.copies import duplicate
from slivo.prune import criteria, cut, drop, keep_tokens, plan

HALF = slivo.Budget(macs=0.5)
X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[5, 7, 9]])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


def images() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 8, 3), nn.Flatten(2),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def language() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 20))


class Block(nn.Module):
    """Adds to what passes through it, in place or not."""

    def __init__(self, *, inplace: bool = False) -> None:
        super().__init__()
        self.linear, self.inplace = nn.Linear(8, 8), inplace

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.linear(x)) if self.inplace else x + self.linear(x)


def residual(*, inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(inplace=inplace) for _ in range(4)))


class Wrap(nn.Module):
    """A network in code of one's own."""

    def __init__(self, before: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.net, self.before = net(), before

    def forward(self, x: Tensor) -> Any:
        return self.net(self.before(x))


@contextmanager
def untouched(model: nn.Module, *inputs: Tensor) -> Iterator[None]:
    """State that a model, its modes and its inputs are bit for bit as before, whatever happens."""

    def state() -> list[Any]:
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return [
            [(name, id(tensor), tensor.requires_grad, tensor.grad is None) for name, tensor in tensors],
            [(id(module), module.training, module.extra_repr()) for module in model.modules()],
            edits.record(model),
        ]

    def values() -> list[Tensor]:
        # Bit for bit, NaN included.
        every = [*model.parameters(), *model.buffers(), *inputs]
        return [each.detach().clone().contiguous().reshape(-1).view(torch.uint8) for each in every if each.numel()]

    before, numbers = state(), values()
    try:
        yield
    finally:
        assert state() == before
        assert all(map(torch.equal, values(), numbers))


def refused(call: Callable[[], object], *told: str, kind: type[SlivoError] = SlivoError) -> None:
    """State that a call is refused with words that say what is wrong and what to do, in two lines at most."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert all(each in message for each in told), message
    assert len(message) <= 240
    assert "\n" not in message


# ---------------------------------------------------------------------------------------------- what is no model

NOT_MODELS = {
    "number": (42, ("of type int", "torch.nn.Module")),
    "class": (nn.Linear, ("the class Linear", "call it")),
    "function": (torch.relu, ("torch.nn.Module",)),
    "tensor": (X, ("of type Tensor", "the model first")),
    "lazy": (
        nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 2)),
        ("0.weight of LazyLinear has no shape", "call the model"),
    ),
}


@pytest.mark.parametrize("name", NOT_MODELS)
def test_what_is_no_model_is_told(name: str) -> None:
    given, told = NOT_MODELS[name]
    optimizer = torch.optim.SGD(net().parameters())
    for call in (
        lambda: slivo.trace(given, X),
        lambda: slivo.inspect(given, X),
        lambda: slivo.prune(given, X, keep=HALF),
        lambda: plan(given, X, keep=HALF),
        lambda: drop(given, X, keep=HALF),
        lambda: keep_tokens(given, X, [1]),
        lambda: follow(optimizer, given, net()),
        lambda: follow(optimizer, net(), given),
    ):
        refused(call, *told, kind=CaptureError)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*Sparse CSR:UserWarning")
def test_tensors_and_code_that_cannot_be_cut_are_told() -> None:
    refused(lambda: slivo.trace(torch.jit.trace(net(), X), X), "torch.jit", "the torch.nn.Module that it was made from")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch is about to give it up, for many reasons that it all says
        dynamic = torch.ao.quantization.quantize_dynamic(net(), {nn.Linear})
    refused(lambda: slivo.trace(dynamic, X), "module '0' is quantized by torch.ao", "prune the model first")
    inside = nn.Sequential(nn.Linear(8, 8), torch.jit.trace(net(), X))
    refused(lambda: slivo.trace(inside, X), "module '1' is compiled by torch.jit")
    sparse = net()
    sparse[0].weight = nn.Parameter(sparse[0].weight.detach().to_sparse_csr())
    refused(lambda: slivo.prune(sparse, X, keep=HALF), "0.weight has the layout torch.sparse_csr", "to_dense()")
    with torch.inference_mode():
        made = net()
    refused(lambda: slivo.prune(made, X, keep=HALF), "0.weight was made in torch.inference_mode", "outside")
    empty = net().to("meta")
    assert len(slivo.trace(empty, X).prunable) == 2
    found = plan(net(), X, keep=HALF)
    for call in (
        lambda: slivo.prune(empty, X, keep=HALF),
        lambda: cut(empty, X, found),
        lambda: slivo.inspect(empty, X),
        lambda: drop(residual().to("meta"), X, keep=HALF),
        lambda: keep_tokens(language().to("meta"), IDS, [1]),
    ):
        refused(call, "has no values, it is on the meta device", "load the model's weights", kind=CaptureError)


def test_what_python_cannot_copy_is_named() -> None:
    model = net()
    model[2].lock = threading.Lock()
    with untouched(model):
        refused(lambda: slivo.prune(model, X, keep=HALF), "2.lock, a lock, cannot be copied", "__getstate__")


# ------------------------------------------------------------------------------------- inputs that the model rejects


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, *, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.net(x) * scale


class ByName(Keywords):
    def forward(self, given: dict[str, Tensor]) -> Tensor:
        return self.net(given["x"])


def test_keywords_are_checked_by_the_model() -> None:
    model = Keywords()
    assert slivo.prune(model, {"x": X, "scale": 2.0}, keep=HALF)(x=X).shape == (2, 4)
    refused(lambda: slivo.prune(model, {"scale": 1.0}, keep=HALF), "'x'", "scale=float", kind=CaptureError)
    refused(lambda: slivo.prune(ByName(), ({"y": X},), keep=HALF), "({y: float32[2, 8]}): KeyError 'x'")
    refused(lambda: slivo.prune(model, {"x": X, "y": X}, keep=HALF), "'y'", "y=float32[2, 8]", kind=CaptureError)
    refused(lambda: slivo.prune(model, X, keep=HALF), "positional", kind=CaptureError)


@pytest.mark.parametrize(
    "inputs",
    [
        torch.randn(2, 7), X.double(), X.long(), X.to("meta"), torch.tensor(1.0), X.numpy(), [[1.0]], None, (), (X, X),
        "x", (2, 8),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_inputs_that_the_model_rejects_are_said_with_their_shapes(inputs: Any) -> None:
    model = net().train()
    model[2].eval()
    with untouched(model):
        calls = (
            lambda: slivo.prune(model, inputs, keep=HALF),
            lambda: drop(model, inputs, keep=HALF),
            lambda: keep_tokens(model, inputs, [1]),
            lambda: slivo.inspect(model, inputs),
        )
        only_dtype = isinstance(inputs, Tensor) and inputs.shape == X.shape
        for call in (*calls, *(() if only_dtype else (lambda: slivo.trace(model, inputs),))):
            refused(call, "Sequential fails on the example inputs (", "Give inputs of the shapes", kind=CaptureError)


def test_a_batch_of_no_samples_counts_for_nothing() -> None:
    """Without samples there are no MACs, and every budget would be met by cutting nothing."""
    for call in (slivo.prune, drop):
        refused(lambda call=call: call(residual(), X[:0], keep=HALF), "float32[0, 8]", "one sample at least")
    refused(lambda: keep_tokens(language(), IDS[:0], [1]), "int64[0, 3]", "one sample at least")
    refused(lambda: slivo.inspect(net(), X[:0]), "one sample at least")


def test_values_that_the_model_rejects() -> None:
    model, ids = language(), torch.tensor([[3, 20]])
    with untouched(model, ids):
        for call in (
            lambda: slivo.prune(model, ids, keep=HALF),
            lambda: keep_tokens(model, ids, [1, 2]),
        ):
            refused(call, "Sequential fails on the example inputs (int64[1, 2]): index out of range", kind=CaptureError)


def test_batches_that_the_model_rejects() -> None:
    model = residual()
    with untouched(model):
        refused(lambda: drop(model, X, keep=HALF, batches=[X, torch.randn(2, 9)]), "fails on the example inputs")
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_inputs_of_other_kinds_are_right() -> None:
    expected = slivo.prune(net(), X, keep=HALF)(X)
    for inputs in (X.clone().requires_grad_(), X.clone().requires_grad_() * 1, [X], {"input": X}):
        assert torch.equal(slivo.prune(net(), inputs, keep=HALF)(X), expected)
    single = slivo.prune(net(), X[0], keep=HALF)
    assert single(X[0]).shape == (4,)
    assert drop(residual(), X[0], keep=slivo.Budget(macs=0.75))(X).shape == X.shape


# ------------------------------------------------------------------------------------------------ half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_cut_as_its_twin(dtype: torch.dtype) -> None:
    model = images().to(dtype).eval()
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    twin = copy.deepcopy(model).float()
    assert slivo.trace(model, x).count({}) == slivo.trace(twin, x.float()).count({})
    found = plan(model, x, keep=HALF)
    assert found == plan(twin, x.float(), keep=HALF)
    with untouched(model, x):
        small, other = cut(model, x, found), cut(twin, x.float(), found)
    assert {each.dtype for each in small.parameters()} == {dtype}
    assert small(x).isfinite().all()
    near = 20 * torch.finfo(dtype).eps  # a few roundings of each of four layers
    assert error([small(x).detach().float()], [other(x.float()).detach()]) < near
    loss = slivo.prune(
        model, x, keep=HALF, criterion="taylor", batches=[x], loss=lambda net, batch: net(batch).square().mean()
    )
    assert loss(x).isfinite().all()
    assert slivo.inspect(model, x).bytes < slivo.inspect(twin, x.float()).bytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_blocks_and_tokens_of_half_precision(dtype: torch.dtype) -> None:
    small = drop(residual().to(dtype), X.to(dtype), keep=HALF)
    twin = drop(residual().to(dtype).float(), X, keep=HALF)
    assert [type(each).__name__ for each in small] == [type(each).__name__ for each in twin]
    assert error([small(X.to(dtype)).detach().float()], [twin(X).detach()]) < 20 * torch.finfo(dtype).eps
    words = language().to(dtype)
    found = keep_tokens(words, IDS, [5, 7, 9])(torch.tensor([[0, 1, 2]]))
    assert error([found.detach().float()], [words(IDS)[..., [5, 7, 9]].detach().float()]) < 20 * torch.finfo(dtype).eps


# --------------------------------------------------------------- shared modules, in-place ops, unused, frozen, NaN


class Twice(nn.Module):
    """One module, called twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 4)
        self.one = self.two = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(self.one(self.first(x)).relu()).relu())


@pytest.mark.parametrize("frozen", [False, True])
def test_a_module_called_twice_stays_shared(frozen: bool, tmp_path: Path) -> None:
    model = Twice()
    model.two.weight.requires_grad_(not frozen)
    graph = slivo.trace(model, X)
    assert graph.params == sum(each.numel() for each in model.parameters())
    for axis in graph.prunable:
        assert error(outputs(permuted(model, axis), X), outputs(model, X)) < 1e-5
    with untouched(model, X):
        small = slivo.prune(model, X, keep=HALF)
    assert small.one is small.two
    assert small.one.weight.shape[0] == small.one.weight.shape[1] == small.first.out_features < 12
    assert small.one.weight.requires_grad is not frozen
    again = slivo.load(slivo.save(small, tmp_path / "net"), factory=Twice)
    assert again.one is again.two
    assert torch.equal(again(X), small.eval()(X))


def test_operations_in_place_change_neither_inputs_nor_influence() -> None:
    """A block that adds in place would else look as if it changed nothing."""
    model, x = residual(inplace=True), X.clone()
    with torch.no_grad():
        model[2].linear.weight.zero_()
        model[2].linear.bias.zero_()
    with untouched(model, x):
        small = drop(model, x, keep=slivo.Budget(macs=0.75))
    assert [type(each).__name__ for each in small] == ["Block", "Block", "Skip", "Block"]
    assert torch.equal(small(x.clone()), model(x.clone()))
    acting = nn.Sequential(nn.ReLU(inplace=True), *net(), nn.ReLU(inplace=True))
    with untouched(acting, x):
        assert slivo.prune(acting, x, keep=HALF)(x.clone()).shape == (2, 4)
        slivo.inspect(acting, x)


def test_what_differs_from_call_to_call_is_told() -> None:
    model, x = Wrap(lambda x: x + torch.randn_like(x)), X.clone()
    with untouched(model, x):
        refused(lambda: slivo.prune(model, x, keep=HALF), "something else at each call", "no random")


def test_a_model_that_changes_its_inputs_is_pruned_as_any() -> None:
    model, x = Wrap(lambda x: x.mul_(0.5)), X.clone()
    with untouched(model, x):
        small = slivo.prune(model, x, keep=HALF)
    assert not isinstance(small, torch.fx.GraphModule)
    assert torch.equal(small(X.clone()), slivo.prune(Wrap(lambda x: x * 0.5), x, keep=HALF)(X))


class Stateful(nn.Module):
    """Counts its calls, and remembers what passed."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(Block(), Block())
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = [self.net[0](x)]
        return self.net(x)


def test_a_model_that_remembers_is_left_as_it_was() -> None:
    model = Stateful()
    model(X)
    with untouched(model, X):
        drop(model, X, keep=HALF)
        slivo.inspect(model, X)
        refused(lambda: drop(model, X[:, :7], keep=HALF), "fails on the example inputs")
        with pytest.raises(SlivoError, match="no axis"):
            slivo.prune(model, X, keep=HALF)
    assert float(drop(model, X, keep=HALF).calls) == 1


class Unused(nn.Module):
    """Has parameters and buffers that no call reaches."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.last, self.dead = nn.Linear(8, width), nn.Linear(width, 4), nn.Linear(32, 9)
        self.alone = nn.Parameter(torch.randn(5), requires_grad=False)
        self.register_buffer("count", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def test_unused_and_frozen_parameters_survive_as_they_are(tmp_path: Path) -> None:
    model = Unused()
    model.first.bias.requires_grad_(False)
    with untouched(model, X):
        small = slivo.prune(model, X, keep=slivo.Budget(params=0.7))
    assert small.first.out_features < 32
    assert sum(each.numel() for each in small.parameters()) <= 0.7 * sum(each.numel() for each in model.parameters())
    kept, before = dict(small.named_parameters()), dict(model.named_parameters())
    assert all(torch.equal(kept[name], before[name]) for name in ("dead.weight", "dead.bias", "alone"))
    assert {name for name, each in kept.items() if not each.requires_grad} == {"first.bias", "alone"}
    again = slivo.load(slivo.save(small, tmp_path / "net"), factory=Unused)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in small.state_dict().items())
    least = "the budget cannot be met: parameters"
    refused(lambda: slivo.prune(model, X, keep=slivo.Budget(params=0.3)), least, kind=TargetError)


def test_weights_that_are_no_numbers_are_named() -> None:
    for value, place in ((torch.nan, 2), (torch.inf, 4)):
        model = net()
        with torch.no_grad():
            model[place].weight[1, 1] = value
        with untouched(model):
            told = (f"{place}.weight holds NaN or infinite values", "'2 out'" if place == 4 else "'0 out'")
            refused(lambda model=model: slivo.prune(model, X, keep=HALF), *told)
    model = residual()
    with torch.no_grad():
        model[1].linear.weight[0, 0] = torch.nan
    refused(lambda: drop(model, X, keep=HALF), "1.linear.weight holds NaN or infinite values", "repair")
    refused(lambda: drop(residual(), X * torch.nan, keep=HALF), "the batches hold NaN")
    large = net()
    with torch.no_grad():
        large[0].weight.mul_(1e30)
    refused(lambda: slivo.prune(large, X, keep=HALF), "'0 out'", "too large")

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).sum() * torch.nan

    refused(
        lambda: slivo.prune(net(), X, keep=HALF, criterion="taylor", batches=[X], loss=loss),
        "the gradient of 2.weight holds NaN",
    )


def test_a_vocabulary_may_hold_no_numbers() -> None:
    """Which tokens stay is said; nothing is scored."""
    model = language()
    with torch.no_grad():
        model[0].weight[3] = torch.nan
    found = keep_tokens(model, IDS, [5, 7, 9])(torch.tensor([[0, 1, 2]]))
    assert error([found.detach()], [model(IDS)[..., [5, 7, 9]].detach()]) < 1e-5


# ----------------------------------------------------------------------------------------------------- zero width


class Hollow(nn.Module):
    """A network with layers of no units in it."""

    def __init__(self) -> None:
        super().__init__()
        self.none, self.bias, self.wide, self.last = (
            nn.Linear(8, 0), nn.Linear(0, 6), nn.Linear(6, 12), nn.Linear(12, 2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.wide(self.bias(self.none(x))).relu())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_a_layer_of_no_units_stays_as_it_is() -> None:
    model = Hollow()
    graph = slivo.trace(model, X)
    assert graph["none out"].fixed == "has no positions"
    assert {axis.name for axis in graph.prunable} == {"bias out", "wide out"}
    with untouched(model, X):
        small = slivo.prune(model, X, keep=HALF)
        assert slivo.inspect(model, X).macs == 6 * 12 + 12 * 2
    assert (small.none.out_features, small.bias.in_features) == (0, 0)
    assert slivo.trace(small, X).macs <= 48
    hollow = nn.Sequential(nn.Linear(8, 0), nn.Linear(0, 2))
    refused(lambda: slivo.prune(hollow, X, keep=HALF), "no axis of the model may be cut", "has no positions")


def test_nothing_cannot_be_kept() -> None:
    model = net()
    with untouched(model):
        refused(lambda: keep_tokens(language(), IDS, []), "keep at least 1 of them")
        for value in (0, 0.0, -0.5, float("nan"), "0.5", X):
            refused(lambda value=value: slivo.Budget(macs=value), "a share above 0 and up to 1.0", kind=TargetError)
        refused(lambda: slivo.prune(model, X, keep=slivo.Budget(macs=1)), "MACs 1 asked for", "is the least")
        small = slivo.prune(model, X, keep=slivo.Budget(macs=0.1), min_width=0)
        assert min(each.out_features for each in small if isinstance(each, nn.Linear)) >= 1
        everything = plan(model, X, keep=HALF)
        for kept in ((), (0.5,)):
            refused(lambda kept=kept: type(everything)(everything.sizes, {"0 out": kept}), "a plan keeps one or more")


# -------------------------------------------------------------------------------------------------------- options


def test_options_are_told_before_anything_takes_time() -> None:
    model, bad = net(), torch.randn(2, 7)  # inputs on which a look at the model itself would fail
    for given, told in (
        (0.5, "keep is 0.5"),
        ("half", "keep is 'half'"),
        (None, "keep is None"),
        (X, "of type Tensor"),
    ):
        for call in (slivo.prune, plan, drop):
            refused(lambda call=call, given=given: call(model, bad, keep=given), told, "keep=Budget(macs=0.5)")
    for option, value in (("round_to", 8.0), ("round_to", 0), ("min_width", 2.0), ("min_width", torch.nan)):
        for call in (slivo.prune, plan):
            refused(lambda call=call, o=option, v=value: call(model, bad, keep=HALF, **{o: v}), f"{option} is {value}")
    refused(lambda: cut(model, bad, "plan.json"), "of type str", "Plan.read(…)")
    refused(lambda: cut(model, bad, {"0 out": [0]}), "of type dict")
    for value in ("abc", 50, None):
        refused(lambda value=value: keep_tokens(model, bad, value), f"tokens is {value!r}", "[0, 5, 7]")
    for tokens in ([1.5, 2], torch.tensor([True, False]), torch.tensor([[1, 2]]), ["a"]):
        refused(lambda tokens=tokens: keep_tokens(model, bad, tokens), "tokens hold", "ints in one list")


def test_widths_beyond_an_axis_leave_it() -> None:
    for options in ({"round_to": 64}, {"min_width": 100}):
        assert slivo.prune(net(), X, keep=slivo.Budget(macs=1.0), **options)[0].out_features == 32
        refused(
            lambda options=options: slivo.prune(net(), X, keep=HALF, **options), "(100.0% of", "min_width or round_to"
        )


def test_one_name_is_one_glob() -> None:
    small = slivo.prune(net(), X, keep=slivo.Budget(macs=0.8), only="0 out")
    assert (small[0].out_features < 32, small[2].out_features) == (True, 16)
    refused(lambda: slivo.prune(net(), X, keep=HALF, exclude="02"), "'02' matches no axis and no module")
    refused(lambda: drop(residual(), X, keep=HALF, only="12"), "'12' matches no block; there are 0, 1, 2, 3")
    refused(lambda: slivo.prune(net(), X, keep=HALF, only=None), "only holds None", "only=['layer1.*']")


def test_globs_that_cancel_out_are_told() -> None:
    told = ("only=['0'] and exclude=['0'] leave no axis", "without them there are '0 out', '2 out'")
    refused(lambda: slivo.prune(net(), X, keep=HALF, only=["0"], exclude=["0"]), *told)
    refused(lambda: slivo.prune(net(), X, keep=HALF, only=["4"]), "only=['4'] leave no axis")
    refused(lambda: slivo.prune(nn.Identity(), X, keep=HALF), "it has no weights")


def test_a_share_of_nothing_is_no_budget() -> None:
    """A table that is looked up has no MACs; a share of them would be met by cutting nothing."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Embedding(20, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.rows(ids).sum(-1)

    refused(lambda: slivo.prune(Table(), IDS, keep=HALF), "keeps 0.5 of the MACs", "none", "params=…")
    assert slivo.prune(Table(), IDS, keep=slivo.Budget(params=0.5)).rows.embedding_dim == 4


def test_losses_and_criteria_that_cannot_be() -> None:
    model = net()

    def scored(loss: Any) -> Callable[[], nn.Module]:
        return lambda: slivo.prune(model, X, keep=HALF, criterion="taylor", batches=[X], loss=loss)

    with untouched(model):
        refused(scored(lambda net, batch: net(batch)), "shape [2, 4]", "a tensor of one number")
        refused(scored(lambda net, batch: 1.0), "of type float", "a tensor of one number")
        # Of the model outside, not of the copy that is given: all gradients would be zero.
        refused(scored(lambda net, batch: model(batch).sum()), "does not depend", "the model that loss is given")
        refused(scored(lambda net, batch: net(batch).sum().detach()), "does not depend")
        refused(lambda: slivo.prune(model, X, keep=HALF, criterion=torch.sum), "criteria.criterion()(function)")
        for score, told in ((torch.sum, "shape []"), (lambda weights: 1.0, "type float")):
            made = criteria.criterion()(score)
            refused(lambda made=made: slivo.prune(model, X, keep=HALF, criterion=made), told, "shape [32]")


def test_whatever_mode_the_caller_is_in() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    expected = slivo.prune(net(), X, keep=HALF, criterion="taylor", batches=[X], loss=loss)
    for mode in (torch.no_grad, torch.inference_mode):
        model = net()
        with mode():
            small = slivo.prune(model, X.clone(), keep=HALF, criterion="taylor", batches=[X.clone()], loss=loss)
        small(X).sum().backward()  # it can be trained on
        assert torch.equal(small(X), expected(X))


def test_batches_are_many() -> None:
    for batches in (X, 5, "x", {"x": X}):
        for call in (
            lambda b=batches: drop(residual(), X, keep=HALF, batches=b),
            lambda b=batches: slivo.prune(net(), X, keep=HALF, criterion="snip", batches=b, loss=torch.sum),
        ):
            refused(call, "batches is ", "as batches=[batch]")
    refused(lambda: slivo.prune(net(), X, keep=HALF, criterion="snip", batches=[X], loss="mse"), "loss is 'mse'")


def test_weights_of_eight_bits_are_scored() -> None:
    class Eight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            rows = torch.randn(8, 16).to(torch.float8_e4m3fn)
            self.rows, self.last = nn.Parameter(rows, requires_grad=False), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last((x @ self.rows.float()).relu())

    small = slivo.prune(Eight(), X, keep=HALF)
    assert (small.rows.dtype, small.rows.shape, small(X).shape) == (torch.float8_e4m3fn, (8, 8), (2, 4))


def test_complex_weights_count_with_both_parts() -> None:
    """An axis whose first half is large in the imaginary parts alone keeps that half."""
    model = nn.Sequential(nn.Linear(8, 16, dtype=torch.complex64), nn.Linear(16, 4, dtype=torch.complex64))
    with torch.no_grad():
        model[0].weight[:8] = 5j
    found = plan(model, X.to(torch.complex64), keep=HALF)
    assert found.keep["0 out"] == tuple(range(8))


# ---------------------------------------------------------------------------- weights that are computed at each call

COMPUTED: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": lambda layer: weight_norm(layer),
    "spectral_norm": lambda layer: spectral_norm(layer),
    "mask": lambda layer: prune.ln_structured(layer, "weight", 0.5, n=2, dim=1),
    "masks": lambda layer: [prune.random_unstructured(layer, "weight", share) for share in (0.2, 0.3)],
    "parametrized norm": lambda layer: parametrizations.weight_norm(layer),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*spectral_norm:FutureWarning")
@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("place", [0, 3])
def test_weights_computed_at_each_call_are_cut_at_their_source(name: str, place: int, tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = images()
        COMPUTED[name](model[place])
        return model.double().eval()

    model, x = make(), torch.randn(2, 3, 6, 6).double()
    model(x)  # leaves a weight with a history behind
    graph = slivo.trace(model, x)
    for axis in graph.prunable:
        # The copy of a copy, because PyTorch refuses to copy such models.
        assert error(outputs(permuted(detached(model), axis), x), outputs(model, x)) < 1e-12
    found = plan(model, x, keep=HALF)
    with untouched(model, x):
        small = cut(model, x, found)
    for module in (small[0], small[3]):
        shape = (module.out_channels, module.in_channels, 3, 3)
        assert module.weight.shape == shape  # before the first call, too
    shrunk = {name: found.sizes[name] - len(kept) for name, kept in found.keep.items()}
    assert sum(shrunk.values()) > 0
    small(x).sum().backward()
    again = slivo.load(slivo.save(small, tmp_path / "net"), factory=make)
    assert torch.equal(again(x), small(x))


def detached(model: nn.Module) -> nn.Module:
    """Return a copy that PyTorch copies: without gradients no computed weight has a history."""
    return duplicate(model).requires_grad_(False)


def test_wrappers_and_compiled_models_are_cut_inside() -> None:
    expected = slivo.prune(net(), X, keep=HALF)(X)
    parallel = slivo.prune(nn.DataParallel(net()), X, keep=HALF)
    assert torch.equal(parallel.module(X), expected)
    compiled = torch.compile(net(), backend="eager")
    compiled(X)
    small = slivo.prune(compiled, X, keep=HALF)
    assert torch.allclose(small(X), expected)
    assert small._orig_mod[0].out_features < 32


# --------------------------------------------------------------------------------------------- optimizers, commands


def test_optimizers_that_cannot_follow() -> None:
    model = net()
    adam = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    adam.step()
    model.zero_grad(set_to_none=True)
    small = slivo.prune(model, X, keep=HALF)
    with untouched(model), untouched(small):
        assert follow(adam, model, small).state[small[0].weight]["exp_avg"].shape == small[0].weight.shape
        refused(lambda: follow(None, model, small), "of type NoneType", "torch.optim.Optimizer")
        refused(lambda: follow(model.parameters(), model, small), "of type generator")
        refused(lambda: follow(adam, small, model), "did not come from the old one by cuts")
        refused(lambda: follow(adam, net(), small), "not in both models")
        narrow = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 4))
        refused(lambda: follow(adam, model, narrow), "0.weight has shape [5, 8] in the new model, not [32, 8]")


MODELS = """
import torch
from torch import nn

def half():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).bfloat16()

def language():
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 20))

def lazy():
    return nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 2))

def number():
    return 42
"""


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("half", "2,8"), 0, "0 out"),
        (("language", "2,5:int64"), 0, "1 out"),
        (("half", "2,8:float32"), 1, "Sequential fails on the example inputs (float32[2, 8])"),
        (("language", "2,5"), 1, "fails on the example inputs (float32[2, 5])"),
        (("lazy", "2,5"), 1, "0.weight of LazyLinear has no shape yet"),
        (("number", "2,5"), 1, "not a torch.nn.Module"),
        (("language", "2,5:int65"), 2, "'2,5:int65' is no shape"),
        (("language", "2,5:"), 2, "is no shape"),
    ],
)
def test_the_command_says_it_too(
    arguments: tuple[str, str],
    code: int,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "edge_models.py").write_text(MODELS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    model, shape = arguments
    with pytest.raises(SystemExit) as caught:
        cli.main(["inspect", f"edge_models:{model}", "--input", shape])
    found = capsys.readouterr()
    assert (caught.value.code or 0) == code
    assert told in (found.err if code else found.out)
    assert code != 1 or len(found.err.splitlines()) <= 2
