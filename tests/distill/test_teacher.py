"""A teacher is run without a trace on it, proved unchanged, and doubted where it knows nothing."""

import logging

import pytest
import torch
from torch import nn

from slivo import losses
from slivo.distill import distillation
from slivo.distill.teacher import checksum, doubt, frozen, same_preprocessing, verify
from slivo.errors import SlivoError


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def test_frozen_teachers_do_not_learn_or_guess_and_get_their_modes_back():
    teacher = net().train()
    teacher[1].eval()
    teacher[0].weight.requires_grad_(False)
    modes = [module.training for module in teacher.modules()]
    before, x = checksum(teacher), torch.randn(8, 4)
    with frozen(teacher) as running:
        assert running is teacher
        first, second = teacher(x), teacher(x)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert [module.training for module in teacher.modules()] == modes
    assert [parameter.requires_grad for parameter in teacher.parameters()] == [False, True, True, True]
    assert checksum(teacher) == before
    verify(teacher, before)


def test_modes_come_back_after_an_error():
    teacher = net().train()
    with pytest.raises(RuntimeError), frozen(teacher):
        teacher(torch.randn(8, 5))
    assert all(module.training for module in teacher.modules())
    assert torch.is_grad_enabled()


def test_batch_norm_in_training_mode_changes_the_checksum():
    teacher = net().train()
    before = checksum(teacher)
    with torch.no_grad():
        teacher(torch.randn(8, 4))
    with pytest.raises(SlivoError, match=r"teacher \(Sequential\) changed while it taught"):
        verify(teacher, before)


def test_checksum_sees_values_types_names_and_shapes():
    def holder(name, tensor):
        module = nn.Module()
        module.register_buffer(name, tensor, persistent=False)
        return module

    zeros = torch.zeros(2, 3)
    variants = [
        holder("a", zeros),
        holder("b", zeros),
        holder("a", zeros.view(3, 2)),
        holder("a", zeros.int()),
        holder("a", zeros + 1),
        holder("a", torch.empty(0)),
        holder("a", torch.tensor(0.0)),
        holder("a", torch.tensor(False)),
        holder("a", torch.zeros(2, 3, dtype=torch.bfloat16)),
    ]
    assert len({checksum(each) for each in variants}) == len(variants)
    wide = torch.randn(3, 2)
    assert checksum(holder("a", wide.T)) == checksum(holder("a", wide.T.contiguous()))


def test_doubt_warns_at_chance_and_below(caplog):
    with caplog.at_level(logging.WARNING, logger="slivo"):
        assert not doubt(0.51, 0.5)
        assert not caplog.records
        assert doubt(0.5, 0.5)
        assert doubt(0.1, 0.25, "F1")
        assert doubt(torch.tensor(1 / 3).item(), 1 / 3)
        assert doubt(float("nan"), 0.25)
    assert "accuracy is 0.500, no better than chance (0.500)" in caplog.records[0].getMessage()
    assert "F1 is 0.100" in caplog.records[1].getMessage()


def test_images_that_are_normalized_otherwise_are_warned_of(caplog):
    plain, one, other = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
    one.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    other.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": None}
    assert same_preprocessing(plain, one)
    assert same_preprocessing(one, one)
    assert not caplog.text
    assert not same_preprocessing(one, other)
    assert "by mean (0.5, 0.5, 0.5) and the teacher by (0.485, 0.456, 0.406)" in caplog.text
    caplog.clear()
    run, cost = (lambda model, batch: model(batch)), (lambda output, _: output.sum())
    for forward, warned in ((None, True), (lambda model, batch: model(2 * batch), False)):
        made = distillation(other, run, cost, [losses.mse()], label_weight=0, teacher_forward=forward)
        made.prepare(one, torch.ones(4, 1))
        assert ("normalized by mean" in caplog.text) is warned
        caplog.clear()
