"""A Trainer of transformers distills: it learns from the teacher, trains adapters along, and evaluates as ever."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from slivo import losses
from slivo.distill import Ramp, TrainerMixin, distillation, logits
from slivo.distill.teacher import checksum
from slivo.errors import SlivoError


class Distiller(TrainerMixin, Trainer):
    pass


def bert(width, layers, seed):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=20, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=2 * width,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


class Texts(Dataset):
    def __init__(self, count=24):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(20, (count, 8), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, at):
        mask = torch.ones(8, dtype=torch.int64)
        mask[6:] = at % 2
        return {"input_ids": self.ids[at], "attention_mask": mask, "labels": self.ids[at, 0] % 3}


def forward(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def loss(output, batch):
    return F.cross_entropy(output.logits, batch["labels"])


def trainer(folder, student, made, **options):
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=8, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no", logging_steps=1, seed=3, learning_rate=2e-3, **options,
    )  # fmt: skip
    return Distiller(student, arguments, train_dataset=Texts(), eval_dataset=Texts(8), distillation=made)


def objective(teacher, student, *terms, **options):
    made = distillation(teacher, forward, loss, terms, **options)
    batch = torch.utils.data.default_collate([Texts()[at] for at in range(8)])
    return made.prepare(student, batch)


@pytest.mark.filterwarnings("ignore")  # of what transformers itself calls
def test_the_student_learns_what_the_teacher_says(tmp_path):
    student, teacher = bert(8, 1, 0), bert(12, 2, 1).train()
    before = checksum(teacher)
    terms = [losses.kd(temperature=2, weight=Ramp(1.0, 0.5)), losses.hint(at="bert.embeddings", weight=0.1)]
    made = objective(teacher, student, *terms, label_weight=0)
    adapted = [each.clone() for each in made.parameters()]
    batch = torch.utils.data.default_collate([Texts()[at] for at in range(24)])

    def behind():
        with torch.no_grad():
            return logits.kd(*(forward(each.eval(), batch).logits for each in (student, teacher)), temperature=2).item()

    start = behind()
    teacher.train()
    runner = trainer(tmp_path, student, made, num_train_epochs=12)
    runner.train()
    assert behind() < 0.8 * start
    assert checksum(teacher) == before
    assert all(not torch.equal(*pair) for pair in zip(made.parameters(), adapted, strict=True))
    assert 0.9 < made.progress < 1.0
    logged = [row for row in runner.state.log_history if "loss_kd" in row]
    assert len(logged) == 36
    assert {"loss_kd", "loss_hint@bert.embeddings"} <= set(logged[0])
    metrics = runner.evaluate()
    assert metrics["eval_loss"] > 0
    assert not any("adapter" in name for name in student.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_batches_that_are_added_up_are_as_one(tmp_path):
    def trained(size, steps):
        student, teacher = bert(8, 1, 0), bert(8, 1, 1)
        for each in student.modules():
            if isinstance(each, nn.Dropout):
                each.p = 0.0
        made = objective(teacher, student, losses.kd(weight=1.0), label_weight=0)
        runner = trainer(tmp_path, student, made, max_steps=3, gradient_accumulation_steps=steps)
        runner.args.per_device_train_batch_size = size
        runner._train_batch_size = size
        runner.train()
        return student.state_dict()

    whole, parts = trained(8, 1), trained(4, 2)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-3, atol=1e-4)


def test_several_devices_are_refused(tmp_path):
    student, teacher = bert(8, 1, 0), bert(8, 1, 1)
    runner = trainer(tmp_path, student, objective(teacher, student, losses.kd(), label_weight=0))
    with pytest.raises(SlivoError, match="a distillation runs in one process"):
        runner.compute_loss(nn.DataParallel(student).train(), Texts()[0])
