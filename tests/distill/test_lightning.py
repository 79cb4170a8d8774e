"""A module of Lightning distills: it learns from the teacher, trains adapters along, resumes, and keeps no teacher."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import task

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what Lightning imports
    import lightning

from slivo import losses
from slivo.distill import LightningMixin, Ramp, distillation, logits
from slivo.distill.teacher import checksum
from slivo.errors import ArtifactError, SlivoError

# What Lightning says of trainings as small as these.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
]


class Mine(lightning.LightningModule):
    """A classifier as anyone would write it."""

    def __init__(self, width=4, form="alone", seed=0):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(12, width), nn.BatchNorm1d(width), nn.ReLU())
        self.head = nn.Linear(width, 3)
        self.form = form

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.98**step)
        forms = {
            "alone": optimizer,
            "list": [optimizer],
            "mapping": {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}},
            "both": ([optimizer], [schedule]),
            "none": None,
        }
        return forms[self.form]


class Distiller(LightningMixin, Mine):
    pass


def data(part="train", **options):
    made = getattr(task(), part)
    return DataLoader(TensorDataset(made.tensors[0], made.tensors[1]), batch_size=32, **options)


def forward(model, batch):
    return model(batch[0])


def loss(output, batch):
    return F.cross_entropy(output, batch[1])


def objective(teacher, *terms, **options):
    return distillation(teacher, forward, loss, terms or TERMS, **options)


TERMS = losses.kd(temperature=2, weight=Ramp(1.0, 0.5)), losses.hint(at="body.0")


def trainer(folder, epochs=2, **options):
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(
        default_root_dir=folder, max_epochs=epochs, **{**settings, "enable_checkpointing": False, **options}
    )


def teacher(seed=5):
    return Mine(width=7, seed=seed)


def behind(student, other):
    x = next(iter(data()))[0]
    with torch.no_grad():
        return logits.kd(copy.deepcopy(student).eval()(x), copy.deepcopy(other).eval()(x), temperature=2).item()


class Watch(lightning.Callback):
    """Keeps what is logged and how far the training is."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, runner, module, *_):
        self.rows.append(
            {**{k: float(v) for k, v in runner.callback_metrics.items()}, "at": module.distillation.progress}
        )


@pytest.mark.parametrize("form", ["alone", "list", "mapping", "both"])
def test_the_student_learns_what_the_teacher_says(tmp_path, form):
    other, watch = teacher().train(), Watch()
    before, state = checksum(other), copy.deepcopy(other.state_dict())
    made = objective(other, label_weight=0)
    student = Distiller(4, form=form, distillation=made)
    start = behind(student, other)
    runner = trainer(tmp_path, epochs=8, callbacks=[watch])
    runner.fit(student, data(shuffle=True), data("val"))
    assert behind(student, other) < 0.8 * start
    assert checksum(other) == before
    assert all(torch.equal(each, state[name]) for name, each in other.state_dict().items())
    assert other.training
    assert set(watch.rows[0]) == {"loss_kd", "loss_hint@body.0", "at"}
    assert [row["at"] for row in watch.rows] == [step / 24 for step in range(24)]
    assert runner.callback_metrics["accuracy"] > 0
    (optimizer,) = runner.optimizers
    trained = [each for group in optimizer.param_groups for each in group["params"]]
    assert [id(each) for each in trained] == [id(each) for each in (*student.parameters(), *made.parameters())]
    assert len(made.parameters()) == 2
    assert all(each in optimizer.state for each in made.parameters())
    assert list(student.state_dict()) == list(Mine(4).state_dict())


def test_a_step_has_the_terms_and_gradient_of_the_objective(tmp_path):
    def taught(by_hand):
        other = teacher()
        made = objective(other)
        student = Distiller(4, distillation=made)
        if by_hand:
            batch = next(iter(data()))
            made.prepare(student, batch)
            optimizer = torch.optim.AdamW([*student.parameters(), *made.parameters()], lr=0.01)
            for step, each in enumerate(data()):
                made.progress = step / 3
                optimizer.zero_grad()
                sum(made(student.train(), each).values()).backward()
                optimizer.step()
        else:
            trainer(tmp_path, epochs=1).fit(student, data(), data("val"))
        return [*student.parameters(), *student.buffers(), *made.parameters()]

    for one, other in zip(taught(by_hand=True), taught(by_hand=False), strict=True):
        torch.testing.assert_close(one, other)


