"""Models with several outputs: each head has losses, weights, classes, labels and a mask of its own."""

import math
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers.modeling_outputs import ModelOutput

from slivo import losses
from slivo.distill import ClassMap, Term, Views, cached, distill, distillation, fill, heads, logits
from slivo.distill.features import hint
from slivo.distill.views import loader
from slivo.errors import RecipeError, ShapeError, SlivoError
from slivo.tasks import classification
from slivo.train import OptimizerSpec, fit

KINDS, BOX = 3, 4


@dataclass
class Detected:
    kinds: Tensor
    boxes: Tensor


@dataclass
class Answered(ModelOutput):
    kinds: Tensor | None = None
    boxes: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


Pair = namedtuple("Pair", "kinds boxes")


def as_dict(kinds, boxes):
    return {"kinds": kinds, "boxes": boxes}


class Detector(nn.Module):
    """A body with two heads, put out in any form."""

    def __init__(self, form=as_dict, kinds=KINDS, width=6):
        super().__init__()
        self.body, self.kinds, self.boxes = nn.Linear(5, width), nn.Linear(width, kinds), nn.Linear(width, BOX)
        self.form = form

    def forward(self, x):
        hidden = self.body(x).tanh()
        return self.form(self.kinds(hidden), self.boxes(hidden))


def forward(model, batch):
    return model(batch[0])


def loss(output, batch):
    return (
        F.cross_entropy(heads.find(output, "kinds", "output"), batch[1]) + heads.find(output, "boxes", "").abs().mean()
    )


def batch_of(size=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 5, generator=generator), torch.arange(size) % KINDS


def nets(*options):
    torch.manual_seed(0)
    return [Detector(**each).eval() for each in options or ({}, {"width": 8})]


def objective(teacher, *terms, **options):
    return distillation(teacher, forward, options.pop("task_loss", loss), terms, **options)


class Says(nn.Module):
    """Puts out what it was given."""

    def __init__(self, *said):
        super().__init__()
        self.said = nn.ParameterList(nn.Parameter(torch.tensor(each)) for each in said)

    def forward(self, _):
        return tuple(self.said)


def test_each_head_has_its_own_loss_worked_by_hand():
    # The first says 1:1 where the teacher says 3:1, the second is off by 1 and 3.
    student, teacher = Says([[0.0, 0.0]], [[1.0, 5.0]]), Says([[math.log(3), 0.0]], [[2.0, 2.0]])
    terms = [losses.kd(head=0, temperature=1, weight=2), losses.mse(head=1, weight=0.5), losses.l1(head=1)]
    parts = objective(teacher, *terms, label_weight=0)(student, batch_of())
    assert list(parts) == ["kd[0]", "mse[1]", "l1[1]"]
    assert parts["kd[0]"].item() == pytest.approx(2 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))
    assert parts["mse[1]"].item() == pytest.approx(0.5 * (1 + 9) / 2)
    assert parts["l1[1]"].item() == pytest.approx((1 + 3) / 2)


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (as_dict, ("kinds", "boxes")),
        (lambda kinds, boxes: (kinds, boxes), (0, 1)),
        (lambda kinds, boxes: [kinds, boxes], ("0", "1")),
        (lambda kinds, boxes: {0: kinds, 1: boxes}, (0, 1)),
        (Pair, ("kinds", 1)),
        (Detected, ("kinds", "boxes")),
        (lambda kinds, boxes: Answered(kinds, boxes), ("kinds", "boxes")),
        (lambda kinds, boxes: Answered(hidden_states=(kinds, boxes)), ("hidden_states.0", "hidden_states.1")),
        (lambda kinds, boxes: {"a": [{"b": kinds}], "c.d": boxes, "e": "text"}, ("a.0.b", "c.d")),
    ],
)
def test_is_the_sum_of_objectives_of_one_head_each_whatever_the_form(form, names):
    student, teacher = nets()
    x, _ = batch = batch_of()
    expected = {}
    for name, term in (("kinds", losses.kd(weight=0.7)), ("boxes", losses.mse(weight=3))):
        single = distillation(
            teacher, lambda model, batch, name=name: model(batch[0])[name], loss, [term], label_weight=0
        )
        (expected[name],) = single(student, batch).values()
    sum(expected.values()).backward()
    slopes = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    for model in (student, teacher):
        model.form = form
    terms = [losses.kd(head=names[0], weight=0.7), losses.mse(head=names[1], weight=3)]
    parts = objective(teacher, *terms, label_weight=0)(student, batch)
    assert list(parts) == [f"kd[{names[0]}]", f"mse[{names[1]}]"]
    for found, value in zip(parts.values(), expected.values(), strict=True):
        torch.testing.assert_close(found, value)
    sum(parts.values()).backward()
    for parameter, slope in zip(student.parameters(), slopes, strict=True):
        torch.testing.assert_close(parameter.grad, slope)
    assert set(heads.named(form(x, x))) >= set(map(str, names))


