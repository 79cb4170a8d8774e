"""The objective is the weighted sum it says, trains adapters along, and never touches the teacher."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slivo import losses
from slivo.distill import ClassMap, Term, distillation, logits
from slivo.distill.objective import second
from slivo.distill.teacher import checksum
from slivo.errors import RecipeError, ShapeError, SlivoError


class Net(nn.Module):
    """A convolution, its batch norm and its copies, dropout, and a head."""

    def __init__(self, width=4, classes=3, depth=1):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.stages = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(depth))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, classes)
        self.unused = nn.Linear(1, 1)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu_()
        for stage in self.stages:
            x = stage(x)
        return self.head(self.drop(x).mean((2, 3)))


def forward(model, batch):
    return model(batch[0])


def loss(output, batch):
    return F.cross_entropy(output, batch[1])


def batch_of(size=6, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 4, 4, generator=generator), torch.randint(classes, (size,), generator=generator)


def nets(*sizes):
    torch.manual_seed(0)
    return [Net(*size).train() for size in sizes]


def objective(teacher, *terms, **options):
    return distillation(teacher, forward, loss, terms, **options)


def labels(student, teacher):
    """Serve as a loss that has the name of the labels' term."""
    return (student - teacher).square().mean()


def test_is_the_weighted_sum_of_its_terms():
    student, teacher = (each.eval() for each in nets((4,), (4,)))
    batch = batch_of()
    terms = [losses.kd(temperature=2, weight=0.5), losses.dkd(weight=3), losses.hint(at="stem", weight=7)]
    with objective(teacher, *terms, label_weight=0.25) as made:
        parts = made(student, batch)
    ours, theirs = student(batch[0]), teacher(batch[0])
    assert list(parts) == ["labels", "kd", "dkd", "hint@stem"]
    torch.testing.assert_close(parts["labels"], 0.25 * F.cross_entropy(ours, batch[1]))
    torch.testing.assert_close(parts["kd"], 0.5 * logits.kd(ours, theirs, temperature=2))
    torch.testing.assert_close(parts["dkd"], 3 * logits.dkd(ours, theirs, batch[1]))
    torch.testing.assert_close(parts["hint@stem"], 7 * F.mse_loss(student.stem(batch[0]), teacher.stem(batch[0])))


def test_the_student_learns_and_the_teacher_is_as_it_was():
    student, teacher = nets((4,), (5,))
    teacher.stem.requires_grad_(False)
    teacher.norm.eval()
    batch = batch_of()
    before, student_before = checksum(teacher), checksum(student)
    modes = [module.training for module in teacher.modules()]
    needs = [parameter.requires_grad for parameter in teacher.parameters()]
    with objective(teacher, losses.kd(), losses.sp(at="stem")) as made:
        made.prepare(student, batch)
        assert checksum(student) == student_before
        sum(made(student, batch).values()).backward()
    assert checksum(teacher) == before
    assert [module.training for module in teacher.modules()] == modes
    assert [parameter.requires_grad for parameter in teacher.parameters()] == needs
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.stem.weight.grad.norm() > 0
    assert student.training
    assert student.norm.num_batches_tracked == 1
    assert not any(module._forward_hooks for net in (student, teacher) for module in net.modules())


def test_without_labels_neither_they_nor_the_tasks_loss_are_used():
    student, teacher = nets((4,), (4,))

    def fails(_output, _batch):
        raise AssertionError

    made = distillation(teacher, forward, fails, [losses.kd()], label_weight=0)
    assert list(made(student, (batch_of()[0],))) == ["kd"]


