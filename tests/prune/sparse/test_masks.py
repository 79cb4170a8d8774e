"""Sparsity is exact, zeros lie where the pattern says, and what stays is what scores best."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import slivo
from slivo import edits
from slivo.edits import Mask
from slivo.edits.mask import Pattern
from slivo.errors import RecipeError, ShapeError, SlivoError
from slivo.prune import criteria, sparsify
from slivo.prune.criterion import criterion
from slivo.prune.sparse.choice import best
from slivo.prune.sparse.masks import masked, sparsity


class Mixed(nn.Module):
    """One weight of each kind, a tied one, positions that are none, and norms."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(8, 12)
        self.places = nn.Parameter(torch.randn(1, 4, 12))
        self.norm = nn.LayerNorm([4, 12])
        self.mix = nn.LSTM(12, 8, batch_first=True)
        self.conv = nn.Conv1d(8, 12, 2)
        self.up = nn.ConvTranspose1d(12, 12, 2)
        self.head = nn.Linear(12, 8)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        x = self.mix(self.norm(self.tokens(x) + self.places))[0]
        return self.head(self.up(self.conv(x.mT)).mT)


NAMES = {"tokens.weight", "norm.weight", "mix.weight_ih_l0", "mix.weight_hh_l0", "conv.weight", "up.weight"}


def zeros(model, names=NAMES):
    return sum(int((each == 0).sum()) for name, each in model.named_parameters() if name in names)


def size(model, names=NAMES):
    return sum(each.numel() for name, each in model.named_parameters() if name in names)


def test_weights_are_chosen_by_what_they_are_and_counted_once():
    model = Mixed()
    sparse = sparsify(model, sparsity=0.5, exclude=["norm"])
    assert set(masked(sparse)) == NAMES - {"norm.weight"}
    assert sparse.head.weight is sparse.tokens.weight
    assert zeros(sparse, NAMES - {"norm.weight"}) == round(0.5 * size(model, NAMES - {"norm.weight"}))
    assert zeros(sparse, {"places", "head.bias"}) == 0
    assert set(masked(sparsify(model, sparsity=0.5, only=["conv", "places"]))) == {"conv.weight", "places"}
    assert edits.record(model) == ()
    assert zeros(model) == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(2, 9)), min_size=1, max_size=4), st.floats(0, 0.999))
def test_the_count_is_exact(shapes, share):
    model = nn.Sequential(*[nn.Linear(inputs, outputs, bias=False) for outputs, inputs in shapes])
    count = size(model, {f"{at}.weight" for at in range(len(shapes))})
    for scope in ("global", "layer", "row"):
        sparse = sparsify(model, sparsity=share, scope=scope)
        for layer in sparse if scope != "global" else ():
            units = layer.weight if scope == "row" else [layer.weight]
            assert all(int((each == 0).sum()) == math.floor(share * each.numel() + 0.5) for each in units)
        if scope == "global":
            kept = count - math.floor(share * count + 0.5)
            assert sum(int((layer.weight != 0).sum()) for layer in sparse) == kept
            # Every layer stays open as long as there is an entry for each.
            assert kept < len(shapes) or all(bool(layer.weight.any()) for layer in sparse)


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_magnitude_keeps_the_largest_by_a_slow_reference(scope):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Conv1d(5, 4, 3)).double()
    sparse = sparsify(model, sparsity=0.7, scope=scope, min_keep=0)
    groups = {"global": [[(0, None), (1, None)]], "layer": [[(0, None)], [(1, None)]]}.get(
        scope, [[(0, row)] for row in range(5)] + [[(1, row)] for row in range(4)]
    )
    for group in groups:
        every = [
            (abs(float(value.detach())), float(left.detach()))
            for at, row in group
            for value, left in zip(
                model[at].weight[slice(None) if row is None else row].flatten(),
                sparse[at].weight[slice(None) if row is None else row].flatten(),
                strict=True,
            )
        ]
        every.sort(reverse=True)
        kept = len(every) - math.floor(0.7 * len(every) + 0.5)
        assert all(left != 0 for _, left in every[:kept])
        assert all(left == 0 for _, left in every[kept:])


