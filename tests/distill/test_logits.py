"""Losses on logits against their papers, written out in loops and float64, and what must be true of all of them."""

import inspect
import math

import numpy as np
import pytest
import torch

from slivo import losses
from slivo.distill import logits
from slivo.distill.logits import (
    binary,
    cosine,
    dist,
    dkd,
    jsd,
    kd,
    l1,
    mse,
    reverse_kl,
    skewed_kl,
    soft_cross_entropy,
    standardized_kd,
)
from slivo.errors import RecipeError, ShapeError

CLASSES = 5
INF = math.inf


def softmax(row, temperature=1.0):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def pearson(a, b):
    a, b = np.array(a) - np.mean(a), np.array(b) - np.mean(b)
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


def per_sample(of_one):
    """Make the reference of a loss that is a mean over samples, of its value for one (student, teacher)."""

    def reference(student, teacher, **options):
        return float(np.mean([of_one(s, t, **options) for s, t in zip(student, teacher, strict=True)]))

    return reference


def ref_kd(s, t, temperature=4.0):
    return temperature**2 * divergence(softmax(t, temperature), softmax(s, temperature))


def ref_soft_cross_entropy(s, t, temperature=4.0):
    p, q = softmax(t, temperature), softmax(s, temperature)
    return -(temperature**2) * sum(a * math.log(b) for a, b in zip(p, q, strict=True))


def ref_cosine(s, t):
    return 1 - sum(s * t) / math.sqrt(sum(s * s) * sum(t * t))


def ref_reverse_kl(s, t, temperature=1.0):
    return temperature**2 * divergence(softmax(s, temperature), softmax(t, temperature))


def ref_skewed_kl(s, t, temperature=1.0, alpha=0.1):
    p, q = softmax(t, temperature), softmax(s, temperature)
    return temperature**2 * divergence(p, [alpha * a + (1 - alpha) * b for a, b in zip(p, q, strict=True)])


def ref_jsd(s, t, temperature=1.0, beta=0.5):
    p, q = softmax(t, temperature), softmax(s, temperature)
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return temperature**2 * (beta * divergence(p, m) + (1 - beta) * divergence(q, m))


def ref_standardized_kd(s, t, temperature=2.0):
    s, t = ((z - z.mean()) / (z.std(ddof=1) + 1e-7) for z in (s, t))
    return ref_kd(s, t, temperature)


def ref_binary(s, t, temperature=1.0):
    total = 0.0
    for a, b in zip(s, t, strict=True):
        q, p = (1 / (1 + math.exp(-value / temperature)) for value in (a, b))
        total += divergence([p, 1 - p], [q, 1 - q])
    return temperature**2 * total


def ref_dkd(student, teacher, labels, temperature=4.0, alpha=1.0, beta=8.0):
    values = []
    for s, t, y in zip(student, teacher, labels, strict=True):
        p, q = softmax(t, temperature), softmax(s, temperature)
        target = divergence([p[y], 1 - p[y]], [q[y], 1 - q[y]])
        others = [c for c in range(len(s)) if c != y]
        rest = divergence(softmax(t[others], temperature), softmax(s[others], temperature))
        values.append(temperature**2 * (alpha * target + beta * rest))
    return float(np.mean(values))


def ref_dist(student, teacher, temperature=1.0, beta=1.0, gamma=1.0):
    p, q = (np.array([softmax(row, temperature) for row in rows]) for rows in (teacher, student))
    samples = np.mean([1 - pearson(p[i], q[i]) for i in range(len(p))])
    classes = np.mean([1 - pearson(p[:, c], q[:, c]) for c in range(p.shape[1])])
    return float(temperature**2 * (beta * samples + gamma * classes))


