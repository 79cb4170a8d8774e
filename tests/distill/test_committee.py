"""A committee says the mean of what its members say, whatever they say."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slivo import losses
from slivo.distill import committee, distillation, learn_voices, logits
from slivo.distill.teacher import checksum
from slivo.errors import RecipeError, ShapeError


class Says(nn.Module):
    """Gives out what it was made with, row by row."""

    def __init__(self, said):
        super().__init__()
        self.said = nn.Parameter(torch.as_tensor(said, dtype=torch.float32))

    def forward(self, x):
        return self.said[: len(x)]


def members(count=3, samples=5, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Says(torch.randn(samples, classes, generator=generator) * 5) for _ in range(count)]


X = torch.zeros(5, 1)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=4), st.floats(0.5, 8))
def test_probabilities_are_the_weighted_mean(voices, temperature):
    teachers = members(len(voices))
    found = (committee(teachers, voices, temperature=temperature)(X) / temperature).softmax(-1)
    each = torch.stack([(teacher(X) / temperature).softmax(-1) for teacher in teachers])
    shares = torch.tensor(voices) / sum(voices)
    torch.testing.assert_close(found, (shares[:, None, None] * each).sum(0))


def test_its_divergence_has_the_gradient_of_the_mean_of_all():
    teachers, student = members(), torch.randn(5, 4, requires_grad=True)
    (one,) = torch.autograd.grad(logits.kd(student, committee(teachers, temperature=3.0)(X), temperature=3.0), student)
    mean = sum(logits.kd(student, teacher(X), temperature=3.0) for teacher in teachers) / 3
    (other,) = torch.autograd.grad(mean, student)
    torch.testing.assert_close(one, other)


def test_one_member_or_equal_members_say_what_they_say():
    (alone,) = members(1)
    for found in (committee([alone]), committee([alone] * 3, "confidence"), committee([alone, *members(2)], [1, 0, 0])):
        torch.testing.assert_close(found(X).softmax(-1), alone(X).softmax(-1))


def test_confidence_goes_to_the_surer_member_of_each_sample():
    sure, unsure = [[9.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 9.0]]
    found = committee([Says(sure), Says(unsure)], "confidence", temperature=1.0)(X[:2]).softmax(-1)
    even = committee([Says(sure), Says(unsure)], temperature=1.0)(X[:2]).softmax(-1)
    assert found[0, 0] > even[0, 0]
    assert found[1, 1] > even[1, 1]
    entropies = [
        -sum(p * math.log(p) for p in ps) for ps in ((1 / (1 + math.exp(-9)), 1 / (1 + math.exp(9))), (0.5, 0.5))
    ]
    weights = [math.exp(-each) for each in entropies]
    expected = (weights[0] / (1 + math.exp(-9)) + weights[1] / 2) / sum(weights)
    assert found[0, 0].item() == pytest.approx(expected, rel=1e-5)


def test_all_that_its_word_hangs_on_is_in_its_checksum():
    teachers = members(2)
    voices = [("equal", 4.0), ("confidence", 4.0), ([1, 2], 4.0), ("equal", 1.0)]
    assert len({checksum(committee(teachers, voice, temperature=at)) for voice, at in voices}) == 4


def test_extreme_logits_stay_finite():
    teachers = [Says([[1e4, -1e4, 0.0]]), Says([[-math.inf, 0.0, 0.0]])]
    for voices in ("equal", "confidence", [1, 3]):
        assert committee(teachers, voices)(X[:1]).softmax(-1).isfinite().all()


def forward(model, batch):
    return model(batch[0])


def test_voices_that_are_learned_are_the_likeliest():
    torch.manual_seed(0)
    labels = torch.randint(4, (400,))
    good = Says(nn.functional.one_hot(labels, 4) * 3.0 + 3 * torch.randn(400, 4))
    batch = torch.zeros(400, 1), labels
    poor = Says(nn.functional.one_hot(labels, 4) + 2 * torch.randn(400, 4))
    found = learn_voices(committee([poor, good], temperature=2.0), [batch], forward, lambda batch: batch[1])
    assert 0.5 < found.shares[1] < 0.99
    assert found.temperature == 2.0

    @torch.no_grad()
    def likelihood(share):
        both = torch.stack([each.said.softmax(-1).gather(1, labels[:, None]).flatten() for each in (poor, good)])
        return float((torch.tensor([1 - share, share])[:, None] * both).sum(0).log().mean())

    best = likelihood(float(found.shares[1]))
    assert all(best >= likelihood(share) - 1e-6 for share in torch.linspace(0, 1, 101).tolist())


def test_it_teaches_in_the_place_of_a_teacher():
    torch.manual_seed(0)
    student, teachers = nn.Linear(3, 2), [nn.Sequential(nn.Linear(3, 2)) for _ in range(2)]
    batch = torch.randn(6, 3), torch.zeros(6, dtype=torch.int64)
    terms = [losses.kd(), losses.hint(at={"": "teachers.1.0"}, weight=1)]
    with distillation(committee(teachers), forward, lambda *_: torch.zeros(()), terms, label_weight=0) as made:
        parts = made(student, batch)
    torch.testing.assert_close(parts["kd"], logits.kd(student(batch[0]), committee(teachers)(batch[0])))
    assert set(parts) == {"kd", "hint"}


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([],), {}, "a committee has no teachers"),
        ((members(2), "loud"), {}, "voices is 'loud'; allowed: equal, confidence, or 2 numbers"),
        ((members(2), [1.0]), {}, r"voices is \[1.0\]; there must be 2 numbers"),
        ((members(2), [0, 0]), {}, "not all of them 0"),
        ((members(2), [1, -1]), {}, "none below 0"),
        ((members(1),), {"temperature": 0}, "temperature is 0; it must be a number above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, options, message):
    with pytest.raises(RecipeError, match=message):
        committee(*arguments, **options)


def test_members_must_have_the_same_classes():
    with pytest.raises(ShapeError, match=r"give out \(5, 4\), \(5, 3\); they must have the same classes"):
        committee([*members(1), *members(1, classes=3)])(X)
    with pytest.raises(RecipeError, match="no batches"):
        learn_voices(committee(members(2)), [], forward, lambda batch: batch[1])
    with pytest.raises(ShapeError, match="no tensor"):
        learn_voices(committee([Silent()]), [(X, X)], forward, lambda batch: batch[1])
    with pytest.raises(ShapeError, match="give out no tensor"):
        committee([Silent()])(X)


class Silent(nn.Module):
    def forward(self, _):
        return "nothing"
