"""Losses that tell samples apart against their papers, in NumPy and float64, and what the queue remembers."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn

from slivo import losses
from slivo.distill import contrast
from slivo.distill.adapt import make
from slivo.distill.contrast import crd, queue_kl
from slivo.errors import RecipeError, ShapeError


def draw(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def array(tensor):
    return tensor.detach().double().numpy()


def embedded(layer, activation):
    """Means over places, through a linear layer if it is one, of length 1."""
    rows = activation.mean(1) if activation.ndim == 3 else activation
    rows = rows.reshape(*rows.shape[:2], -1).mean(-1)
    if isinstance(layer, nn.Linear):
        rows = np.array(
            [[sum(w * x for w, x in zip(out, row, strict=True)) for out in array(layer.weight)] for row in rows]
        )
        rows = rows + array(layer.bias)
    return np.array([row / np.sqrt((row**2).sum()) for row in rows])


def log_softmax(values):
    return values - np.log(np.exp(values).sum())


def ref_crd(student, teacher, adapter, temperature=0.07, **_):
    ours, theirs = embedded(adapter.ours, student), embedded(adapter.theirs, teacher)
    others = [*theirs, *(row for row in array(adapter.queue) if row.any())]
    total = 0.0
    for index, (s, t) in enumerate(zip(ours, theirs, strict=True)):
        forth = log_softmax(np.array([s @ other for other in others]) / temperature)
        back = log_softmax(np.array([t @ other for other in ours]) / temperature)
        total -= (forth[index] + back[index]) / 2
    return total / len(ours)


def ref_queue_kl(student, teacher, adapter, temperature=0.04, **_):
    ours, theirs = embedded(adapter.ours, student), embedded(adapter.theirs, teacher)
    anchors = [*theirs, *(row for row in array(adapter.queue) if row.any())]
    total = 0.0
    for s, t in zip(ours, theirs, strict=True):
        log_q, log_p = (log_softmax(np.array([row @ anchor for anchor in anchors]) / temperature) for row in (s, t))
        total += (np.exp(log_p) * (log_p - log_q)).sum()
    return total / len(ours)


REFERENCES = {
    "crd": (ref_crd, [{}, {"temperature": 0.5, "features": 3}, {"queue": 5, "features": 4}]),
    "queue_kl": (ref_queue_kl, [{}, {"temperature": 0.5, "queue": 5}, {"queue": 0}]),
}
LOSSES = [
    name
    for name, value in vars(contrast).items()
    if inspect.isfunction(value) and value.__module__ == contrast.__name__ and name[0] != "_"
]
PAIRS = [(name, options) for name, (_, choices) in REFERENCES.items() for options in choices]
SHAPES = [((6, 4), (6, 3)), ((5, 3, 2, 2), (5, 4, 3, 3)), ((4, 6, 3), (4, 3, 2, 2))]


def prepared(name, student, teacher, **options):
    """Return a loss's adapter, with a queue of two if it has one, which does not change."""
    adapter = make(getattr(contrast, name), options, student, teacher, seed=0)
    adapter.remember(nn.functional.normalize(draw((2, adapter.queue.shape[1]), seed=9)[0]))
    return adapter.eval()


def test_every_loss_has_a_reference():
    assert sorted(REFERENCES) == sorted(LOSSES)
    assert set(LOSSES) <= set(losses.names())


@pytest.mark.parametrize(("name", "options"), PAIRS)
@pytest.mark.parametrize("shapes", SHAPES)
def test_is_the_formula_of_its_paper(name, options, shapes):
    student, teacher = draw(*shapes)
    adapter = prepared(name, student, teacher, **options)
    found = getattr(contrast, name)(student, teacher, adapter, **options)
    expected = REFERENCES[name][0](array(student), array(teacher), adapter, **options)
    assert found.shape == ()
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("name", "options"), PAIRS)
def test_gradient_is_the_slope_and_the_teacher_has_none(name, options):
    student, teacher = (each.requires_grad_() for each in draw((5, 3), (5, 4)))
    adapter, function = prepared(name, student, teacher, **options), getattr(contrast, name)
    assert torch.autograd.gradcheck(lambda values: function(values, teacher.detach(), adapter, **options), student)
    function(student, teacher, adapter, **options).backward()
    assert teacher.grad is None
    assert student.grad.norm() > 0
    assert all(parameter.grad.isfinite().all() for parameter in adapter.parameters())


