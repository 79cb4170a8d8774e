"""A distillation from end to end: what it trains, what it leaves alone, and that it resumes to the bit."""

import copy
import itertools
import logging

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from slivo import losses
from slivo.distill import ClassMap, Result, distill
from slivo.distill.teacher import checksum
from slivo.errors import ArtifactError, RecipeError, ShapeError, SlivoError
from slivo.measure import quality
from slivo.tasks import classification
from slivo.train import Hook, OptimizerSpec

CLASSES = 3


class Net(nn.Module):
    def __init__(self, width=8, classes=CLASSES):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True), nn.Dropout(0.1))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.body(x))


class Stop(Exception):  # noqa: N818
    pass


class Stops(Hook):
    """Breaks off at the first step of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_step_end(self, state):
        if state.epoch == self.epoch:
            raise Stop


def samples(size, seed, classes=CLASSES):
    """Return points around as many centers as there are classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % classes
    return TensorDataset(3 * torch.eye(4)[labels] + torch.randn(size, 4, generator=generator), labels)


@pytest.fixture(scope="module")
def task():
    data = [samples(size, seed) for seed, size in enumerate((60, 30, 30))]
    return classification("points", *data, classes="abc", example_inputs=(data[0].tensors[0][:2],))


@pytest.fixture(scope="module")
def teacher(task):
    """Train a teacher by hand, on the labels."""
    torch.manual_seed(0)
    net, (inputs, labels) = Net(width=12), task.train.tensors
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net.train()


def student(seed=1, **options):
    torch.manual_seed(seed)
    return Net(**options)


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same(a, b):
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def timeless(rows):
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


def test_teaches_and_leaves_both_models_and_random_numbers_alone(task, teacher):
    net = student()
    net.body[0].bias.requires_grad_(False)
    pair = (net, teacher)
    before = [
        (checksum(each), [m.training for m in each.modules()], [p.requires_grad for p in each.parameters()])
        for each in pair
    ]
    state = torch.get_rng_state()
    result = distill(
        net, teacher, task, [losses.kd(weight=0.9)], epochs=6, optimizer=OptimizerSpec(lr=0.1), batch_size=10
    )
    assert isinstance(result, Result)
    assert torch.equal(torch.get_rng_state(), state)
    after = [
        (checksum(each), [m.training for m in each.modules()], [p.requires_grad for p in each.parameters()])
        for each in pair
    ]
    assert after == before
    assert all(parameter.grad is None for each in pair for parameter in each.parameters())
    assert not any(module._forward_hooks for each in (*pair, result.model) for module in each.modules())
    assert result.model is not net
    assert not result.model.training
    assert torch.equal(result.model.body[0].bias, net.body[0].bias)
    assert checksum(result.model) != checksum(net)
    assert quality(result.model, task)["accuracy"] > 0.8
    assert result.history[-1]["terms"]["kd"] < result.history[0]["terms"]["kd"] / 2


def test_without_labels_the_teacher_is_enough(task, teacher):
    wrong = TensorDataset(task.train.tensors[0], torch.zeros(60, dtype=torch.int64))
    options = {"classes": task.classes, "example_inputs": task.example_inputs}
    unlabeled = classification("unlabeled", wrong, task.val, task.test, **options)
    result = distill(
        student(),
        teacher,
        unlabeled,
        [losses.kd()],
        epochs=6,
        optimizer=OptimizerSpec(lr=0.1),
        batch_size=10,
        label_weight=0,
    )
    assert quality(result.model, task)["accuracy"] > 0.8
    assert list(result.history[0]["terms"]) == ["kd"]


def test_history_has_a_row_an_epoch_with_each_term(task, teacher):
    rows = []
    terms = [losses.kd(weight=0.9), losses.rkd_distance(at="body", weight=2)]
    result = distill(student(), teacher, task, terms, epochs=2, on_epoch=rows.append)
    assert rows == result.history
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert list(row["terms"]) == ["labels", "kd", "rkd_distance@body"]
        assert row["loss"] == pytest.approx(sum(row["terms"].values()))
        assert {"accuracy", "f1"} <= set(row["val"])
    assert rows[-1]["val"] == pytest.approx(quality(result.model, task, "val"))


def test_adapters_are_trained_and_no_part_of_the_student(task, teacher):
    net = student(width=4)
    options = {"epochs": 8, "optimizer": OptimizerSpec(lr=0.1), "batch_size": 10, "label_weight": 0}
    result = distill(net, teacher, task, [losses.hint(at="body")], **options)
    assert tensors(result.model).keys() == tensors(net).keys()
    # Twelve features from four: by far not all, but what can be reached is reached only by a trained adapter.
    distances = [row["terms"]["hint@body"] for row in result.history]
    assert distances[-1] < 0.6 * distances[0]


@pytest.mark.parametrize("epoch", [1, 3])
def test_resumed_is_bit_identical(tmp_path, task, teacher, epoch):
    terms = [losses.kd(), losses.hint(at="body"), losses.sp(at="body"), losses.queue_kl(at="body", queue=40)]
    options = {"epochs": 3, "batch_size": 16, "seed": 5}
    whole = distill(student(width=4), teacher, task, terms, **options)
    path = tmp_path / "state"
    with pytest.raises(Stop):
        distill(student(width=4), teacher, task, terms, hooks=[Stops(epoch)], checkpoint=path, **options)
    torch.manual_seed(99)
    other = student(seed=77, width=4) if path.exists() else student(width=4)
    resumed = distill(other, teacher, task, terms, hooks=[Stops(0)], checkpoint=path, **options)
    assert_same(resumed.model, whole.model)
    assert timeless(resumed.history) == timeless(whole.history)


