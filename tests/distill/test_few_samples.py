"""Batches of no samples and of one, such as the last of an epoch: every loss gives a number with a gradient."""

import pytest
import torch

from slivo import losses
from slivo.distill import contrast, features, relations
from slivo.distill.adapt import make
from slivo.errors import ShapeError

SHAPES = {"vectors": (6,), "tokens": (5, 8), "maps": (8, 4, 4), "attention": (2, 5, 5)}
# What is between samples, of which one alone has none. (A queue remembers others.)
BETWEEN = [
    name
    for name in losses.names()
    if any(name in vars(module) for module in (relations, contrast)) or name in ("sp", "pkt")
    if name != "queue_kl"
]


LOGITS = [each.name for each in losses.describe() if "at: path = ''" in each.parameters]


def evaluated(name, size, shape, *, seed=0):
    """Return a loss of random activations and its slope, in float64, by an adapter that was made for larger batches."""
    term = losses.build({name: {} if name in LOGITS else {"at": "x"}})
    torch.manual_seed(seed)
    larger = torch.randn(4, *shape, dtype=torch.float64)
    student, teacher = torch.randn(2, size, *shape, dtype=torch.float64)
    student.requires_grad_()
    like, ours, theirs = ([each, each] if term.joint else each for each in (larger, student, teacher))
    options = {**term.params, **({"heads": 2} if name in ("relation", "attention_relation") else {})}
    extra = {"mask": None, "labels": torch.zeros(size, *shape[:-1], dtype=torch.int64)}
    if "adapter" in term.supplied:
        extra["adapter"] = make(term.function, options, like, like, seed=0)
    value = term.function(ours, theirs, *(extra[what] for what in term.supplied), **options)
    (slope,) = torch.autograd.grad(value, student)
    return value, slope


def fits(name, shape):
    try:
        evaluated(name, 4, shape)
    except ShapeError:
        return False
    return True


@pytest.mark.parametrize("name", losses.names())
def test_no_samples_give_zero_and_one_a_finite_number_with_a_slope(name):
    shapes = [shape for shape in SHAPES.values() if fits(name, shape)]
    assert shapes
    for shape in shapes:
        value, slope = evaluated(name, 0, shape)
        assert value.shape == ()
        assert value.item() == 0
        assert slope.shape == (0, *shape)
        value, slope = evaluated(name, 1, shape)
        assert value.shape == ()
        assert value.isfinite()
        assert slope.isfinite().all()


@pytest.mark.parametrize("name", BETWEEN)
def test_one_sample_has_no_relations(name):
    assert len(BETWEEN) == 7
    for shape in SHAPES.values():
        if fits(name, shape):
            value, slope = evaluated(name, 1, shape)
            # Cosines of a sample with itself are 1 but for rounding.
            assert value.item() == pytest.approx(0, abs=1e-12)
            assert slope.abs().max().item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("name", ["hint", "sp", "attention_transfer", "nst", "correlation_congruence"])
def test_no_samples_are_still_checked(name):
    function = getattr(features, name, None) or getattr(relations, name)
    with pytest.raises(ShapeError, match="do not fit"):
        function(torch.zeros(0, 3, 4), torch.zeros(1, 3, 4))
