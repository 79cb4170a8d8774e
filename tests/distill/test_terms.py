"""Terms: several places at once, weights that are found or change, and adapters of a loss's own."""

import logging
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slivo import losses
from slivo.distill import Ramp, Term, adapted, distillation, features
from slivo.distill.balance import gradient_norms
from slivo.errors import RecipeError, ShapeError


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()).tanh())


def nets(*widths):
    torch.manual_seed(0)
    return [Net(width).eval() for width in widths]


BATCH = torch.linspace(-1, 1, 24).view(8, 3), torch.arange(8) % 2


def forward(model, batch):
    return model(batch[0])


def loss(output, batch):
    return F.cross_entropy(output, batch[1])


def objective(teacher, *terms, **options):
    return distillation(teacher, forward, loss, terms, **options)


def flow(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Compare what lies between places."""
    return F.mse_loss(student[0] - student[-1], teacher[0].detach() - teacher[-1].detach())


def test_a_loss_on_sequences_gets_all_places_at_once():
    student, teacher = nets(4, 4)
    ours, theirs = ([net.first(BATCH[0]), net.second(net.first(BATCH[0]).tanh())] for net in (student, teacher))
    for at in ({"first": "first", "second": "second"}, {"first": "first", "sec*": "second"}):
        made = objective(teacher, Term(flow, at=at), label_weight=0)
        parts = made(student, BATCH)
        assert list(parts) == ["flow@first+second"]
        torch.testing.assert_close(parts["flow@first+second"], flow(ours, theirs))


def test_a_mapping_of_places_is_a_term_for_each():
    student, teacher = nets(4, 4)
    made = objective(teacher, losses.sp(at={"first": "second", "second": "first"}, weight=2), label_weight=0)
    parts = made(student, BATCH)
    assert list(parts) == ["sp@first", "sp@second"]
    hidden = [net.first(BATCH[0]) for net in (student, teacher)]
    torch.testing.assert_close(parts["sp@first"], 2 * features.sp(hidden[0], teacher.second(hidden[1].tanh())))


def test_weights_that_are_found_make_gradients_as_long_as_that_of_what_is_given():
    student, teacher = nets(4, 6)
    terms = [losses.kd(weight=0.9), losses.pkt(at="second"), losses.hint(at="first"), losses.sp(at="first")]
    made = objective(teacher, *terms, label_weight=0.5).prepare(student, BATCH)
    parts = made(student, BATCH)
    norms = gradient_norms(parts, student)
    assert set(made.weights) == {"pkt@second", "hint@first", "sp@first"}
    for name in made.weights:
        assert norms[name] == pytest.approx(norms["labels"] + norms["kd"], rel=1e-4)
    assert all(parameter.grad is None for parameter in student.parameters())


def test_without_any_weight_given_all_are_as_long_as_the_first():
    student, teacher = nets(4, 4)
    made = objective(teacher, losses.sp(at="first"), losses.pkt(at="second"), label_weight=0).prepare(student, BATCH)
    norms = gradient_norms(made(student, BATCH), student)
    assert made.weights["sp@first"] == pytest.approx(1)
    assert norms["sp@first"] == pytest.approx(norms["pkt@second"], rel=1e-4)


def test_a_loss_without_gradient_keeps_its_scale():
    (student,) = nets(4)
    made = objective(student, losses.hint(at="first")).prepare(student, BATCH)
    assert made.weights == {"hint@first": 1.0}


def test_weights_must_be_found_before_they_are_used():
    student, teacher = nets(4, 4)
    with pytest.raises(RecipeError, match=r"the weight of sp@first is to be found; call prepare"):
        objective(teacher, losses.sp(at="first"))(student, BATCH)


def test_terms_that_do_next_to_nothing_are_warned_of(caplog):
    student, teacher = nets(4, 4)
    caplog.set_level(logging.WARNING, "slivo")
    objective(teacher, losses.kd(), losses.pkt(at="first", weight=1e-4)).prepare(student, BATCH)
    assert "the loss pkt@first has" in caplog.text
    assert "teaches next to nothing beside kd" in caplog.text
    caplog.clear()
    objective(teacher, losses.kd(), losses.pkt(at="first"), label_weight=1.0).prepare(student, BATCH)
    assert caplog.text == ""


def test_weights_and_options_go_by_the_progress():
    student, teacher = nets(4, 4)
    ramp = Ramp(0.0, 2.0)
    made = objective(teacher, losses.kd(weight=ramp, temperature=Ramp(8.0, 2.0)), label_weight=Ramp(1.0, 0.0))
    ours, theirs = student(BATCH[0]), teacher(BATCH[0])
    for progress, weight, temperature in ((0.0, 0.0, 8.0), (0.5, 1.0, 5.0), (1.0, 2.0, 2.0)):
        made.progress = progress
        parts = made(student, BATCH)
        assert parts["kd"].item() == pytest.approx(
            weight * losses.logits.kd(ours, theirs, temperature=temperature).item()
        )
        assert parts["labels"].item() == pytest.approx((1 - progress) * loss(ours, BATCH).item())


class Scale(nn.Module):
    """A number of its own for each place."""

    def __init__(self, count, start):
        super().__init__()
        self.scales = nn.Parameter(torch.full((count,), start) + torch.rand(()))


def make_scale(student: Sequence[Tensor], _: Sequence[Tensor], *, start: float) -> nn.Module:
    return Scale(len(student), start)


@adapted(make_scale)
def scaled(student: Sequence[Tensor], teacher: Sequence[Tensor], adapter: Scale, *, start: float = 2.0) -> Tensor:
    """Compare up to a scale."""
    pairs = zip(adapter.scales / start, student, teacher, strict=True)
    return sum(((scale * ours).mean() - theirs.detach().mean()).square() for scale, ours, theirs in pairs)


def test_a_loss_may_have_what_is_trained_along_made_for_it():
    student, teacher = nets(4, 6)
    term = Term(scaled, {"start": 3.0}, at={"first": "first", "second": "second"})
    with pytest.raises(ShapeError, match=r"student has 4, 4 features and the teacher 6, 6; call prepare"):
        objective(teacher, term)(student, BATCH)
    state = torch.get_rng_state()
    made = objective(teacher, term).prepare(student, BATCH, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    (scales,) = made.parameters()
    assert scales.shape == (2,)
    assert 3 <= scales[0] <= 4
    sum(made(student, BATCH).values()).backward()
    assert scales.grad.norm() > 0
    again = objective(teacher, term).prepare(student, BATCH, seed=1)
    assert torch.equal(again.parameters()[0], scales)
    by_default = objective(teacher, Term(scaled, at={"first": "first"})).prepare(student, BATCH)
    assert 2 <= by_default.parameters()[0] <= 3
    with pytest.raises(ShapeError, match="the adapter was not made for the student's 5, 5"):
        made(nets(5)[0], BATCH)


def masked(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Compare where it counts."""
    differences = (student - teacher.detach()).square().mean(-1)
    return differences.mean() if mask is None else differences[mask].mean()


def test_masks_come_out_of_the_batch():
    student, teacher = nets(4, 4)
    batch = {"x": torch.randn(2, 5, 3), "attention_mask": torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])}

    def run(model, batch):
        return model(batch["x"])

    made = distillation(teacher, run, lambda output, _: output.mean(), [Term(masked)], label_weight=0)
    found = made(student, batch)["masked"]
    torch.testing.assert_close(found, masked(student(batch["x"]), teacher(batch["x"]), batch["attention_mask"].bool()))
    whole = made(student, {"x": batch["x"]})["masked"]
    torch.testing.assert_close(whole, masked(student(batch["x"]), teacher(batch["x"]), None))


def test_the_teacher_may_be_given_other_inputs():
    student, teacher = nets(4, 4)
    made = distillation(
        teacher, forward, loss, [losses.mse()], label_weight=0, teacher_forward=lambda model, batch: model(-batch[0])
    )
    found = made(student, BATCH)["mse"]
    torch.testing.assert_close(found, losses.logits.mse(student(BATCH[0]), teacher(-BATCH[0])))