def test_checkpoints_of_another_distillation_are_refused(tmp_path, task, teacher):
    path = tmp_path / "state"
    other = copy.deepcopy(teacher)
    nn.init.zeros_(other.head.bias)

    def run(net, terms, **options):
        return distill(student(), net, task, terms, epochs=1, checkpoint=path, **options)

    first = run(teacher, [losses.kd(temperature=2)])
    assert_same(run(teacher, [losses.kd(temperature=2)]).model, first.model)
    for changed, net, terms, options in (
        ("teacher", other, [losses.kd(temperature=2)], {}),
        ("losses", teacher, [losses.kd(temperature=3)], {}),
        ("losses", teacher, [losses.kd(temperature=2)], {"class_map": ClassMap((0, 1, 2))}),
        ("label_weight", teacher, [losses.kd(temperature=2)], {"label_weight": 0.5}),
    ):
        with pytest.raises(ArtifactError, match=rf"belongs to another distillation \({changed}: "):
            run(net, terms, **options)


def test_result_is_a_function_of_the_arguments(task, teacher):
    def run(seed):
        return distill(student(width=4), teacher, task, [losses.hint(at="body")], epochs=1, seed=seed).model

    first = run(0)
    torch.manual_seed(99)
    assert_same(run(0), first)
    assert checksum(run(1)) != checksum(first)


def test_a_model_may_teach_its_own_copy(task, teacher):
    before = checksum(teacher)
    result = distill(teacher, teacher, task, [losses.kd()], epochs=1)
    assert checksum(teacher) == before
    assert checksum(result.model) != before


def test_a_teacher_of_other_classes_teaches_those_it_knows(task, teacher):
    # A teacher that knows the classes in another order, and one that nobody asked for.
    order = [2, 0, 1]
    mixed = copy.deepcopy(teacher)
    mixed.head = nn.Linear(12, 4)
    with torch.no_grad():
        mixed.head.weight[order], mixed.head.bias[order] = teacher.head.weight, teacher.head.bias
    options = {"epochs": 6, "optimizer": OptimizerSpec(lr=0.1), "batch_size": 10, "label_weight": 0}
    result = distill(student(), mixed, task, [losses.kd()], class_map=ClassMap(tuple(order)), **options)
    assert quality(result.model, task)["accuracy"] > 0.8
    with pytest.raises(ShapeError, match=r"\(10, 3\) and teacher logits \(10, 4\).*class_map"):
        distill(student(), mixed, task, [losses.kd()], **options)


def test_a_teacher_that_knows_nothing_is_doubted(task, teacher, caplog):
    blank = copy.deepcopy(teacher)
    nn.init.zeros_(blank.head.weight)
    nn.init.zeros_(blank.head.bias)
    with caplog.at_level(logging.WARNING, logger="slivo"):
        distill(student(), teacher, task, [losses.kd()], epochs=1)
        # With other classes its accuracy says nothing.
        distill(student(), blank, task, [losses.kd()], epochs=1, class_map=ClassMap((0, 1, 2)))
        assert not caplog.records
        distill(student(), blank, task, [losses.kd()], epochs=1)
    assert "no better than chance (0.333)" in caplog.text


def test_a_teacher_that_changes_is_found_out(task, teacher):
    class Counts(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net
            self.register_buffer("runs", torch.zeros(()))

        def forward(self, x):
            self.runs += 1
            return self.net(x)

    with pytest.raises(SlivoError, match=r"the teacher \(Counts\) changed while it taught"):
        distill(student(), Counts(teacher), task, [losses.kd()], epochs=1)


def test_what_cannot_work_is_refused_before_training(task, teacher):
    started = []

    class Starts(Hook):
        def on_fit_start(self, state):
            started.append(state)

    for terms, kind, message in (
        ([], RecipeError, "no losses"),
        ([losses.hint(at="bodi")], SlivoError, "did you mean 'body'"),
        ([losses.attention_transfer(at="body")], ShapeError, r"attention_transfer@body: .*have no places"),
    ):
        with pytest.raises(kind, match=message):
            distill(student(), teacher, task, terms, epochs=1, hooks=[Starts()])
    assert not started


def test_every_loss_can_be_trained_on(task, teacher):
    # Vectors have no places, no heads and no tokens.
    places = {"attention_transfer", "nst", "cwd", "ickd", "fsp", "review"}
    net, without = student(), places | {"attention_maps", "relation", "attention_relation"}
    assert without < set(losses.names())
    terms = [
        losses.build({name: {} if "at: path = ''" in options else {"at": "body"}})
        for name, options in ((each.name, each.parameters) for each in losses.describe())
        if name not in without
    ]
    result = distill(net, teacher, task, terms, epochs=1, batch_size=16)
    assert len(result.history[0]["terms"]) == len(terms) + 1
    assert all(tensor.isfinite().all() for tensor in itertools.chain(result.model.parameters(), result.model.buffers()))


def test_teachers_elsewhere_are_copied_to_the_student(task, teacher):
    # A teacher without tensors is nowhere and everywhere.
    rule = nn.AdaptiveAvgPool1d(CLASSES)
    result = distill(student(), rule, task, [losses.mse()], epochs=1)
    assert list(result.history[0]["terms"]) == ["labels", "mse"]
    with pytest.raises(NotImplementedError, match="meta"):
        distill(student(), copy.deepcopy(teacher).to("meta"), task, [losses.kd()], epochs=1)
