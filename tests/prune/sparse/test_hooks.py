"""Zeros survive training, whatever pulls at them; sparsity comes as planned, stays in its band, and resumes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import Net

import slivo
from slivo import edits
from slivo.edits import Mask
from slivo.errors import SlivoError
from slivo.prune import GradualSparsity, HoldMasks, SparsityBand, hold, sparsify, sparsity
from slivo.train import EMA, ClipGradients, Hook, OptimizerSpec, fit

EPOCHS = 4


class BrokenOffError(Exception):
    pass


def batches():
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(24, 12, generator=generator), torch.arange(24) % 3)
    return DataLoader(data, batch_size=6, shuffle=True)


def objective(model, batch):
    return {"ce": nn.functional.cross_entropy(model(batch[0]), batch[1])}


def train(model, *hooks, kind="adamw", epochs=EPOCHS, **options):
    spec = OptimizerSpec(kind=kind, lr=0.05, weight_decay=0.1)
    return fit(model, batches(), objective, epochs=epochs, optimizer=spec, hooks=hooks, **options)


def make(seed=0):
    torch.manual_seed(seed)
    return Net(8)


def zeros(model):
    return {name: each == 0 for name, each in model.named_parameters() if each.dim() > 1}


def same(one, other):
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "2x4"])
def test_held_zeros_stay_and_the_rest_learns(kind, pattern):
    sparse = sparsify(make(), pattern=pattern, sparsity=None if ":" in pattern else 0.5, exclude=["head"])
    before, masks = copy.deepcopy(sparse), zeros(sparse)
    rows = train(sparse, HoldMasks(), kind=kind)
    after = zeros(sparse)
    assert all(bool(after[name][mask].all()) for name, mask in masks.items())
    assert not torch.equal(sparse.first[0].weight, before.first[0].weight)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert edits.record(sparse) == edits.record(before)


def test_without_a_hook_zeros_come_to_life():
    sparse = sparsify(make(), sparsity=0.5)
    train(sparse)
    assert sparsity(sparse) < 0.1


class Revives(Hook):
    """Gives zeros what the optimizer may have gathered before, and weights what any hook may do."""

    def on_gradients(self, state):
        for values in state.optimizer.state.values():
            for value in values.values():
                if isinstance(value, torch.Tensor) and value.dim() > 1:
                    value.add_(1)

    def on_step_start(self, state):
        self.seen = zeros(state.model)


def test_momenta_and_other_hooks_cannot_revive_a_zero():
    sparse = sparsify(make(), sparsity=0.5)
    masks, revives = zeros(sparse), Revives()
    ema = EMA(0.5)
    train(sparse, revives, ema, HoldMasks(), kind="sgd")
    assert all(bool(revives.seen[name][mask].all()) for name, mask in masks.items())
    assert all(bool(zeros(sparse)[name][mask].all()) for name, mask in masks.items())


def test_gradients_of_zeros_do_not_count_where_gradients_are_clipped():
    sparse = sparsify(make(), sparsity=0.9)
    seen = []

    class Look(Hook):
        def on_gradients(self, state):
            seen.append({name: bool(each.grad[each == 0].any()) for name, each in state.model.named_parameters()
                         if each.dim() > 1})  # fmt: skip

    train(sparse, HoldMasks(), Look(), ClipGradients(1.0), epochs=1)
    assert not any(any(each.values()) for each in seen)


def own_loop(model, optimizer, steps=6):
    for x, labels in [next(iter(batches()))] * steps:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()


@pytest.mark.parametrize("early", [True, False])
def test_a_loop_of_ones_own_keeps_zeros_within_hold(early):
    sparse = sparsify(make(), sparsity=0.75)
    masks, names = zeros(sparse), [name for name, _ in sparse.named_parameters()]

    def build():
        return torch.optim.AdamW(sparse.parameters(), lr=0.05, weight_decay=0.1)

    made = build() if early else None
    with hold(sparse) as held:
        assert held is sparse
        made = made or build()
        # What the optimizer gathered before must not matter.
        own_loop(sparse, made, 1)
        for values in made.state.values():
            values["exp_avg"].add_(1)
        own_loop(sparse, made)
    assert [name for name, _ in sparse.named_parameters()] == names
    assert type(sparse.first[0]) is nn.Linear
    assert all(torch.equal(zeros(sparse)[name] & mask, mask) for name, mask in masks.items())
    assert sparsity(sparse) == 0.75
    # The same parameters: the optimizer goes on with them.
    weight = sparse.first[0].weight.detach().clone()
    own_loop(sparse, made, 1)
    assert not torch.equal(weight, sparse.first[0].weight)


def test_hold_lets_go_of_tied_weights_and_after_errors():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, x):
            return self.head(self.tokens(x))

    sparse = sparsify(Tied(), sparsity=0.5)
    x, expected = torch.arange(6), sparse(torch.arange(6))

    def broken_off():
        with hold(sparse):
            assert torch.equal(sparse(x), expected)
            with pytest.raises(SlivoError, match="carries no mask"), hold(sparse):
                pass
            raise BrokenOffError

    with pytest.raises(BrokenOffError):
        broken_off()
    assert sparse.head.weight is sparse.tokens.weight
    assert torch.equal(sparse(x), expected)


def test_a_model_without_a_mask_cannot_be_held():
    with pytest.raises(SlivoError, match=r"carries no mask.*slivo\.sparsify"):
        train(make(), HoldMasks())
    with pytest.raises(SlivoError, match="carries no mask"), hold(make()):
        pass


class Shares(Hook):
    """Notes the share of zeros after each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, state):
        weights = [each for each in state.model.parameters() if each.dim() > 1]
        self.seen.append(sum(int((each == 0).sum()) for each in weights) / sum(each.numel() for each in weights))


