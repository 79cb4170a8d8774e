"""What a student inherits computes what the teacher's part of it computed."""

import pytest
import torch
from torch import nn
from zoo import ZOO, build

import slivo
from slivo.distill import inherit
from slivo.errors import RecipeError
from slivo.graph.copies import duplicate
from slivo.prune import plan


def fresh(model):
    """The same architecture with other weights."""
    other = duplicate(model)
    torch.manual_seed(7)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 0.2)
    return other


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("name", sorted(ZOO))
def test_an_equal_student_becomes_the_teacher(name):
    teacher, _ = build(name)
    before = {key: tensor.clone() for key, tensor in tensors(teacher).items()}
    student = fresh(teacher)
    found = inherit(student, teacher)
    assert all(torch.equal(tensor, before[key]) for key, tensor in tensors(found.model).items())
    assert set(found.copied) >= set(before)
    assert not found.left
    assert not found.projected


@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_narrower_student_becomes_what_pruning_makes(name):
    teacher, x = build(name)
    small = slivo.prune(teacher, x, keep=slivo.Budget(params=0.5), scope="uniform", criterion="l2")
    keep = plan(teacher, x, keep=slivo.Budget(params=0.5), scope="uniform", criterion="l2").keep
    found = inherit(fresh(small), teacher, x, keep=keep)
    assert not set(found.left) & set(tensors(teacher))  # a graph in the place of a module has constants of its own
    inherited = {key: tensor for key, tensor in tensors(found.model).items() if key not in found.left}
    assert all(torch.equal(tensor, tensors(small)[key]) for key, tensor in inherited.items())


@pytest.mark.parametrize("name", ["ResNet", "PlainCnn", "Mlp"])
def test_without_a_plan_the_largest_positions_stay(name):
    teacher, x = build(name)
    small = slivo.prune(teacher, x, keep=slivo.Budget(params=0.5), scope="uniform", criterion="l2")
    found = inherit(fresh(small), teacher, x)
    assert not found.left
    assert found.projected
    assert all(torch.equal(tensor, tensors(small)[key]) for key, tensor in tensors(found.model).items())


def deep(count, width=6):
    return nn.ModuleDict(
        {"stem": nn.Linear(3, width), "blocks": nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))}
    )


@pytest.mark.parametrize(("fewer", "expected"), [(1, [0]), (2, [0, 5]), (3, [0, 2, 5]), (6, [0, 1, 2, 3, 4, 5])])
def test_fewer_blocks_are_evenly_spaced(fewer, expected):
    teacher = deep(6)
    found = inherit(deep(fewer), teacher)
    for number, at in enumerate(expected):
        assert torch.equal(found.model["blocks"][number].weight, teacher["blocks"][at].weight)
    assert torch.equal(found.model["stem"].weight, teacher["stem"].weight)


def test_layers_may_be_chosen():
    teacher = deep(4)
    found = inherit(deep(2), teacher, layers={"blocks.0": "blocks.3", "blocks.1": "blocks.1", "stem": "nowhere"})
    assert torch.equal(found.model["blocks"][0].weight, teacher["blocks"][3].weight)
    assert torch.equal(found.model["blocks"][1].weight, teacher["blocks"][1].weight)
    assert found.left == ("stem.weight", "stem.bias")


def linear(width):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width, bias=False), nn.Linear(width, 4, bias=False))


def test_a_projection_keeps_what_lies_in_its_directions():
    """Between linear layers a hidden width beyond the rank of what uses it says nothing."""
    teacher, x = linear(12), torch.randn(2, 5)
    with torch.no_grad():
        mix = torch.randn(12, 3)
        teacher[0].weight.copy_(mix @ torch.randn(3, 5))
        teacher[1].weight.copy_(torch.randn(4, 3) @ mix.T)
    found = inherit(linear(3), teacher, x, widths="svd")
    torch.testing.assert_close(found.model(x), teacher(x), rtol=1e-4, atol=1e-4)
    by_cut = inherit(linear(3), teacher, x)
    assert (by_cut.model(x) - teacher(x)).norm() > 0.1 * teacher(x).norm()


def test_channels_of_norms_are_cut_not_mixed():
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).eval()
    student, x = (
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1)).eval(),
        torch.randn(1, 3, 5, 5),
    )
    cut, mixed = (inherit(student, teacher, x, widths=widths).model for widths in ("cut", "svd"))
    assert torch.equal(cut(x), mixed(x))


def test_what_does_not_fit_stays_the_students():
    teacher, student = linear(4), linear(6)
    found = inherit(student, teacher, torch.randn(2, 5))
    assert set(found.left) == {"0.weight", "1.weight"}
    assert torch.equal(found.model[0].weight, student[0].weight)
    assert inherit(linear(3), teacher).left == ("0.weight", "1.weight")
    with pytest.raises(RecipeError, match="widths is 'qr'; allowed: cut, svd"):
        inherit(student, teacher, widths="qr")