def test_of_equal_weights_the_first_stay_and_zeros_go_first():
    model = nn.Linear(4, 2, bias=False)
    nn.init.ones_(model.weight)
    with torch.no_grad():
        model.weight[0, 1] = 0
    sparse = sparsify(model, sparsity=0.5)
    assert sparse.weight.tolist() == [[1, 0, 1, 1], [1, 0, 0, 0]]
    # By whatever criterion: one that likes zeros best does not bring the count out of order.
    backwards = criterion()(lambda weights: -weights.abs().sum(1))
    assert sparsify(sparse, sparsity=0.5, criterion=backwards).weight.tolist() == sparse.weight.tolist()


@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 8), st.integers(0, 99))
def test_best_marks_so_many_of_each_row_by_sorting(rows, columns, count, seed):
    count = min(count, columns)
    scores = torch.randint(0, 3, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    assert torch.equal(best(scores, count), torch.zeros_like(scores).scatter(1, order, 1).bool())


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:2", "3:4"])
def test_every_group_has_as_many_as_the_pattern_says(pattern):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 6, 3), nn.Conv2d(6, 16, 1), nn.Linear(4, 3))
    sparse = sparsify(model, pattern=pattern, exclude=["2"])
    most, of = (int(each) for each in pattern.split(":"))
    for at, dim in ((0, 1), (1, 0), (3, 1)):
        weight, dense = (net[at].weight.movedim(dim, -1).reshape(-1, of) for net in (sparse, model))
        assert bool(((weight != 0).sum(1) == most).all())
        smallest_kept = dense.abs().masked_fill(weight == 0, math.inf).amin(1)
        assert bool((smallest_kept >= dense.abs().masked_fill(weight != 0, 0).amax(1)).all())
    assert edits.record(sparse)[-1] == Mask({"0.weight": pattern, "1.weight": f"{pattern}@0", "3.weight": pattern})
    assert torch.equal(sparse[2].weight, model[2].weight)


