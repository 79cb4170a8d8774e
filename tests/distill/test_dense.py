"""Logits of many places: the classes are where one says, each place is a sample, and no map is heavier for its size."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slivo import losses
from slivo.distill import ClassMap, Term, committee, distillation, learn_voices, logits, mutual
from slivo.errors import ShapeError

CLASSES = 5
BY_CLASS = [
    each.name for each in losses.describe() if hasattr(logits, each.name) and each.name not in ("mse", "l1", "dkd")
]


def softmax(values, axis):
    powers = np.exp(values - values.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2)]


class Dense(nn.Module):
    """Class scores of each pixel."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        self.head = nn.Conv2d(3, classes, 1, dtype=torch.float64)

    def forward(self, x):
        return {"out": self.head(x)}


class Moved(nn.Module):
    """Classes last."""

    def forward(self, x):
        return x.movedim(1, -1)


def objective(teacher, *terms, **options):
    return distillation(
        teacher,
        lambda model, batch: model(batch[0]),
        lambda output, batch: F.cross_entropy(output["out"], batch[1]),
        terms,
        **{"label_weight": 0, **options},
    )


def setting(*classes):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 4, 7, dtype=torch.float64)
    return *(Dense(count).eval() for count in classes), (images, torch.randint(min(classes), (2, 4, 7)))


@pytest.mark.parametrize(("shape", "dim"), [((2, CLASSES, 4, 7), 1), ((2, 4, 7, CLASSES), -1), ((2, CLASSES, 7), 1)])
def test_distillation_of_maps_is_the_mean_over_pixels_of_the_divergence_over_classes(shape, dim):
    student, teacher = draw(*shape)
    for temperature in (1.0, 4.0):
        q, p = (softmax(each.numpy() / temperature, dim) for each in (student, teacher))
        divergences = (p * np.log(p / q)).sum(dim)
        assert divergences.size == student.numel() // CLASSES
        term = Term(logits.kd, {"temperature": temperature}, class_dim=dim)
        found = logits.kd(*term.classes_last(student, teacher), temperature=temperature)
        assert found.item() == pytest.approx(temperature**2 * divergences.mean(), rel=1e-12)


@pytest.mark.parametrize("name", BY_CLASS)
def test_each_pixel_is_a_sample(name):
    student, teacher, batch = setting(CLASSES, CLASSES)
    (found,) = objective(teacher, getattr(losses, name)(class_dim=1))(student, batch).values()
    rows = [model(batch[0])["out"].permute(0, 2, 3, 1).reshape(-1, CLASSES) for model in (student, teacher)]
    torch.testing.assert_close(found, getattr(logits, name)(*rows))
    # Twice as high and wide, of the same: no larger.
    larger = (batch[0].repeat(1, 1, 2, 2),)
    (again,) = objective(teacher, getattr(losses, name)(class_dim=1))(student, larger).values()
    torch.testing.assert_close(again, found)


def test_labels_masks_and_class_maps_are_of_pixels():
    student, teacher, batch = setting(3, CLASSES)
    images, labels = batch
    labels[0, 0] = -1
    counted = torch.rand(2, 4, 7) > 0.4
    classes = ClassMap((4, 0, 2))
    made = objective(
        teacher, losses.dkd(class_dim=1, mask=lambda _: counted), losses.kd(class_dim=-3), class_map=classes
    )
    parts = made(student, batch)
    pair = classes.logits(*(model(images)["out"].permute(0, 2, 3, 1) for model in (student, teacher)))
    rows = [each[counted & (labels >= 0)] for each in (*pair, labels)]
    torch.testing.assert_close(parts["dkd"], logits.dkd(*rows))
    torch.testing.assert_close(parts["kd"], logits.kd(*pair))


