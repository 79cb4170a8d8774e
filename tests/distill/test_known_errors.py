"""Errors that distillation libraries have shipped, one test each; most show that the wrong result would be another."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from slivo import losses
from slivo.distill import distill, distillation
from slivo.distill.adapt import make
from slivo.distill.features import attention_transfer, pkt, sp
from slivo.distill.logits import dist, dkd, jsd, kd, reverse_kl, skewed_kl, soft_cross_entropy
from slivo.distill.maps import cwd, fsp
from slivo.distill.relations import correlation_congruence, rkd_angle, rkd_distance
from slivo.distill.terms import joint, supplied
from slivo.errors import ShapeError
from slivo.tasks import classification
from slivo.train import Hook

FUNCTIONS = {name: losses.build({name: {"at": "anywhere"}}).function for name in losses.names()}
# Correlations do not fade, and the temperature of a contrast is part of what it says.
TEMPERED = [
    name
    for name, function in FUNCTIONS.items()
    if "temperature" in inspect.signature(function).parameters and name not in ("dist", "crd", "queue_kl")
]


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def call(name, student, teacher, **options):
    """Call any loss on tensors of shape (batch, 4, 4, 4), with whatever it needs beside them."""
    function = FUNCTIONS[name]
    pair = [[each, each.flip(0)] if joint(function) else each for each in (student, teacher)]
    more = {"labels": torch.zeros(student.shape[:-1], dtype=torch.int64), "mask": None}
    if "adapter" in supplied(function):
        more["adapter"] = make(function, options, *pair, seed=0)
    return function(*pair, *(more[each] for each in supplied(function)), **options)


class Net(nn.Module):
    """All that a model has which tells training and evaluation apart."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.5))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.body(x))


def nets(*widths):
    torch.manual_seed(0)
    return [Net(width).train() for width in widths]


BATCH = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def forward(model, batch):
    return model(batch[0])


def loss(output, batch):
    return F.cross_entropy(output, batch[1])


# Reduction.


def test_a_divergence_is_summed_over_classes():
    # A mean over classes as well makes the loss of 150 000 words 150 000 times smaller. Each class split into two
    # halves is the same distribution.
    student, teacher = draw(6, 5)
    for function in (kd, reverse_kl, skewed_kl, jsd):
        whole, split = function(student, teacher), function(student.repeat(1, 1000), teacher.repeat(1, 1000))
        torch.testing.assert_close(split, whole, rtol=1e-9, atol=0)
    expected = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(kd(student, teacher, temperature=1.0), expected)


def test_places_and_tokens_are_averaged_not_summed():
    # Divided by the batch alone, the loss grows with the size of the map, or the length of the text.
    for function in (kd, soft_cross_entropy, dist):
        student, teacher = draw(2, 3, 3, 5)
        rows = [each.flatten(0, -2) for each in (student, teacher)]
        torch.testing.assert_close(function(student, teacher), function(*rows))
        long = [each.repeat(1, 8, 1, 1) for each in (student, teacher)]
        torch.testing.assert_close(function(*long), function(student, teacher))


def test_classes_are_the_last_axis():
    # The second is time for language models: a softmax over it is over the tokens.
    student, teacher = draw(2, 7, 5)
    by_token = [
        F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="sum") / 7 for s, t in zip(student, teacher, strict=True)
    ]
    torch.testing.assert_close(kd(student, teacher, temperature=1.0), torch.stack(by_token).mean())
    over_time = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    assert abs(kd(student, teacher, temperature=1.0) - over_time) > 0.1