def test_adapters_are_made_where_needed_and_trained_along():
    student, teacher = nets((4,), (6,))
    batch = batch_of()
    state = torch.get_rng_state()
    made = objective(teacher, losses.hint(at="stem"), losses.hint(at="head"), losses.sp(at="stem")).prepare(
        student, batch
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert student.training
    assert list(made.adapters) == ["hint@stem"]
    assert [tuple(parameter.shape) for parameter in made.parameters()] == [(6, 4, 1, 1), (6,)]
    assert not set(made.parameters()) & set(student.parameters())
    parts = made(student, batch)
    assert list(parts) == ["labels", "hint@stem", "hint@head", "sp@stem"]
    parts["hint@stem"].backward()
    assert all(parameter.grad.norm() > 0 for parameter in made.parameters())
    first = [parameter.detach().clone() for parameter in made.parameters()]
    again = made.prepare(student, batch).parameters()
    assert all(map(torch.equal, first, again))
    other = made.prepare(student, batch, seed=1).parameters()
    assert not torch.equal(first[0], other[0])


def test_adapters_that_are_missing_or_of_another_shape_are_asked_for():
    student, teacher, slimmer = nets((4,), (6,), (3,))
    made, batch = objective(teacher, losses.hint(at="stem")), batch_of()
    with pytest.raises(ShapeError, match=r"hint@stem: the student has 4 features and the teacher 6; call prepare"):
        made(student, batch)
    made.prepare(student, batch)
    with pytest.raises(
        ShapeError, match=r"hint@stem: the adapter was not made for the student's 3 and the teacher's 6"
    ):
        made(slimmer, batch)
    made.prepare(slimmer, batch)
    assert made(slimmer, batch)["hint@stem"] > 0


def test_paths_are_looked_up_anew_so_that_modules_may_be_replaced():
    student, teacher = (each.eval() for each in nets((4,), (4,)))
    made, batch = objective(teacher, losses.hint(at="stem")), batch_of()
    made.prepare(student, batch)
    student.stem = copy.deepcopy(teacher.stem)
    assert made(student, batch)["hint@stem"] == 0


def test_patterns_are_a_term_for_each_match():
    student, teacher = nets((4, 3, 2), (4, 3, 2))
    made = objective(teacher, losses.hint(at="stages.*", weight=1), label_weight=0)
    assert list(made(student, batch_of())) == ["hint@stages.0", "hint@stages.1"]
    terms = [losses.sp(at=("stages.*", "stages.*"), weight=1), losses.sp(at=("", "stem"), weight=1)]
    pairs = objective(teacher, *terms, label_weight=0)
    assert list(pairs(student, batch_of())) == ["sp@stages.0", "sp@stages.1", "sp"]
    deeper = nets((4, 3, 3))[0]
    with pytest.raises(SlivoError, match=r"2 modules of the student match and 3 of the teacher"):
        objective(deeper, losses.sp(at=("stages.*", "stages.*")))(student, batch_of())
    with pytest.raises(SlivoError, match=r"the teacher \(Net\) has no module 'stages.2'"):
        objective(teacher, losses.sp(at="stages.*"))(deeper, batch_of())


def test_terms_of_one_name_are_told_apart():
    student, teacher = nets((4,), (4,))
    terms = [losses.kd(temperature=1), losses.kd(temperature=8), losses.kd(), Term(labels)]
    parts = objective(teacher, *terms)(student, batch_of())
    assert list(parts) == ["labels", "kd", "kd#2", "kd#3", "labels#2"]
    assert len({part.item() for part in parts.values()}) == 5


def test_class_maps_are_applied_to_outputs_and_labels():
    student, teacher = (each.eval() for each in nets((4, 4), (4, 5)))
    batch = batch_of(classes=4)
    shared = ClassMap((4, None, 0, 2))
    terms = [losses.kd(), losses.dkd(), losses.hint(at="", weight=1), losses.sp(at="stem")]
    made = objective(teacher, *terms, class_map=shared).prepare(student, batch)
    parts = made(student, batch)
    ours, theirs = shared.logits(student(batch[0]), teacher(batch[0]))
    torch.testing.assert_close(parts["kd"], logits.kd(ours, theirs))
    torch.testing.assert_close(parts["dkd"], logits.dkd(ours, theirs, shared.labels(batch[1])))
    torch.testing.assert_close(parts["hint"], F.mse_loss(ours, theirs))
    assert made.adapters == {}
    own = objective(teacher, losses.kd(class_map=[4, None, 0, 2]), losses.kd(at="head", class_map=shared))
    assert [part.item() for part in own(student, batch).values()][1:] == [parts["kd"].item()] * 2
    with pytest.raises(ShapeError, match=r"^kd: student logits \(6, 4\) and teacher logits \(6, 5\).*class_map"):
        objective(teacher, losses.kd())(student, batch)


def test_outputs_may_be_more_than_logits():
    student, teacher = (each.eval() for each in nets((4,), (4,)))

    def rich(model, batch):
        return {"hidden": model.stem(batch[0]), "logits": model(batch[0])}

    made = distillation(teacher, rich, lambda output, batch: loss(output["logits"], batch), [losses.kd()])
    batch = batch_of()
    torch.testing.assert_close(made(student, batch)["kd"], logits.kd(student(batch[0]), teacher(batch[0])))
    with pytest.raises(SlivoError, match="the teacher puts out str without a tensor; return logits"):
        distillation(teacher, lambda model, batch: "text", loss, [losses.kd()])(student, batch)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("unused", "module 'unused' of the teacher did not run"),
        (("unused", "stem"), "module 'unused' of the student did not run"),
        ("stam", r"the student \(Net\) has no module 'stam'; did you mean 'stem'"),
        (("stem", "stam"), r"the teacher \(Net\) has no module 'stam'"),
    ],
)
def test_modules_that_are_not_there_or_do_not_run_are_refused_before_training(at, message):
    student, teacher = nets((4,), (4,))
    with pytest.raises(SlivoError, match=message):
        objective(teacher, losses.sp(at=at)).prepare(student, batch_of())
    assert student.training
    assert teacher.training


def test_a_teacher_that_changes_is_found_out():
    student, teacher = nets((4,), (4,))
    with pytest.raises(SlivoError, match=r"the teacher \(Net\) changed"), objective(teacher, losses.kd()):
        nn.init.zeros_(teacher.head.bias)
    # A student that is its own teacher changes it as it learns.
    made = objective(student, losses.kd())
    made(student, batch_of())
    with pytest.raises(SlivoError, match="share parameters with the student"):
        made.close()