@pytest.mark.parametrize("name", LOSSES)
def test_scale_and_order_of_samples_do_not_matter_to_embeddings(name):
    student, teacher = draw((6, 4), (6, 4))
    adapter = prepared(name, student, teacher, **({"features": 4} if name == "crd" else {}))
    adapter.ours = adapter.theirs = nn.Identity()
    function = getattr(contrast, name)
    expected = function(student, teacher, adapter)
    torch.testing.assert_close(function(3 * student, 0.1 * teacher, adapter), expected)
    order = [3, 1, 5, 0, 2, 4]
    torch.testing.assert_close(function(student[order], teacher[order], adapter), expected)


def test_a_student_like_its_teacher_has_no_divergence_and_finds_each_sample():
    (teacher,) = draw((6, 8))
    adapter = prepared("queue_kl", teacher, teacher)
    assert queue_kl(teacher, teacher, adapter).item() == pytest.approx(0, abs=1e-12)
    adapter = make(crd, {"features": 8}, teacher, teacher, seed=0)
    adapter.ours = adapter.theirs = nn.Identity()
    alike = crd(teacher, teacher, adapter)
    assert alike < crd(teacher.roll(1, 0), teacher, adapter)
    assert alike < 0.01


def test_training_an_adapter_tells_samples_apart():
    torch.manual_seed(0)
    teacher = torch.randn(16, 6)
    student = teacher @ torch.randn(6, 5)
    adapter = make(crd, {}, student, teacher, seed=0)
    before = crd(student, teacher, adapter)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        crd(student, teacher, adapter).backward()
        optimizer.step()
    assert crd(student, teacher, adapter) < before / 4


@pytest.mark.parametrize("name", LOSSES)
def test_the_queue_holds_the_newest_of_the_teachers(name):
    adapter = make(getattr(contrast, name), {"queue": 5}, *draw((3, 4), (3, 4)), seed=0)
    assert adapter.queue.shape[0] == 5
    assert (adapter.queue == 0).all()
    seen = []
    for seed in range(3):
        student, teacher = (each.requires_grad_() for each in draw((3, 4), (3, 4), seed=seed))
        loss = getattr(contrast, name)(student, teacher, adapter, queue=5)
        seen = [*adapter(student, teacher)[1].detach(), *seen][:5]
        # Nothing that the gradient needs has been overwritten.
        loss.backward()
        torch.testing.assert_close(adapter.queue[: len(seen)], torch.stack(seen))
        assert not adapter.queue.requires_grad
    adapter.eval()
    before = adapter.queue.clone()
    getattr(contrast, name)(student, teacher, adapter, queue=5)
    assert torch.equal(adapter.queue, before)
    assert dict(adapter.named_buffers()).keys() == {"queue"}


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_single(name):
    student, teacher = draw((5, 3), (5, 4), dtype=torch.float16)
    adapter = make(getattr(contrast, name), {}, student, teacher, seed=0)
    assert adapter.queue.dtype == torch.float32
    adapter.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = getattr(contrast, name)(student, teacher, adapter)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, getattr(contrast, name)(student.float(), teacher.float(), adapter))


@pytest.mark.parametrize("name", LOSSES)
def test_zeros_extremes_and_few_samples_give_finite_values_and_slopes(name):
    for ours, theirs in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1e4, -1e4), (-1e4, 1e4)):
        for size in (0, 1, 3):
            student = (ours * torch.randn(size, 4)).requires_grad_()
            teacher = torch.full((size, 3), theirs)
            adapter = make(getattr(contrast, name), {}, student, teacher, seed=0)
            for _ in range(2):
                value = getattr(contrast, name)(student, teacher, adapter)
                assert value.isfinite()
                assert torch.autograd.grad(value, student)[0].isfinite().all()
    alone = make(crd, {}, *draw((1, 4), (1, 3)), seed=0)
    assert crd(*draw((1, 4), (1, 3)), alone) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_what_does_not_fit_is_refused(name):
    function, some = getattr(contrast, name), torch.ones(4, 3)
    with pytest.raises(ShapeError, match=r"\(4, 3\) and teacher \(5, 3\) do not fit"):
        function(some, torch.ones(5, 3), None)
    with pytest.raises(RecipeError, match="temperature is 0"):
        function(some, some, None, temperature=0.0)
    for wrong in ({"queue": -1}, {"features": 0})[: 2 if name == "crd" else 1]:
        with pytest.raises(RecipeError, match="features must be 1 or more and queue 0 or more"):
            make(function, wrong, some, some, seed=0)
        with pytest.raises(RecipeError, match="features must be 1 or more and queue 0 or more"):
            function(some, some, None, **wrong)