def test_masks_apply_before_the_mean():
    # A mean that is multiplied by a mask of tokens afterwards is the mean over all tokens, only smaller.
    student, teacher = draw(2, 6, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    counted = mask.bool()
    expected = kd(student[counted], teacher[counted])
    torch.testing.assert_close(kd(student, teacher, mask), expected)
    assert abs(kd(student, teacher) * mask.double().mean() - expected) > 0.1


# Temperature.


@pytest.mark.parametrize("name", TEMPERED)
def test_gradients_do_not_fade_with_the_temperature(name):
    # Without T² they are 10 000 times smaller at T = 100 than at 1, and with it of one size once T is large.
    student, teacher = draw(4, 4, 4, 4)
    norms = []
    for temperature in (100.0, 1000.0):
        leaf = student.clone().requires_grad_()
        (slope,) = torch.autograd.grad(call(name, leaf, teacher, temperature=temperature), leaf)
        norms.append(slope.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


def test_temperature_and_its_square_stay_when_labels_are_not_used():
    student, teacher = (net.eval() for net in nets(4, 4))
    made = distillation(teacher, forward, loss, [losses.kd(temperature=4, weight=0.5)], label_weight=0)
    parts = made(student, BATCH)
    ours, theirs = student(BATCH[0]), teacher(BATCH[0])
    expected = F.kl_div((ours / 4).log_softmax(-1), (theirs / 4).softmax(-1), reduction="batchmean")
    assert list(parts) == ["kd"]
    torch.testing.assert_close(parts["kd"], 0.5 * 16 * expected)


# Softmax.


def test_logits_become_probabilities():
    # Logits cut to [0, 1] in place of a softmax: two sets of negative ones are alike, and most have no gradient.
    student, teacher = draw(8, 5)
    low = [-5 - each.abs() for each in (student, teacher)]
    assert kd(*low) > 0.01
    torch.testing.assert_close(kd(student + 5, teacher), kd(student, teacher))
    leaf = student.clone().requires_grad_()
    assert (torch.autograd.grad(kd(leaf, teacher), leaf)[0] != 0).all()


def test_the_divergence_goes_from_the_teacher_to_the_student():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])
    p, q = teacher.softmax(-1)[0], student.softmax(-1)[0]
    assert kd(student, teacher, temperature=1.0).item() == pytest.approx(sum(p * (p / q).log()).item())
    assert kd(student, teacher, temperature=1.0) != kd(teacher, student, temperature=1.0)


def test_logarithms_of_probabilities_that_vanish_are_finite():
    # log(softmax(z)) is minus infinity where the softmax is 0.
    student = torch.tensor([[0.0, 1e4, -1e4]], requires_grad=True)
    teacher = torch.tensor([[1e4, 0.0, -1e4]])
    labels = torch.tensor([0])
    for value in (kd(student, teacher, temperature=1.0), dkd(student, teacher, labels, temperature=1.0)):
        assert value.isfinite()
        assert value > 1
        assert torch.autograd.grad(value, student)[0].isfinite().all()


