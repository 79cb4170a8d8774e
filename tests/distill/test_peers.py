"""Models that teach each other, or themselves, learn by the losses that are said, and leave nothing behind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slivo.distill import labelled, logits, mutual, self_taught
from slivo.distill.features import hint
from slivo.errors import RecipeError, ShapeError, SlivoError
from slivo.train import OptimizerSpec, fit

torch.manual_seed(0)
BATCH = torch.randn(8, 1, 6, 6), torch.arange(8) % 3


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(inplace=True))
        self.second = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(2 * width, 3)

    def forward(self, x):
        return self.head(self.drop(self.second(self.first(x)).relu().mean((2, 3))))


def forward(model, batch):
    return model(batch[0])


def loss(output, batch):
    return F.cross_entropy(output, batch[1])


def nets(count):
    torch.manual_seed(1)
    return nn.ModuleList(Net() for _ in range(count)).eval()


def test_each_learns_from_the_mean_of_the_others():
    models = nets(3)
    parts = mutual(forward, loss, temperature=2.0, weight=0.5)(models, BATCH)
    said = [model(BATCH[0]) for model in models]
    for at, ours in enumerate(said):
        torch.testing.assert_close(parts[f"labels.{at}"], loss(ours, BATCH))
        others = [logits.kd(ours, theirs, temperature=2.0) for other, theirs in enumerate(said) if other != at]
        torch.testing.assert_close(parts[f"kd.{at}"], 0.5 * sum(others) / 2)


def test_who_teaches_is_not_moved_by_who_learns():
    models = nets(2)
    parts = mutual(forward, loss)(models, BATCH)
    parts["kd.1"].backward()
    assert all(parameter.grad is None for parameter in models[0].parameters())
    assert models[1].head.weight.grad.norm() > 0
    joint = mutual(forward, loss, teaches="first")(models, BATCH)
    assert set(joint) == {"labels.0", "labels.1", "kd.1"}


def test_models_trained_together_agree_more():
    def disagreement(weight):
        models = nets(2).train()
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*BATCH), batch_size=8)
        fit(models, data, mutual(forward, loss, weight=weight), epochs=15, optimizer=OptimizerSpec(lr=0.05))
        return logits.kd(*(model(BATCH[0]) for model in models), temperature=1.0).item()

    assert disagreement(3.0) < disagreement(0.0)


def test_deeper_layers_teach_shallower_ones():
    (model,) = nets(1)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    made = self_taught(forward, loss, ["first", "second"], temperature=2.0, weight=0.5, hint_weight=0.25)
    with pytest.raises(SlivoError, match=r"call prepare\(model, batch\) first"):
        made(model, BATCH)
    made.prepare(model, BATCH, seed=3)
    assert torch.equal(torch.get_rng_state(), random)
    parts = made(model, BATCH)
    shallow = model.first(BATCH[0])
    deep, said, head = model.second(shallow), model(BATCH[0]), made.heads["0"]
    own = head["logits"](shallow.mean((2, 3)))
    torch.testing.assert_close(parts["labels"], loss(said, BATCH))
    torch.testing.assert_close(parts["labels@first"], loss(own, BATCH))
    torch.testing.assert_close(parts["kd@first"], 0.5 * logits.kd(own, said, temperature=2.0))
    torch.testing.assert_close(parts["hint@first"], 0.25 * hint(shallow, deep, head["features"]))
    assert model.state_dict().keys() == state.keys()
    (parts["kd@first"] + parts["hint@first"]).backward()
    assert model.second.weight.grad is None  # it teaches, and is not taught
    assert model.first[0].weight.grad.norm() > 0
    assert all(parameter.grad is not None for parameter in made.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_heads_are_for_tokens_and_features_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    batch = torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)
    plain = self_taught(forward, loss, ["0", "1"], hint_weight=0).prepare(model, batch)
    assert list(plain(model, batch)) == ["labels", "labels@0", "kd@0"]
    tokens = torch.randn(5, 7, 3), batch[1]
    made = self_taught(lambda model, batch: model(batch[0]).mean(1), loss, ["0", "1"]).prepare(model, tokens)
    own = made.heads["0"]["logits"](model[0](tokens[0]).mean(1))
    torch.testing.assert_close(made(model, tokens)["labels@0"], loss(own, tokens))


def test_samples_without_labels_do_not_count():
    (model,) = nets(1)
    some = BATCH[0], torch.tensor([0, -1, 2, -1, 1, -1, -1, -1])
    counted = labelled(loss, lambda batch: batch[1])
    known = some[1] >= 0
    expected = F.cross_entropy(model(BATCH[0])[known], some[1][known])
    torch.testing.assert_close(counted(model(BATCH[0]), some), expected)
    torch.testing.assert_close(counted(model(BATCH[0]), BATCH), loss(model(BATCH[0]), BATCH))
    none = counted(model(BATCH[0]), (BATCH[0], torch.full((8,), -1)))
    assert none.item() == 0
    none.backward()
    named = labelled(lambda output, batch: F.cross_entropy(output["logits"], batch["y"]), lambda batch: batch["y"])
    torch.testing.assert_close(named({"logits": model(BATCH[0])}, {"y": some[1]}), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mutual(forward, loss, temperature=0), "temperature is 0"),
        (lambda: mutual(forward, loss, weight=-1), "weight is -1"),
        (lambda: mutual(forward, loss, teaches="none"), "teaches is 'none'; allowed: all, first"),
        (lambda: self_taught(forward, loss, ["first"]), "name two or more different modules"),
        (lambda: self_taught(forward, loss, "first"), "name two or more different modules"),
        (lambda: self_taught(forward, loss, ["first", "first"]), "name two or more different modules"),
        (lambda: self_taught(forward, loss, ["first", "second"], hint_weight=-1), "weight is -1"),
    ],
)
def test_options_that_make_no_sense_are_refused(call, message):
    with pytest.raises(RecipeError, match=message):
        call()


def test_models_that_make_no_sense_are_refused():
    (model,) = nets(1)
    with pytest.raises(SlivoError, match="ModuleList of two or more, not Net"):
        mutual(forward, loss)(model, BATCH)
    with pytest.raises(SlivoError, match=r"has no module 'third'"):
        self_taught(forward, loss, ["first", "third"]).prepare(model, BATCH)
    model.unused = nn.Linear(1, 1)
    with pytest.raises(SlivoError, match="module 'unused' did not run"):
        self_taught(forward, loss, ["first", "unused"]).prepare(model, BATCH)
    with pytest.raises(ShapeError, match="puts out str without a tensor"):
        self_taught(lambda *_: "nothing", loss, ["first", "second"]).prepare(model, BATCH)