def test_gradual_sparsity_follows_its_curve():
    model, shares = make(), Shares()
    train(model, GradualSparsity(0.8, updates=4, start=0.0, stop=0.5), shares)
    count = sum(each.numel() for each in model.parameters() if each.dim() > 1)
    planned = [0.8 * (1 - (1 - step / 4) ** 3) for step in (1, 2, 3, 4)]
    assert len(shares.seen) == 16
    for step, share in enumerate(shares.seen, start=1):
        wanted = 0 if step < 2 else planned[min(step // 2, 4) - 1]
        assert share == int(wanted * count + 0.5) / count
    assert edits.record(model) == (
        Mask(dict.fromkeys(["first.0.weight", "second.0.weight", "head.weight"], "unstructured")),
    )
    assert sparsity(model) == int(0.8 * count + 0.5) / count


def test_gradual_sparsity_in_blocks_and_layers_reaches_its_end_in_few_steps():
    model = make()
    train(model, GradualSparsity(0.5, pattern="4x4", scope="layer", exclude=["head"], stop=1.0), epochs=1)
    assert edits.record(model) == (Mask(dict.fromkeys(["first.0.weight", "second.0.weight"], "4x4")),)
    assert [int((each == 0).sum()) for each in (model.first[0].weight, model.second[0].weight)] == [48, 32]


def test_a_band_prunes_up_to_its_lower_bound_by_magnitude():
    model, shares = make(), Shares()
    first = {}

    class Look(Hook):
        def on_fit_start(self, state):
            first.update({name: each.detach().abs() for name, each in state.model.named_parameters() if each.dim() > 1})

        def on_step_end(self, state):
            if state.step == 1:
                self.gone = torch.cat([each.flatten() for each in zeros(state.model).values()])

    look = Look()
    train(model, SparsityBand(0.3, 0.6, every=3), shares, look, kind="sgd")
    count = len(look.gone)
    assert {round(each * count) for each in shares.seen} == {-int(-0.3 * count // 1)}
    size = torch.cat([each.flatten() for each in first.values()])
    assert size[look.gone].max() <= size[~look.gone].min()
    assert edits.record(model)[-1].patterns.keys() == zeros(model).keys()


def test_a_band_lets_the_zeros_of_the_greatest_gradients_grow():
    model = sparsify(make(), sparsity=0.8)
    before = torch.cat([each.flatten() for each in zeros(model).values()])
    seen = {}

    class Look(Hook):
        def on_gradients(self, state):
            if state.step == 0:
                seen["grads"] = torch.cat([each.grad.abs().flatten() for each in state.model.parameters()
                                           if each.dim() > 1])  # fmt: skip

        def on_step_end(self, state):
            seen.setdefault("after", torch.cat([each.flatten() for each in zeros(state.model).values()]))

    band = SparsityBand(0.2, 0.5, every=1000)
    train(model, Look(), band, kind="sgd", epochs=1)
    count = len(before)
    assert int(seen["after"].sum()) == int(0.5 * count)
    grown = before & ~seen["after"]
    assert bool((~before == ~seen["after"])[~grown].all())
    assert seen["grads"][grown].min() >= seen["grads"][before & seen["after"]].max()


def test_within_the_band_what_shrinks_to_nothing_stays_nothing():
    class Pressure(Hook):
        """Soft thresholding, as of an L1 penalty."""

        def on_step_end(self, state):
            with torch.no_grad():
                for each in state.model.parameters():
                    if each.dim() > 1:
                        each.copy_(each.sign() * (each.abs() - 0.02).clamp(min=0))

    model, shares = make(), Shares()
    train(model, Pressure(), SparsityBand(0.1, 0.6, every=2, threshold=1e-3), shares, kind="sgd", epochs=6)
    at_looks = shares.seen[::2]
    assert min(shares.seen) >= 0.1
    assert any(0.12 < share < 0.58 for share in at_looks)
    model = make()
    train(model, Pressure(), SparsityBand(0.0, 0.2, every=1), kind="sgd", epochs=6)
    assert sparsity(model) >= 0.15  # what grows again starts from zero


class Stops(Hook):
    """Breaks a training off in its third epoch, once."""

    def __init__(self):
        self.armed = True

    def on_gradients(self, state):
        if self.armed and state.epoch == 3:
            self.armed = False
            raise BrokenOffError


@pytest.mark.parametrize(
    "kind",
    [
        HoldMasks,
        lambda: GradualSparsity(0.8, updates=6, stop=0.9),
        lambda: SparsityBand(0.3, 0.4, every=3, threshold=0.05),
    ],
    ids=["hold", "gradual", "band"],
)
def test_resumed_is_bit_identical(tmp_path, kind):
    start = sparsify(make(), sparsity=0.5)
    whole, broken, resumed = (copy.deepcopy(start) for _ in range(3))
    never = Stops()
    never.armed = False
    train(whole, kind(), never)
    stops = Stops()
    with pytest.raises(BrokenOffError):
        train(broken, kind(), stops, checkpoint=tmp_path / "state")
    for each in resumed.parameters():
        each.data.fill_(7)  # what a model holds before it resumes must not matter
    train(resumed, kind(), stops, checkpoint=tmp_path / "state")
    assert same(whole, resumed)
    assert edits.record(whole) == edits.record(resumed)
    # A training that is over changes nothing any more.
    train(resumed, kind(), stops, checkpoint=tmp_path / "state")
    assert same(whole, resumed)
    assert edits.record(whole) == edits.record(resumed)


def test_a_trained_sparse_model_is_saved_and_loaded(tmp_path):
    model = make()
    train(model, GradualSparsity(0.7, updates=2), epochs=1)
    again = slivo.load(slivo.save(model, tmp_path / "net"), factory=lambda: Net(8))
    assert same(model, again)
    assert edits.record(again) == edits.record(model)
    masks = zeros(again)
    train(again, HoldMasks(), epochs=1)
    assert all(bool(zeros(again)[name][mask].all()) for name, mask in masks.items())


@pytest.mark.parametrize(
    ("make_hook", "told"),
    [
        (lambda: GradualSparsity(1.5), "sparsity is 1.5"),
        (lambda: GradualSparsity(0.5, pattern="2:4"), "'2:4' has a sparsity of its own"),
        (lambda: GradualSparsity(0.5, start=0.5, stop=0.2), "start and stop are 0.5 and 0.2"),
        (lambda: GradualSparsity(0.5, start="now"), "start and stop are now"),
        (lambda: GradualSparsity(0.5, updates=0), "updates is 0"),
        (lambda: GradualSparsity(0.5, criterion="taylor"), "'taylor' needs batches and a loss; a hook has weights"),
        (lambda: GradualSparsity(0.5, criterion="fpgm"), "'fpgm' scores whole channels"),
        (lambda: GradualSparsity(0.5, scope="all"), "scope is 'all'"),
        (lambda: SparsityBand(0.5, 0.4), "from 0.5 to 0.4"),
        (lambda: SparsityBand(0.5, 1), "from 0.5 to 1"),
        (lambda: SparsityBand(None, 0.5), "from None to 0.5"),
        (lambda: SparsityBand(0.1, 0.5, every=0), "every is 0"),
        (lambda: SparsityBand(0.1, 0.5, threshold=-1), "threshold is -1"),
    ],
)
def test_bad_options_of_hooks_are_told(make_hook, told):
    with pytest.raises(SlivoError, match=told):
        make_hook()