def test_half_precision_is_widened_before_the_exponential():
    # In half precision exponentials overflow from 12 on, and small probabilities vanish.
    student, teacher = (8 * each for each in draw(4, 1000, dtype=torch.float16))
    found, expected = kd(student, teacher, temperature=1.0), kd(student.double(), teacher.double(), temperature=1.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", losses.names())
def test_every_loss_is_computed_in_single_precision_at_least(name):
    student, teacher = draw(4, 4, 4, 4, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(name, student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), call(name, student.double(), teacher.double()), rtol=1e-3, atol=1e-6)


# Gradients.


@pytest.mark.parametrize("name", losses.names())
def test_no_gradient_flows_into_the_teacher(name):
    student, teacher = (each.requires_grad_() for each in draw(4, 4, 4, 4))
    call(name, student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.isfinite().all()


def test_equal_samples_have_no_infinite_gradient():
    # The slope of a square root at 0.
    rows = torch.ones(4, 3).requires_grad_()
    (others,) = draw(4, 3, dtype=torch.float32)[:1]
    for function in (rkd_distance, rkd_angle, pkt, correlation_congruence):
        value = function(rows, others)
        assert value.isfinite()
        assert torch.autograd.grad(value, rows)[0].isfinite().all()


# Formulas.


def test_two_classes_are_refused_where_there_is_no_other():
    student, teacher = draw(4, 2)
    with pytest.raises(ShapeError, match="dkd got 2 classes and needs 3"):
        dkd(student, teacher, torch.zeros(4, dtype=torch.int64))


def test_similarities_have_rows_of_euclidean_length():
    student, teacher = draw(6, 5)
    lengths = {}
    for p in (1, 2):
        grams = [F.normalize(each @ each.T, p=p, dim=1) for each in (student, teacher)]
        lengths[p] = (grams[0] - grams[1]).square().mean()
    torch.testing.assert_close(sp(student, teacher), lengths[2])
    assert lengths[1] < lengths[2] / 2


def test_correlations_are_rewarded_in_both_directions():
    # With the sign of one term turned round, it is the negated student that is best.
    _, teacher = draw(16, 5)
    for weights in ({"beta": 1.0, "gamma": 0.0}, {"beta": 0.0, "gamma": 1.0}):
        probabilities = teacher.softmax(-1)
        opposite = (2 * probabilities.mean() - probabilities + 0.5).log()
        assert dist(teacher, teacher, **weights).item() == pytest.approx(0, abs=1e-12)
        assert dist(opposite, teacher, **weights) > 1.5


def test_flows_differ_by_the_squared_frobenius_norm():
    student, teacher = ([each, each.flip(1)] for each in draw(3, 4, 2, 2))
    flows = [torch.einsum("bihw,bjhw->bij", *side) / 4 for side in (student, teacher)]
    difference = flows[0] - flows[1]
    found = fsp(student, teacher, [nn.Identity(), nn.Identity()])
    torch.testing.assert_close(found, difference.square().sum((1, 2)).mean())
    assert abs(found - difference.norm(dim=1).sum(1).mean()) > 0.1


def test_correlations_of_all_pairs_differ_by_their_squares():
    student, teacher = draw(5, 4)
    kernels = []
    for rows in (F.normalize(each, dim=1) for each in (student, teacher)):
        cosines = rows @ rows.T
        kernels.append(math.exp(-0.8) * (1 + 0.8 * cosines + 0.32 * cosines**2))
    difference = kernels[0] - kernels[1]
    found = correlation_congruence(student, teacher)
    torch.testing.assert_close(found, difference.square().mean())
    neighbors = (difference[:-1].abs() * difference[1:].abs()).sum(-1).mean()
    assert abs(found - neighbors) > 0.1 * found


def test_attention_is_over_places_whatever_the_number_of_channels():
    student, teacher = draw(3, 4, 2, 2)
    assert attention_transfer(student, torch.cat([student, student], 1)).item() == pytest.approx(0, abs=1e-12)
    assert attention_transfer(student, teacher) > 0
    assert cwd(student, teacher) > 0


# Models.


def test_teachers_are_evaluated_whatever_mode_they_are_in():
    # Without gradients alone the batch norms of a teacher still learn, and its dropout blurs what it says.
    student, teacher = nets(4, 4)
    before = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    made = distillation(teacher, forward, loss, [losses.mse(), losses.hint(at="body", weight=1.0)], label_weight=0)
    made(student.eval(), BATCH)
    ours, theirs = student(BATCH[0]), teacher.eval()(BATCH[0])
    teacher.train()
    found = made(student, BATCH)
    torch.testing.assert_close(found["mse"], F.mse_loss(ours, theirs))
    assert teacher.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in teacher.named_buffers())
    assert all(parameter.grad is None for parameter in teacher.parameters())


class Modes(Hook):
    """Writes down which mode the student is in when a step begins."""

    def __init__(self):
        self.seen = []

    def on_step_start(self, state):
        self.seen.append(all(module.training for module in state.model.modules()))


def test_the_student_trains_again_after_each_evaluation():
    data = TensorDataset(*BATCH)
    task = classification("points", data, data, data, classes="abc", example_inputs=(BATCH[0][:2],))
    student, teacher = nets(4, 6)
    modes = Modes()
    distill(student, teacher, task, [losses.kd()], epochs=3, batch_size=4, hooks=[modes])
    assert modes.seen == [True] * 6


def test_adapters_are_trained_and_never_part_of_the_student():
    student, teacher = nets(4, 6)
    keys = student.state_dict().keys()
    terms = [losses.hint(at="body"), losses.vid(at="body"), losses.crd(at="body")]
    made = distillation(teacher, forward, loss, terms).prepare(student, BATCH)
    sum(made(student, BATCH).values()).backward()
    assert student.state_dict().keys() == keys
    trained = {id(parameter) for parameter in made.parameters()}
    assert not trained & {id(parameter) for parameter in (*student.parameters(), *teacher.parameters())}
    assert len(trained) == 2 + 7 + 4
    assert all(parameter.grad is not None for parameter in made.parameters())
