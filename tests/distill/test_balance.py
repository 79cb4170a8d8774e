"""Weights that are found: each loss is as long in its gradient as what is given, as training begins."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slivo import losses
from slivo.distill import balance, distillation


def batch_of(size):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)


def objective(teacher, *terms, **options):
    def forward(model, batch):
        return model(batch[0])

    def loss(output, batch):
        return F.cross_entropy(output, batch[1])

    return distillation(teacher, forward, loss, terms, **options)


class Normed(nn.Module):
    """A batch norm whose statistics are of another network: in evaluation mode all is thousands of times too long."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(8, 3)
        for stage in (self.first, self.second):
            stage[1].running_var.fill_(1e-6)

    def forward(self, x):
        return self.head(self.second(self.first(x)))


def lengths(made, student, batch):
    """The gradients' lengths as training finds them, the weights included."""
    student.train()
    torch.manual_seed(0)
    parts = made(student, batch)
    return balance.gradient_norms(parts, student)


def test_weights_are_found_as_training_begins():
    student, teacher, batch = Normed(0), Normed(1), batch_of(32)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    state = torch.get_rng_state()
    made = objective(teacher, losses.kd(), losses.hint(at="second"), losses.hint(at="f*"), label_weight=0.5)
    made.prepare(student, batch, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert student.training
    found = lengths(made, student, batch)
    for name in ("hint@second", "hint@first"):
        assert found[name] == pytest.approx(found["labels"] + found["kd"], rel=1e-4)


def test_a_loss_at_many_places_weighs_as_much_as_at_one():
    student, teacher, batch = Normed(0), Normed(1), batch_of(32)
    made = objective(teacher, losses.kd(), losses.hint(at={"first": "first", "second": "second"}))
    made.prepare(student, batch, seed=0)
    found = lengths(made, student, batch)
    given = found["kd"] + found.get("labels", 0.0)
    for name in ("hint@first", "hint@second"):
        assert found[name] == pytest.approx(given / 2, rel=1e-4)


def test_one_sample_is_enough_where_batch_norms_cannot_take_it():
    made = objective(Normed(1), losses.kd(), losses.hint(at="second")).prepare(Normed(0), batch_of(1))
    assert made.weights["hint@second"] > 0
