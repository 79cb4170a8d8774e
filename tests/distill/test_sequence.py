"""Models go on with texts as they say, and are taught on what they say themselves."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slivo import losses
from slivo.distill import check_vocabularies, continued, distillation, labelled, on_policy, shared_places, teacher_texts
from slivo.errors import RecipeError, ShapeError, SlivoError
from slivo.train import OptimizerSpec, fit


class Bigram(nn.Module):
    """Says what comes next by the last token alone."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)
        self.drop = nn.Dropout(0.5)

    def forward(self, tokens):
        return {"logits": self.drop(self.table[tokens])}


def following(size=5, sure=9.0):
    """Each token is followed by the next."""
    return Bigram(sure * torch.eye(size).roll(1, 1))


def test_the_likeliest_is_taken_at_temperature_0_and_drawn_above():
    prompts = torch.tensor([[0, 1], [3, 4]])
    expected = torch.tensor([[0, 1, 2, 3, 4], [3, 4, 0, 1, 2]])
    model = following().train()
    assert torch.equal(continued(model, prompts, 3, temperature=0), expected)
    assert model.training
    torch.manual_seed(0)
    coin = Bigram(torch.tensor([[0.0, 0.0], [0.0, 0.0]]))
    drawn = continued(coin, torch.zeros(2000, 1, dtype=torch.int64), 1)[:, 1]
    assert 0.45 < drawn.double().mean() < 0.55
    cold = Bigram(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    drawn = continued(cold, torch.zeros(4000, 1, dtype=torch.int64), 1, temperature=0.5)[:, 1]
    assert drawn.double().mean().item() == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item(), abs=0.03)


def test_a_sequence_that_is_over_says_no_more():
    found = continued(following(), torch.tensor([[0], [2]]), 4, temperature=0, end=3)
    assert found.tolist() == [[0, 1, 2, 3, 3], [2, 3, 3, 3, 3]]


def test_teachers_texts_are_targets():
    found = list(teacher_texts(following(), [torch.tensor([[0]]), torch.tensor([[1], [2]])], 2))
    assert [each.tolist() for each in found] == [[[0, 1, 2]], [[1, 2, 3], [2, 3, 4]]]


def forward(model, batch):
    return model(batch["tokens"][:, :-1])


def loss(output, batch):
    return F.cross_entropy(output["logits"].flatten(0, 1), batch["tokens"][:, 1:].flatten())


def test_the_share_of_batches_is_the_students_own_and_no_gradient_flows_through():
    torch.manual_seed(0)
    student = Bigram(torch.zeros(5, 5)).eval()
    batch, seen = {"tokens": torch.zeros(2, 6, dtype=torch.int64)}, []

    def objective(model, batch):
        seen.append(bool(batch["tokens"].any()))
        return {"labels": loss(forward(model, batch), batch)}

    def sample(model, batch):
        assert not torch.is_grad_enabled()
        return {"tokens": continued(model, batch["tokens"][:, :1], 5)}

    for share, least, most in ((0.0, 0, 0), (0.3, 15, 50), (1.0, 95, 100)):
        made = on_policy(objective, sample, share=share)
        seen.clear()
        for _ in range(100):
            made(student, batch)
        assert least <= sum(seen) <= most


def test_a_student_learns_its_teachers_language_by_itself():
    """Of data that hold one token alone nothing else can be learned than on the student's own texts."""
    torch.manual_seed(0)
    teacher, student = following().eval(), Bigram(torch.zeros(5, 5))
    student.drop.p = 0.0
    data = torch.utils.data.DataLoader([{"tokens": torch.zeros(8, dtype=torch.int64)}] * 32, batch_size=16)
    made = distillation(teacher, forward, loss, [losses.jsd()], label_weight=0)

    def sample(model, batch):
        return {"tokens": continued(model, batch["tokens"][:, :1], 7)}

    fit(student, data, on_policy(made, sample, share=0.9), epochs=40, optimizer=OptimizerSpec("adamw", lr=0.1))
    assert continued(student, torch.tensor([[0]]), 4, temperature=0).tolist() == [[0, 1, 2, 3, 4]]


def test_sampled_batches_without_labels_fit_the_labels_loss():
    student = following().eval()
    batch = {"tokens": torch.zeros(2, 4, dtype=torch.int64), "known": torch.tensor([-1, -1])}
    counted = labelled(loss, lambda batch: batch["known"])
    assert counted(forward(student, batch), batch).item() == 0


class Tokenizer:
    def __init__(self, *texts):
        self.texts = texts

    def get_vocab(self):
        return {text: number for number, text in enumerate(self.texts)}


def test_vocabularies_must_agree():
    check_vocabularies(Tokenizer("a", "b"), Tokenizer("a", "b", "c"))
    with pytest.raises(SlivoError, match=r"number 2 of 2 tokens differently \('a', 'b'\).*teacher's tokenizer"):
        check_vocabularies(Tokenizer("a", "b"), Tokenizer("b", "a"))
    with pytest.raises(SlivoError, match=r"4 of 4 .*, …\)"):
        check_vocabularies({"a": 0, "b": 1, "c": 2, "d": 3}, {})


def test_places_are_shared_where_both_have_read_as_much():
    text = "unbelievable things"
    ours, theirs = torch.tensor([0, 2, 9, 12, 13, 19, 0]), torch.tensor([0, 5, 12, 13, 19])
    places = shared_places(ours, theirs)
    assert [text[: ours[at]] for at in places[0]] == [text[: theirs[at]] for at in places[1]]
    assert places[0].tolist() == [3, 4, 5]
    assert shared_places(torch.tensor([1, 1, 2]), torch.tensor([1, 2]))[0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: continued(following(), torch.zeros(1, 1, dtype=torch.int64), 0), RecipeError, "count is 0"),
        (lambda: continued(following(), torch.zeros(1, 1, dtype=torch.int64), 1, temperature=-1), RecipeError, "-1"),
        (
            lambda: continued(nn.Linear(2, 3), torch.zeros(1, 2), 1),
            ShapeError,
            r"gives out \(1, 3\) for tokens \(1, 2\)",
        ),
        (lambda: continued(nn.Identity(), torch.zeros(1, 2), 1, forward=lambda *_: ""), ShapeError, "no tensor"),
        (lambda: on_policy(lambda *_: {}, lambda *_: None, share=2), RecipeError, "share is 2"),
    ],
)
def test_what_makes_no_sense_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