@pytest.mark.parametrize("name", [*BY_CLASS, "dkd"])
def test_of_maps_one_must_say_where_the_classes_are(name):
    student, teacher, batch = setting(CLASSES, CLASSES)
    message = rf"{name}: logits \(2, 5, 4, 7\) .* say which holds the classes: class_dim=1 for \(batch"
    with pytest.raises(ShapeError, match=message):
        objective(teacher, getattr(losses, name)())(student, batch)
    with pytest.raises(ShapeError, match=r"class_dim is 4, and logits \(2, 5, 4, 7\)"):
        objective(teacher, getattr(losses, name)(class_dim=4))(student, batch)


@pytest.mark.parametrize("name", ["mse", "l1"])
def test_differences_of_entries_do_not_ask_for_classes(name):
    student, teacher, batch = setting(CLASSES, CLASSES)
    values = [
        next(iter(objective(teacher, getattr(losses, name)(**options))(student, batch).values()))
        for options in ({}, {"class_dim": 1}, {"class_dim": -1})
    ]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0])


def test_sequences_have_classes_last_and_a_hint_if_they_do_not_fit():
    student, teacher = draw(2, 6, CLASSES)
    assert torch.equal(Term(logits.kd).classes_last(student, teacher)[0], student)
    with pytest.raises(ShapeError, match="use the same batch, and class_dim=1 if classes are the second dimension"):
        logits.kd(student, teacher[:, :5])


def test_a_network_of_maps_learns_from_another():
    student, teacher, batch = setting(CLASSES, CLASSES)
    made = objective(teacher, losses.kd(class_dim=1, temperature=1)).prepare(student, batch)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    first = made(student, batch)["kd"].item()
    for _ in range(150):
        optimizer.zero_grad()
        made(student, batch)["kd"].backward()
        optimizer.step()
    assert made(student, batch)["kd"].item() < 0.01 * first


def test_a_committee_of_dense_networks_is_one_of_networks_that_put_classes_last() -> None:
    torch.manual_seed(0)
    members = [nn.Conv2d(3, 5, 1) for _ in range(2)]
    last = [nn.Sequential(member, Moved()) for member in members]
    x, y = torch.randn(2, 3, 4, 4), torch.randint(5, (2, 4, 4))
    for voices in ("equal", "confidence"):
        dense, other = committee(members, voices, class_dim=1), committee(last, voices, class_dim=-1)
        torch.testing.assert_close(dense(x), other(x).movedim(-1, 1))
        chance = dense.log_probabilities(x).exp().sum(-1)
        torch.testing.assert_close(chance, torch.ones_like(chance))
    found = [
        learn_voices(each, [(x, y)], lambda model, batch: model(batch[0]), lambda batch: batch[1])
        for each in (committee(members, class_dim=1), committee(last, class_dim=-1))
    ]
    torch.testing.assert_close(found[0].shares, found[1].shares)
    assert found[0](x).shape == (2, 5, 4, 4)
    with pytest.raises(ShapeError, match="say which holds the classes: class_dim=1"):
        committee(members)(x)


def test_dense_networks_learn_from_one_another_by_their_classes() -> None:
    torch.manual_seed(0)
    models = nn.ModuleList(nn.Conv2d(3, 5, 1) for _ in range(2))
    last = nn.ModuleList(nn.Sequential(model, Moved()) for model in models)
    batch = (torch.randn(2, 3, 4, 4), torch.randint(5, (2, 4, 4)))

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        out: Tensor = model(batch[0])
        return out

    found = mutual(forward, lambda out, batch: F.cross_entropy(out, batch[1]), class_dim=1)(models, batch)
    other = mutual(forward, lambda out, batch: out.sum(), class_dim=-1)(last, batch)
    for name in ("kd.0", "kd.1"):
        torch.testing.assert_close(found[name], other[name])
    with pytest.raises(ShapeError, match="more than three dimensions"):
        mutual(forward, lambda out, batch: out.sum())(models, batch)
    with pytest.raises(ShapeError, match="class_dim is 7"):
        mutual(forward, lambda out, batch: out.sum(), class_dim=7)(models, batch)