def test_a_compiled_module_learns_the_same(tmp_path):
    def taught(wrap):
        student = Distiller(4, distillation=objective(teacher()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what PyTorch's compiler imports
            trainer(tmp_path, epochs=1).fit(wrap(student), data(), data("val"))
        return [*student.parameters(), *student.buffers(), *student.distillation.parameters()]

    plain = taught(lambda student: student)
    for one, other in zip(taught(lambda student: torch.compile(student, backend="eager")), plain, strict=True):
        torch.testing.assert_close(one, other)


def test_what_was_prepared_before_stays(tmp_path):
    made = objective(teacher())
    student = Distiller(4, distillation=made)
    made.prepare(student, next(iter(data())), seed=9)
    adapters, weights = [id(each) for each in made.parameters()], dict(made.weights)
    trainer(tmp_path, epochs=1).fit(student, data(), data("val"))
    assert [id(each) for each in made.parameters()] == adapters
    assert made.weights == weights


def test_terms_that_need_nothing_need_no_batch_before(tmp_path):
    other = teacher()
    student = Distiller(4, distillation=objective(other, losses.kd()))
    trainer(tmp_path, epochs=1).fit(student, data(), data("val"))
    assert not student.distillation.adapters


def test_a_fit_that_was_broken_off_goes_on_as_if_it_was_not(tmp_path):
    def student():
        return Distiller(4, form="mapping", distillation=objective(teacher()))

    whole = student()
    trainer(tmp_path, epochs=4).fit(whole, data(), data("val"))
    first = student()
    runner = trainer(tmp_path, epochs=4, callbacks=[Stop(2)])
    runner.fit(first, data(), data("val"))
    path = tmp_path / "half.ckpt"
    runner.save_checkpoint(path)
    again = student()
    trainer(tmp_path, epochs=4).fit(again, data(), data("val"), ckpt_path=path)
    assert again.distillation.weights == whole.distillation.weights
    for model in (again, whole):
        assert len(model.distillation.parameters()) == 2
    pairs = zip(
        [*again.state_dict().values(), *again.distillation.parameters()],
        [*whole.state_dict().values(), *whole.distillation.parameters()],
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class Stop(lightning.Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, runner, _):
        runner.should_stop = runner.current_epoch + 1 >= self.epochs


def test_a_checkpoint_has_the_student_and_nothing_of_the_teacher(tmp_path):
    other = teacher()
    student = Distiller(4, distillation=objective(other))
    runner = trainer(tmp_path, epochs=1)
    runner.fit(student, data(), data("val"))
    path = tmp_path / "student.ckpt"
    runner.save_checkpoint(path)
    stored = torch.load(path, weights_only=True)
    assert set(stored["state_dict"]) == set(Mine(4).state_dict())
    assert stored["hyper_parameters"] == {"width": 4, "form": "alone", "seed": 0}
    widths = [each.shape for each in tensors(stored["slivo_distillation"])]
    assert sorted(widths) == [(7,), (7, 4)]
    plain = Mine.load_from_checkpoint(path)
    assert type(plain) is Mine
    same = Distiller.load_from_checkpoint(path, distillation=objective(teacher()))
    x = next(iter(data()))[0]
    for model in (plain, same):
        assert torch.equal(model.eval()(x), student.eval()(x))


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [each for item in value.values() for each in tensors(item)] if isinstance(value, dict) else []


def test_a_checkpoint_of_another_lesson_is_refused(tmp_path):
    student = Distiller(4, distillation=objective(teacher()))
    runner = trainer(tmp_path, epochs=1)
    runner.fit(student, data(), data("val"))
    path = tmp_path / "student.ckpt"
    runner.save_checkpoint(path)
    for made, what in ((objective(teacher(seed=6)), "teacher"), (objective(teacher(), losses.kd()), "losses")):
        with pytest.raises(ArtifactError, match=f"belongs to another distillation \\({what}"):
            trainer(tmp_path, epochs=2).fit(Distiller(4, distillation=made), data(), data("val"), ckpt_path=path)
    plain = Mine(4)
    alone = trainer(tmp_path, epochs=1)
    alone.fit(plain, data(), data("val"))
    alone.save_checkpoint(path)
    going_on = Distiller(4, distillation=objective(teacher()))
    going_on.on_load_checkpoint(torch.load(path, weights_only=True))
    assert going_on._stored is None


def test_what_it_cannot_do_is_refused(tmp_path):
    by_hand = Distiller(4, distillation=objective(teacher()))
    by_hand.automatic_optimization = False
    with pytest.raises(SlivoError, match="Distiller optimizes by hand"):
        trainer(tmp_path).fit(by_hand, data(), data("val"))
    several = Distiller(4, distillation=objective(teacher()))
    several.trainer = SimpleNamespace(world_size=2)  # two would need a launcher
    with pytest.raises(SlivoError, match=r"a distillation runs in one process, .* devices=1"):
        several.configure_optimizers()


def test_a_teacher_that_changes_is_found_out(tmp_path):
    other = teacher()
    student = Distiller(4, distillation=objective(other, losses.kd()))
    with torch.no_grad():
        other.head.bias.add_(1)
    with pytest.raises(SlivoError, match=r"the teacher \(Mine\) changed while it taught"):
        trainer(tmp_path, epochs=1).fit(student, data(), data("val"))


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None.")
def test_a_module_that_trains_nothing_trains_no_adapters(tmp_path):
    student = Distiller(4, form="none", distillation=objective(teacher()))
    before = copy.deepcopy(student.body[0].weight)
    trainer(tmp_path, epochs=1).fit(student, data(), data("val"))
    assert torch.equal(student.body[0].weight, before)