def test_the_tasks_loss_gets_the_whole_output():
    student, teacher = nets()
    batch = batch_of()
    parts = objective(teacher, losses.kd(head="kinds"), label_weight=0.5)(student, batch)
    torch.testing.assert_close(parts["labels"], 0.5 * loss(student(batch[0]), batch))


def test_heads_of_other_names_are_mapped():
    student, teacher = nets({}, {"form": lambda kinds, boxes: (boxes, kinds)})
    batch = batch_of()
    ours, theirs = student(batch[0]), teacher(batch[0])
    for head in ({"kinds": 1, "boxes": 0}, {"kinds": "1", "boxes": "0"}):
        parts = objective(teacher, losses.mse(head=head), label_weight=0)(student, batch)
        assert list(parts) == ["mse[kinds]", "mse[boxes]"]
        torch.testing.assert_close(parts["mse[kinds]"], logits.mse(ours["kinds"], theirs[1]))
        torch.testing.assert_close(parts["mse[boxes]"], logits.mse(ours["boxes"], theirs[0]))
    twice = [losses.kd(head=("kinds", 1)), losses.kd(head=["kinds", 1], temperature=1)]
    assert list(objective(teacher, *twice, label_weight=0)(student, batch)) == ["kd[kinds]", "kd[kinds]#2"]


def test_each_head_has_its_own_classes_labels_and_mask():
    student, teacher = nets({}, {"kinds": 5})
    batch = batch_of()
    more = {"x": batch[0], "kind": batch[1], "known": torch.tensor([1, 1, 0, 0, 1, 0])}
    classes = ClassMap((4, 0, 2))
    terms = [
        losses.dkd(head="kinds", class_map=classes, labels="kind", mask="known"),
        losses.kd(head="kinds", class_map=classes, mask=lambda batch: batch["kind"] > 0),
        losses.mse(head="boxes"),
    ]
    made = distillation(
        teacher, lambda model, batch: model(batch["x"]), loss, terms, label_weight=0, class_map=ClassMap((0, 1))
    )
    parts = made(student, more)
    ours, theirs = student(batch[0]), teacher(batch[0])
    pair = classes.logits(ours["kinds"], theirs["kinds"])
    known = more["known"].bool()
    rows = [each[known] for each in (*pair, batch[1])]
    torch.testing.assert_close(parts["dkd[kinds]"], logits.dkd(*rows))
    torch.testing.assert_close(parts["kd[kinds]"], logits.kd(*(each[batch[1] > 0] for each in pair)))
    # A class map of the whole distillation is of its one output, not of boxes.
    torch.testing.assert_close(parts["mse[boxes]"], logits.mse(ours["boxes"], theirs["boxes"]))