REFERENCES = {
    "kd": (per_sample(ref_kd), [{}, {"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 20.0}]),
    "soft_cross_entropy": (per_sample(ref_soft_cross_entropy), [{}, {"temperature": 1.5}]),
    "mse": (per_sample(lambda s, t: ((s - t) ** 2).mean()), [{}]),
    "l1": (per_sample(lambda s, t: abs(s - t).mean()), [{}]),
    "cosine": (per_sample(ref_cosine), [{}]),
    "dkd": (ref_dkd, [{}, {"temperature": 1.0, "alpha": 0.3, "beta": 2.0}, {"alpha": 0.0}, {"beta": 0.0}]),
    "dist": (ref_dist, [{}, {"temperature": 4.0, "beta": 2.0, "gamma": 0.5}, {"beta": 0.0}, {"gamma": 0.0}]),
    "standardized_kd": (per_sample(ref_standardized_kd), [{}, {"temperature": 1.0}]),
    "jsd": (per_sample(ref_jsd), [{}, {"temperature": 2.0, "beta": 0.1}, {"beta": 0.9}]),
    "reverse_kl": (per_sample(ref_reverse_kl), [{}, {"temperature": 3.0}]),
    "skewed_kl": (per_sample(ref_skewed_kl), [{}, {"temperature": 2.0, "alpha": 0.5}, {"alpha": 0.0}]),
    "binary": (per_sample(ref_binary), [{}, {"temperature": 2.0}]),
}
LOSSES = [
    name
    for name, value in vars(logits).items()
    if getattr(value, "__module__", "") == logits.__name__ and name[0] != "_"
]
PAIRS = [(name, options) for name, (_, choices) in REFERENCES.items() for options in choices]
TEMPERED = [name for name in LOSSES if "temperature" in inspect.signature(getattr(logits, name)).parameters]


def draw(*shape, seed=0, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def call(name, student, teacher, labels=None, **options):
    """Call a loss, with labels if it needs them."""
    function = getattr(logits, name)
    if name != "dkd":
        return function(student, teacher, **options)
    if labels is None:
        labels = torch.arange(student[..., 0].numel()).view(student.shape[:-1]) % student.shape[-1]
    return function(student, teacher, labels, **options)


def gradient(name, student, teacher, **options):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(call(name, student, teacher, **options), student)[0]


def test_every_loss_has_a_reference():
    assert sorted(REFERENCES) == sorted(LOSSES)
    assert set(LOSSES) <= set(losses.names())


@pytest.mark.parametrize(("name", "options"), PAIRS)
@pytest.mark.parametrize("shape", [(6, CLASSES), (2, 3, CLASSES), (1, 2, 3, CLASSES)])
def test_is_the_formula_of_its_paper(name, options, shape):
    student, teacher = draw(*shape)
    labels = torch.arange(6).view(shape[:-1]) % CLASSES
    rows = [each.flatten(0, -2).numpy() for each in (student, teacher)]
    more = [labels.flatten().tolist()] if name == "dkd" else []
    expected = REFERENCES[name][0](*rows, *more, **options)
    found = call(name, student, teacher, labels, **options)
    assert found.shape == ()
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(expected, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize(("name", "options"), PAIRS)
def test_gradient_is_the_slope(name, options):
    student, teacher = draw(4, CLASSES)
    student[1, 2] = -INF
    teacher[2, :2] = -INF
    fixed = student.isinf()

    def of_finite(values):
        return call(name, torch.where(fixed, -INF, values), teacher, **options)

    assert torch.autograd.gradcheck(of_finite, student.masked_fill(fixed, 0.0).requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_teacher_gets_no_gradient(name):
    student, teacher = (each.requires_grad_() for each in draw(4, CLASSES))
    call(name, student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.norm() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_is_zero_for_a_student_like_its_teacher(name):
    student, teacher = draw(8, CLASSES)
    assert call(name, student, teacher) > 0
    alike, slope = call(name, teacher, teacher), gradient(name, teacher, teacher)
    if name != "soft_cross_entropy":
        assert alike.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["kd", "reverse_kl", "skewed_kl", "jsd", "dkd", "dist", "standardized_kd"])
def test_constants_added_to_logits_do_not_matter(name):
    student, teacher = draw(6, CLASSES)
    assert call(name, teacher + 3, teacher).item() == pytest.approx(0, abs=1e-12)
    moved = call(name, student + torch.arange(6.0)[:, None], teacher - 2)
    assert moved.item() == pytest.approx(call(name, student, teacher).item(), rel=1e-10)
    changed = teacher.clone()
    changed[0, 0] += 1e-2
    assert call(name, changed, teacher) > 1e-9


@pytest.mark.parametrize("name", LOSSES)
def test_order_of_samples_and_of_classes_does_not_matter(name):
    student, teacher = draw(7, CLASSES)
    labels = torch.arange(7) % CLASSES
    expected = call(name, student, teacher, labels).item()
    samples, classes = torch.randperm(7), torch.randperm(CLASSES)
    assert call(name, student[samples], teacher[samples], labels[samples]).item() == pytest.approx(expected)
    mixed = call(name, student[:, classes], teacher[:, classes], classes.argsort()[labels])
    assert mixed.item() == pytest.approx(expected)


@pytest.mark.parametrize("name", LOSSES)
def test_is_a_mean_over_samples(name):
    student, teacher = draw(6, CLASSES)
    labels = torch.arange(6) % CLASSES
    expected = call(name, student, teacher, labels).item()
    twice = [each.repeat(2, 1) for each in (student, teacher)]
    assert call(name, *twice, labels.repeat(2)).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", TEMPERED)
def test_size_of_the_gradient_does_not_fade_with_the_temperature(name):
    # At high temperatures T² times the gradient of a softmax divergence tends to a limit; without T² it would fall by
    # 16 from 50 to 200. Correlations, which DIST compares, do not see a scale and do not fade without it.
    student, teacher = draw(6, CLASSES, scale=1.0)
    sizes = [gradient(name, student, teacher, temperature=t).norm().item() for t in (50.0, 200.0)]
    grows = 16 if name == "dist" else 1
    assert sizes[1] / sizes[0] == pytest.approx(grows, rel=0.05)


def test_kd_tends_to_the_squared_difference_of_centered_logits():
    # Hinton et al., section 2.1: at high temperature KD is half the squared difference over the number of classes.
    student, teacher = (each - each.mean(-1, keepdim=True) for each in draw(6, CLASSES))
    assert kd(student, teacher, temperature=1e4).item() == pytest.approx(mse(student, teacher).item() / 2, rel=1e-3)


def test_relations_between_losses():
    student, teacher = draw(6, CLASSES)
    labels = torch.arange(6) % CLASSES
    assert reverse_kl(student, teacher).item() == pytest.approx(kd(teacher, student, temperature=1).item())
    assert skewed_kl(student, teacher, alpha=0).item() == pytest.approx(kd(student, teacher, temperature=1).item())
    # Both ends of the generalized Jensen-Shannon divergence.
    low, high = (jsd(student, teacher, beta=beta).item() / 1e-7 for beta in (1e-7, 1 - 1e-7))
    assert low == pytest.approx(kd(student, teacher, temperature=1).item(), rel=1e-4)
    assert high == pytest.approx(reverse_kl(student, teacher).item(), rel=1e-4)
    assert jsd(student, teacher).item() == pytest.approx(jsd(teacher, student).item())
    assert jsd(student, teacher) <= math.log(2)
    # The same slope as KD, and the teacher's entropy above it.
    torch.testing.assert_close(gradient("kd", student, teacher), gradient("soft_cross_entropy", student, teacher))
    entropy = soft_cross_entropy(teacher, teacher)
    torch.testing.assert_close(soft_cross_entropy(student, teacher) - entropy, kd(student, teacher))
    # Decoupled KD with the teacher's doubt as beta is KD.
    one = [
        dkd(s[None], t[None], y[None], temperature=1, beta=1 - t.softmax(-1)[y].item())
        for s, t, y in zip(student, teacher, labels, strict=True)
    ]
    torch.testing.assert_close(torch.stack(one).mean(), kd(student, teacher, temperature=1))
    # Two logits (z, 0) of a yes and a no make a softmax of two classes.
    pair = [torch.stack([each, torch.zeros_like(each)], -1) for each in (student, teacher)]
    torch.testing.assert_close(binary(student, teacher), CLASSES * kd(*pair, temperature=1))


def test_standardized_kd_and_cosine_do_not_see_the_scale():
    student, teacher = draw(6, CLASSES)
    torch.testing.assert_close(
        standardized_kd(9 * student, teacher), standardized_kd(student, teacher), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(cosine(9 * student, teacher), cosine(student, 3 * teacher))
    assert cosine(-teacher, teacher).item() == pytest.approx(2)


def test_dist_does_not_see_a_linear_change_of_probabilities():
    _, teacher = draw(6, CLASSES)
    blurred = (0.5 * teacher.softmax(-1) + 0.5 / CLASSES).log()
    assert dist(blurred, teacher).item() == pytest.approx(0, abs=1e-12)
    assert kd(blurred, teacher) > 0.01


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("masks", ["student", "teacher", "both"])
def test_masked_classes_are_as_if_they_were_not_there(name, masks):
    student, teacher = draw(6, CLASSES + 2)
    gone = torch.tensor([1, 4])
    kept = torch.tensor([0, 2, 3, 5, 6])
    hidden = [each.clone() for each in (student, teacher)]
    for each, role in zip(hidden, ("student", "teacher"), strict=True):
        if masks in (role, "both"):
            each[:, gone] = -INF
    labels = torch.arange(6) % CLASSES
    expected = call(name, student[:, kept], teacher[:, kept], labels)
    torch.testing.assert_close(call(name, *hidden, kept[labels]), expected)
    slope = gradient(name, *hidden, labels=kept[labels])
    assert slope.isfinite().all()
    assert (slope[:, gone] == 0).all()
    torch.testing.assert_close(slope[:, kept], gradient(name, student[:, kept], teacher[:, kept], labels=labels))


@pytest.mark.parametrize("name", LOSSES)
def test_samples_without_classes_are_left_out(name):
    student, teacher = draw(6, CLASSES)
    teacher[2:4] = -INF
    some = [0, 1, 4, 5]
    labels = torch.arange(6) % CLASSES
    torch.testing.assert_close(
        call(name, student, teacher, labels), call(name, student[some], teacher[some], labels[some])
    )
    slope = gradient(name, student, teacher)
    assert slope.isfinite().all()
    assert (slope[2:4] == 0).all()
    nothing = gradient(name, student, torch.full_like(teacher, -INF))
    assert (nothing == 0).all()
    assert call(name, student, torch.full_like(teacher, -INF)) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_no_samples_give_zero(name):
    student, teacher = (torch.zeros(0, CLASSES, requires_grad=True) for _ in range(2))
    loss = call(name, student, teacher)
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_first(name, dtype):
    student, teacher = draw(6, CLASSES, dtype=dtype)
    expected = call(name, student.double(), teacher.double()).item()
    found = call(name, student, teacher)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, rel=1e-4)
    assert gradient(name, student, teacher).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(name, student.float(), teacher.float()).item() == pytest.approx(expected, rel=1e-4)
    mixed = call(name, student, teacher.double())
    assert mixed.dtype == torch.float64


@pytest.mark.parametrize("name", LOSSES)
def test_huge_and_flat_logits_give_finite_values_and_slopes(name):
    flat = torch.zeros(4, CLASSES)
    huge = 1e4 * torch.eye(CLASSES)[:4]
    for student, teacher in ((flat, huge), (huge, flat), (flat, flat), (huge, -huge), (flat[:1], huge[:1])):
        assert call(name, student, teacher).isfinite()
        assert gradient(name, student, teacher).isfinite().all()


def test_flat_student_learns_from_the_first_step_on():
    for name in LOSSES:
        # Two are relative to a spread that is not there yet; the labels must make a beginning.
        if name not in ("dist", "standardized_kd"):
            assert gradient(name, torch.zeros(4, CLASSES), draw(4, CLASSES, dtype=torch.float32)[1]).norm() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_that_differ_are_refused(name):
    with pytest.raises(ShapeError, match=r"\(4, 6\) and teacher logits \(4, 5\).*class_map"):
        call(name, torch.zeros(4, 6), torch.zeros(4, 5))
    with pytest.raises(ShapeError, match="use the same batch"):
        call(name, torch.zeros(4, 5), torch.zeros(3, 5))
    with pytest.raises(ShapeError, match=r"\(\.\.\., classes\)"):
        getattr(logits, name)(torch.zeros(5), torch.zeros(5), *([torch.tensor(0)] if name == "dkd" else []))


OUT_OF_RANGE = [
    *[(name, {"temperature": value}) for name in TEMPERED for value in (0, -1.0, INF, math.nan)],
    *[("jsd", {"beta": value}) for value in (0, 1, -0.1, 1.1, math.nan)],
    *[("skewed_kl", {"alpha": value}) for value in (1, -0.1, 1.1, math.nan)],
    *[("dkd", {option: value}) for option in ("alpha", "beta") for value in (-1, INF, math.nan)],
    *[("dist", {option: value}) for option in ("beta", "gamma") for value in (-1, INF, math.nan)],
]


@pytest.mark.parametrize(("name", "options"), OUT_OF_RANGE)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(RecipeError, match=next(iter(options))):
        call(name, *draw(4, CLASSES), **options)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2, CLASSES]), "integers below 5"),
        (torch.tensor([0.0, 1.0, 2.0, 3.0]), "torch.float32"),
        (torch.tensor([True, False, True, True]), "torch.bool"),
        (torch.tensor([0, 1, 2]), r"labels have shape \(3,\).*shape \(4,\)"),
        (torch.zeros(4, CLASSES, dtype=torch.int64), r"shape \(4, 5\)"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    with pytest.raises(ShapeError, match=message):
        dkd(*draw(4, CLASSES), labels)


def test_dkd_needs_three_classes():
    with pytest.raises(ShapeError, match="needs 3"):
        dkd(torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8])
def test_labels_may_be_of_any_integer_type(dtype):
    labels = torch.tensor([0, 4, 2, 1])
    student, teacher = draw(4, CLASSES)
    torch.testing.assert_close(dkd(student, teacher, labels.to(dtype)), dkd(student, teacher, labels))


def test_dkd_leaves_out_samples_without_a_label_or_without_a_rest():
    student, teacher = draw(6, CLASSES)
    labels = torch.tensor([0, -1, 2, -100, 4, 1])
    teacher[2, 2] = -INF  # the label itself is masked
    student[4, :4] = -INF  # nothing is left beside the label
    expected = dkd(student[[0, 5]], teacher[[0, 5]], labels[[0, 5]])
    torch.testing.assert_close(dkd(student, teacher, labels), expected)
    slope = gradient("dkd", student, teacher, labels=labels)
    assert (slope[1:5] == 0).all()
    assert slope.isfinite().all()


def test_l1_is_the_mean_distance():
    assert l1(torch.zeros(2, 4), torch.tensor([[1.0, -1, 1, -1], [3, 3, 3, 3]])) == 2


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("garbage", [0.0, 1e30, math.nan, INF])
def test_tokens_that_do_not_count_change_neither_value_nor_slope(name, garbage):
    student, teacher = draw(3, 4, CLASSES)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    counted, labels = mask.bool(), torch.arange(12).view(3, 4) % CLASSES
    padded = [each.masked_fill(~counted[..., None], garbage) for each in (student, teacher)]
    found = []
    for ours, theirs, given in (
        (student[counted], teacher[counted], (None, labels[counted])),
        (*padded, (mask, labels)),
        (*padded, (counted, labels)),
    ):
        leaf = ours.clone().requires_grad_()
        more = [given[1], given[0]] if name == "dkd" else [given[0]]
        value = getattr(logits, name)(leaf, theirs, *more)
        (slope,) = torch.autograd.grad(value, leaf)
        found.append((value.detach(), slope if slope.dim() == 2 else slope[counted]))
        assert slope.dim() == 2 or (slope[~counted] == 0).all()
    for value, slope in found[1:]:
        torch.testing.assert_close(value, found[0][0])
        torch.testing.assert_close(slope, found[0][1])


def test_masks_are_of_tokens_and_of_no_account_without_them():
    student, teacher = draw(3, CLASSES)
    assert kd(student, teacher, torch.ones(3, 7)) == kd(student, teacher)
    assert kd(student, teacher, torch.tensor([1, 0, 1])) == kd(student[[0, 2]], teacher[[0, 2]])
    tokens = torch.zeros(3, 4, CLASSES)
    assert kd(tokens, tokens + 1, torch.zeros(3, 4)) == 0
    for wrong in (torch.ones(3, 5), torch.ones(3)):
        with pytest.raises(ShapeError, match=r"mask has shape .*one for each row of logits, shape \(3, 4\); distillat"):
            kd(tokens, tokens, wrong)