def test_the_graph_says_where_inputs_lie():
    class Columns(nn.Module):
        """A linear layer whose weight has the inputs first, as some transformers have."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 6))

        def forward(self, x):
            return x @ self.weight

    model, x = nn.Sequential(Columns()), torch.randn(2, 8)
    sparse = sparsify(model, x, pattern="2:4")
    assert edits.record(sparse)[-1] == Mask({"0.weight": "2:4@0"})
    assert bool(((sparse[0].weight != 0).reshape(2, 4, 6).sum(1) == 2).all())
    rows = sparsify(model, x, sparsity=0.75, scope="row")
    assert (rows[0].weight != 0).sum(0).tolist() == [2] * 6
    assert edits.record(sparsify(model, pattern="1:2"))[-1] == Mask({"0.weight": "1:2"})
    assert edits.record(sparsify(model, x, pattern="1:2@1"))[-1] == Mask({"0.weight": "1:2@1"})


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_blocks_go_as_a_whole_the_smallest_first(scope):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Conv2d(4, 4, (1, 3)))
    sparse = sparsify(model, sparsity=0.5, pattern="2x4", scope=scope, criterion="l1")
    blocks = {0: model[0].weight.reshape(3, 2, 2, 4).movedim(1, 2), 1: model[1].weight.reshape(2, 2, 1, 4, 3)}
    sums = {0: blocks[0].abs().sum((2, 3)), 1: blocks[1].movedim(-1, 1).abs().sum((2, 4))}
    left = {
        0: (sparse[0].weight.reshape(3, 2, 2, 4) != 0).sum((1, 3)),
        1: (sparse[1].weight.reshape(2, 2, 4, 3) != 0).sum((1, 2)),
    }
    assert all(set(each.unique().tolist()) <= {0, 8} for each in left.values())
    if scope == "global":
        assert sum(int((each == 8).sum()) for each in left.values()) == 6
        flat = sorted((float(value.detach()), int(n)) for at in (0, 1) for value, n in zip(
            sums[at].flatten(), left[at].flatten(), strict=True))  # fmt: skip
        assert [n for _, n in flat] == [0] * 6 + [8] * 6
    elif scope == "layer":
        assert [int((left[at] == 8).sum()) for at in (0, 1)] == [3, 3]
    else:
        assert (left[0] == 8).sum(1).tolist() == [1, 1, 1]
    assert all(Pattern.parse("2x4").holds(each) for each in masked(sparse).values())


def test_wanda_is_that_of_its_paper():
    """|w| times the norm of its input, the best of each output stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    x = torch.randn(32, 8, dtype=torch.float64)
    sparse = sparsify(model, sparsity=0.5, scope="row", criterion="wanda", batches=[x[:10], x[10:]])
    for at, read in ((0, x), (2, model[:2](x))):
        scores = model[at].weight.detach().abs() * read.square().sum(0).sqrt()
        for row, left in zip(scores, sparse[at].weight, strict=True):
            assert set(row.topk(len(row) // 2).indices.tolist()) == set(left.nonzero().flatten().tolist())


@pytest.mark.parametrize("name", ["taylor", "snip", "fisher", "gradient"])
def test_criteria_of_the_gradient_score_single_weights(name):
    """Against the formulas, in one batch at a time, averaged."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    data = [(torch.randn(5, 6, dtype=torch.float64), torch.randint(3, (5,))) for _ in range(3)]
    sparse = sparsify(
        model, sparsity=0.6, criterion=name, batches=data, loss=lambda m, b: F.cross_entropy(m(b[0]), b[1])
    )
    total = torch.zeros_like(model.weight)
    for x, labels in data:
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x), labels), [model.weight])
        change = model.weight * grad
        total += {"taylor": change**2, "snip": change.abs(), "fisher": change**2 / 2, "gradient": grad**2}[
            name
        ].detach()
    kept = total.flatten().topk(18 - 11).indices
    assert set(kept.tolist()) == set(sparse.weight.flatten().nonzero().flatten().tolist())


def test_lamp_is_that_of_its_paper():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    sparse = sparsify(model, sparsity=0.8, criterion="lamp", min_keep=0)
    scored = []
    for at in (0, 1):
        squares = model[at].weight.detach().flatten() ** 2
        scored += [(float(s / squares[squares >= s].sum()), at, place) for place, s in enumerate(squares)]
    scored.sort(reverse=True)
    left = {(at, int(place)) for at in (0, 1) for place in sparse[at].weight.flatten().nonzero()}
    assert {(at, place) for _, at, place in scored[: 50 - 40]} == left


def test_random_choices_depend_on_the_generator_alone():
    model = nn.Linear(16, 16)
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(sparsify(model, sparsity=0.5, criterion="random").weight)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=7, unique=False), st.integers(1, 4), st.data())
def test_no_choice_of_as_many_has_more_entropy(values, bins, data):
    """The maximum-entropy choice against all choices of its size, one by one."""
    from itertools import combinations

    keep = data.draw(st.integers(1, len(values)))
    weights = torch.tensor(values, dtype=torch.float64)
    scores = criteria.resolve("entropy").score(weights[:, None], bins=bins)
    low, high = min(values), max(values)
    place = [min(bins - 1, int((v - low) / ((high - low) / bins))) if high > low else 0 for v in values]

    def entropy(kept):
        counts = [sum(place[each] == b for each in kept) for b in range(bins)]
        return -sum(n / len(kept) * math.log(n / len(kept)) for n in counts if n)

    chosen = best(scores[None], keep)[0].nonzero().flatten().tolist()
    assert entropy(chosen) >= max(map(entropy, combinations(range(len(values)), keep))) - 1e-12


def test_maximum_entropy_spreads_what_random_and_magnitude_do_not():
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    nn.init.normal_(model.weight)

    def entropy(name):
        left = sparsify(model, sparsity=0.8, criterion=name).weight.detach()
        counts = torch.histc(left[left != 0], 64, -4, 4)
        return float(torch.special.entr(counts / counts.sum()).sum())

    assert entropy("entropy") > max(entropy("random"), entropy("l1")) + 0.1


def test_artifacts_keep_zeros_and_record(tmp_path):
    model = Mixed().eval()
    sparse = sparsify(model, pattern="2:4", exclude=["norm"]).eval()
    again = slivo.load(slivo.save(sparse, tmp_path / "sparse"), factory=Mixed)
    assert edits.record(again) == edits.record(sparse)
    assert sparsity(again) == sparsity(sparse) == 0.5
    x = torch.randint(8, (2, 4))
    assert torch.equal(again(x), sparse(x))


def test_sparsity_of_a_model_without_a_mask_is_nothing():
    assert sparsity(nn.Linear(2, 2)) == 0
    assert masked(nn.Linear(2, 2)) == {}


def test_half_precision_and_frozen_weights_are_made_sparse():
    model = nn.Linear(8, 8).half().requires_grad_(False)
    sparse = sparsify(model, sparsity=0.5)
    assert sparse.weight.dtype == torch.float16
    assert not sparse.weight.requires_grad
    assert int((sparse.weight == 0).sum()) == 32


NET = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3))


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({}, RecipeError, "'unstructured' needs a sparsity"),
        ({"sparsity": 1.0}, RecipeError, r"sparsity is 1\.0; a share of zeros from 0 to below 1"),
        ({"sparsity": True}, RecipeError, "sparsity is True"),
        ({"sparsity": "0.5"}, RecipeError, "sparsity is '0.5'"),
        ({"sparsity": 0.4, "pattern": "2:4"}, RecipeError, r"sparsity is 0\.4 and the pattern '2:4' has 0\.5"),
        ({"sparsity": 0.5, "pattern": "2of4"}, RecipeError, "give 'unstructured', N:M"),
        ({"sparsity": 0.5, "scope": "uniform"}, RecipeError, "scope is 'uniform'; there are global, layer, row"),
        ({"sparsity": 0.5, "min_keep": 2}, SlivoError, "min_keep is 2"),
        ({"sparsity": 0.5, "criterion": "obs"}, SlivoError, "'obs' scores whole channels, not single weights"),
        ({"sparsity": 0.5, "criterion": "fpgm"}, SlivoError, "there are .*entropy.*taylor"),
        ({"sparsity": 0.5, "criterion": "wanda"}, SlivoError, "needs batches"),
        ({"sparsity": 0.5, "criterion": "wanda", "batches": []}, SlivoError, "was given no batches"),
        ({"sparsity": 0.5, "only": ["3"]}, SlivoError, "'3' matches no parameter; there are 0.weight, 1.weight"),
        ({"sparsity": 0.5, "exclude": ["*"]}, SlivoError, "leave nothing of 0.weight, 1.weight"),
        ({"sparsity": 0.5, "only": ["0.bias"]}, SlivoError, "no weight of two dimensions or more is meant"),
        ({"pattern": "2:4"}, ShapeError, r"0\.weight has shape \[8, 3, 3, 3\].*exclude=\['0\.weight'\]"),
        ({"pattern": "4x3", "sparsity": 0.5}, ShapeError, r"1\.weight has.*dim 0 into groups of 4.*\['1\.weight'\]"),
    ],
)  # fmt: skip
def test_bad_options_are_told(options, error, told):
    with pytest.raises(error, match=told):
        sparsify(NET, **options)


def test_weights_that_no_activation_meets_and_scores_that_are_no_numbers_are_told():
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    tokens = torch.zeros(2, dtype=torch.long)
    with pytest.raises(SlivoError, match=r"saw no activation that 0\.weight multiplies"):
        sparsify(model, sparsity=0.5, criterion="wanda", batches=[tokens])
    nn.init.constant_(model[1].weight, math.nan)
    with pytest.raises(SlivoError, match=r"'l1' gives 1\.weight scores that are not 16 finite numbers"):
        sparsify(model, sparsity=0.5)