def flow(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Compare how heads go together."""
    return ((student[0].mean() - student[1].mean()) - (teacher[0].mean() - teacher[1].mean())).square()


def test_losses_on_activations_read_heads_too_by_adapters_and_found_weights():
    student, teacher = nets({"form": lambda kinds, boxes: (kinds, boxes)}, {"kinds": 5})
    batch = batch_of()
    made = distillation(
        teacher,
        forward,
        lambda output, batch: output[1].mean(),
        [losses.hint(head={0: "kinds", 1: "boxes"}), Term(flow, head={0: "boxes", 1: "kinds"})],
        label_weight=0.5,
    ).prepare(student, batch)
    parts = made(student, batch)
    assert list(parts) == ["labels", "hint[0]", "hint[1]", "flow[0]+[1]"]
    assert list(made.adapters) == ["hint[0]"]
    assert set(made.weights) == {"hint[0]", "hint[1]"}
    value = made.weights["hint[0]"] * hint(student(batch[0])[0], teacher(batch[0])["kinds"], made.adapters["hint[0]"])
    torch.testing.assert_close(parts["hint[0]"], value)


def test_the_lesson_names_the_heads():
    _, teacher = nets()
    first, second = (objective(teacher, losses.kd(head=head)).lesson["losses"] for head in ("kinds", "boxes"))
    assert first != second


def test_a_student_learns_both_heads():
    student, teacher = nets()
    data = DataLoader(TensorDataset(*batch_of(60)), batch_size=20)
    made = objective(teacher, losses.kd(head="kinds", temperature=1), losses.mse(head="boxes"), label_weight=0)
    rows = fit(student, data, made, epochs=30, optimizer=OptimizerSpec("adamw", lr=0.03))
    for name in ("kd[kinds]", "mse[boxes]"):
        assert rows[-1]["terms"][name] < 0.1 * rows[0]["terms"][name]


def test_the_short_form_and_recipes_take_heads():
    student, teacher = nets()
    data = TensorDataset(*batch_of(24))
    task = replace(
        classification("several", data, data, data, classes="abc", example_inputs=(batch_of(2)[0],)),
        loss=loss,
        update=lambda metrics, output, batch: metrics.update(output["kinds"], batch[1]),
    )
    said = [
        {"kd": {"head": "kinds"}},
        {"dkd": {"head": ["kinds", "kinds"], "labels": 1}},
        {"l1": {"head": {"boxes": "boxes"}}},
    ]
    result = distill(student, teacher, task, [losses.build(each) for each in said], epochs=2, batch_size=8)
    assert list(result.history[-1]["terms"]) == ["labels", "kd[kinds]", "dkd[kinds]", "l1[boxes]"]
    assert result.history[1]["terms"]["l1[boxes]"] < result.history[0]["terms"]["l1[boxes]"]


def test_a_cache_keeps_heads(tmp_path):
    student, teacher = nets()
    views = Views(TensorDataset(*batch_of(12)))
    kept = cached(teacher, views, tmp_path, taps=["[kinds]", "[boxes]", "body"], feature_dtype=torch.float32)
    fill(kept, forward)
    assert not len(kept.missing())
    batch = next(iter(loader(views, batch_size=4, seed=0)))
    terms = [losses.kd(head="kinds"), losses.mse(head="boxes")]
    plain, warm = (objective(each, *terms)(student, batch) for each in (teacher, kept))
    assert list(plain) == list(warm)
    for name, value in plain.items():
        torch.testing.assert_close(warm[name], value)
    with pytest.raises(SlivoError, match=r"does not keep '\[other\]' but '\[kinds\]', '\[boxes\]', 'body'"):
        objective(kept, losses.mse(head=("boxes", "other")))(student, batch)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("masks", r"the output of the teacher has no 'masks'; there are kinds \(6, 3\), boxes \(6, 4\)"),
        (("masks", "boxes"), "the output of the student has no 'masks'; there are kinds"),
        (("boxes", 7), "the output of the teacher has no '7'"),
        ("kinds.0", "has no 'kinds.0'"),
    ],
)
def test_heads_that_are_not_there_are_refused_with_what_is(head, message):
    student, teacher = nets()
    with pytest.raises(ShapeError, match=message):
        objective(teacher, losses.mse(head=head))(student, batch_of())


def test_what_has_no_heads_says_what_it_is():
    one = torch.ones(2, 3)
    with pytest.raises(ShapeError, match=r"^the output is one tensor, \(2, 3\), and has no 'a'"):
        heads.find(one, "a", "the output")
    with pytest.raises(ShapeError, match=r"^the output has no 'a'; there are no tensors in str$"):
        heads.find("text", "a", "the output")
    with pytest.raises(ShapeError, match=r"^the output has no 'a'; there is b \(2, 3\)$"):
        heads.find({"b": one}, "a", "the output")
    with pytest.raises(ShapeError, match=r"there are 0 \(2, 3\), .*11 \(2, 3\), …$"):
        heads.find((one,) * 13, "a", "the output")
    student, teacher = nets()
    made = objective(teacher, losses.dkd(head="kinds", labels="kind"))
    with pytest.raises(ShapeError, match=r"dkd.*: the batch has no 'kind'; there are 0"):
        made(student, batch_of())
    with pytest.raises(RecipeError, match="head of mse is None"):
        heads.pairs("mse", None)