def test_an_error_is_not_covered_up_by_what_it_caused():
    (teacher,) = nets((4,))
    made = objective(teacher, losses.kd())

    def fails():
        with made:
            nn.init.zeros_(teacher.head.bias)
            raise KeyError("cause")

    with pytest.raises(KeyError, match="cause"):
        fails()
    with pytest.raises(SlivoError, match="changed"):
        made.close()


def test_labels_are_taken_out_of_any_batch():
    student, teacher = (each.eval() for each in nets((4,), (4,)))
    inputs, classes = batch_of()
    batch = {"x": inputs, "y": classes}

    def forward_dict(model, batch):
        return model(batch["x"])

    terms, options = [losses.dkd()], {"label_weight": 0}
    made = distillation(teacher, forward_dict, loss, terms, labels=lambda batch: batch["y"], **options)
    expected = logits.dkd(student(inputs), teacher(inputs), classes)
    torch.testing.assert_close(made(student, batch)["dkd"], expected)
    with pytest.raises(ShapeError, match=r"dkd: a batch is a dict and not \(inputs, labels\)"):
        distillation(teacher, forward_dict, loss, terms, **options)(student, batch)


@pytest.mark.parametrize("batch", [torch.ones(2), [torch.ones(2)], (torch.ones(2), "cat"), None])
def test_batches_without_labels_are_refused(batch):
    assert second((None, torch.ones(2))).tolist() == [1, 1]
    with pytest.raises(ShapeError, match="labels="):
        second(batch)


def test_options_that_make_no_sense_are_refused():
    (teacher,) = nets((4,))
    for label_weight in (-0.1, math.inf, math.nan):
        with pytest.raises(RecipeError, match=r"label_weight is .*0 or above"):
            objective(teacher, losses.kd(), label_weight=label_weight)
    with pytest.raises(RecipeError, match=r"no losses to distil with.*slivo\.losses\.kd"):
        objective(teacher)


def test_a_term_with_a_bad_option_is_refused_early():
    for weight in (0, -1, math.inf, math.nan):
        with pytest.raises(RecipeError, match=r"weight of kd is .*above 0"):
            Term(logits.kd, weight=weight)
    with pytest.raises(RecipeError, match=r"loss kd cannot be called with {'temprature': 2}.*temprature"):
        Term(logits.kd, {"temprature": 2})
    with pytest.raises(RecipeError, match="positional parameter 'size_average'"):
        Term(F.mse_loss)
    with pytest.raises(RecipeError, match=r"at of kd is \('a', 'b', 'c'\)"):
        Term(logits.kd, at=("a", "b", "c"))
    with pytest.raises(RecipeError, match="at of kd is"):
        Term(logits.kd, at=("a", 1))
    # What only the function itself can know is found by the first trial, before the training.
    student, teacher = nets((4,), (4,))
    with pytest.raises(RecipeError, match=r"^kd: temperature is -1"):
        objective(teacher, Term(logits.kd, {"temperature": -1})).prepare(student, batch_of())


def test_a_term_needs_all_its_options():
    def scaled(student, teacher, *, factor):
        return factor * (student - teacher).square().mean()

    with pytest.raises(RecipeError, match=r"missing a required .*'factor'"):
        Term(scaled)
    student, teacher = nets((4,), (4,))
    assert objective(teacher, Term(scaled, {"factor": 2}))(student, batch_of())["scaled"] > 0


def test_losses_of_ones_own_may_be_any_callable():
    student, teacher = (each.eval() for each in nets((4,), (4,)))
    terms = [Term(functools.partial(logits.kd, temperature=2.0)), Term(nn.MSELoss(), at=["head", "head"])]
    parts = objective(teacher, *terms)(student, batch_of())
    assert list(parts) == ["labels", "custom", "custom@head"]
    ours, theirs = (net(batch_of()[0]) for net in (student, teacher))
    torch.testing.assert_close(parts["custom"], logits.kd(ours, theirs, temperature=2))
    torch.testing.assert_close(parts["custom@head"], F.mse_loss(ours, theirs))


def test_a_loss_that_is_no_number_is_refused():
    def rows(student, teacher):
        return (student - teacher).square().mean(-1)

    student, teacher = nets((4,), (4,))
    with pytest.raises(ShapeError, match=r"rows: the loss has shape \(6,\); it must be one number"):
        objective(teacher, Term(rows)).prepare(student, batch_of())


def test_runs_under_autocast():
    student, teacher = nets((4,), (6,))
    joint = {name: {"stem": "stem", "norm": "norm"} for name in ("fsp", "review", "attention_relation")}
    terms = [
        losses.build({name: {} if name in vars(logits) else {"at": joint.get(name, "stem")}}) for name in losses.names()
    ]
    made, batch = objective(teacher, *terms), batch_of()
    made.prepare(student, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = made(student, batch)
    sum(parts.values()).backward()
    assert len(parts) == len(terms) + 1
    assert all(part.isfinite() and part.dtype == torch.float32 for part in parts.values())
    assert student.stem.weight.grad.isfinite().all()
