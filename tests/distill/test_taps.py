"""Taps see what modules put out, change nothing, and leave nothing behind."""

import copy

import pytest
import torch
from torch import nn

from slivo.distill import tap
from slivo.distill.taps import match
from slivo.errors import SlivoError


class Stage(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.ReLU(inplace=True))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(Stage() for _ in range(3))
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.shared = self.head

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return {"logits": self.head(x)}


class Strange(nn.Module):
    def forward(self, x):
        return str(x)


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_sees_the_outputs_and_leaves_no_hooks():
    net, x = Net(), torch.randn(3, 4)
    expected = net(x)["logits"]
    with tap(net, ["stages.0.0", "stages.2", ""]) as seen:
        assert seen == {}
        out = net(x)["logits"]
    assert hooks(net) == 0
    assert list(seen) == ["stages.0.0", "stages.2", ""]
    assert torch.equal(out, expected)
    assert torch.equal(seen[""], expected)
    assert torch.equal(seen["stages.2"], net.stages[2](net.stages[1](net.stages[0](x))))
    net(torch.zeros(3, 4))
    assert torch.equal(seen[""], expected)


def test_operations_in_place_behind_do_not_change_what_was_seen():
    net, x = Stage(), torch.randn(3, 4)
    with tap(net, ["0"]) as seen:
        net(x)
    assert torch.equal(seen["0"], net[0](x))
    assert (seen["0"] < 0).any()


def test_gradients_flow_back_from_what_was_seen():
    net = Stage()
    with tap(net, ["0"]) as seen:
        net(torch.randn(3, 4))
    seen["0"].square().sum().backward()
    assert net[0].weight.grad.norm() > 0


def test_patterns_stand_for_their_matches():
    net = Net()
    with tap(net, ["stages.*", "stages.0", "**.0"]) as seen:
        net(torch.randn(3, 4))
    assert sorted(seen) == ["stages.0", "stages.0.0", "stages.1", "stages.1.0", "stages.2", "stages.2.0"]


def test_modules_that_do_not_run_are_not_seen_and_the_last_output_counts():
    net, again = Net(), nn.Linear(4, 4)
    with tap(net, ["unused", "head", "shared"]) as seen:
        net(torch.randn(3, 4))
    assert list(seen) == ["head", "shared"]
    first, second = torch.randn(3, 4), torch.randn(3, 4)
    with tap(again, [""]) as seen:
        again(first)
        again(second)
    assert torch.equal(seen[""], again(second))


def test_a_copy_made_inside_collects_nothing():
    net, x = Net(), torch.randn(3, 4)
    with tap(net, ["head"]) as seen:
        twin = copy.deepcopy(net)
        twin(x)
        assert seen == {}


def test_hooks_are_gone_after_an_error():
    net = Net()
    with pytest.raises(RuntimeError), tap(net, ["head"]):
        net(torch.randn(3, 5))
    assert hooks(net) == 0
    with pytest.raises(SlivoError), tap(net, ["head", "nothing"]):
        pass
    assert hooks(net) == 0


def test_a_module_without_a_tensor_is_refused():
    net = nn.Sequential(Strange())
    with pytest.raises(SlivoError, match="module '0' puts out str without a tensor"), tap(net, ["0"]):
        net(1)
    assert hooks(net) == 0


def test_match_finds_paths_in_the_models_order():
    net = Net()
    assert match(net, "head") == ["head"]
    assert match(net, "") == [""]
    assert match(net, "stages.*") == ["stages.0", "stages.1", "stages.2"]
    assert match(net, "stages.*.0") == ["stages.0.0", "stages.1.0", "stages.2.0"]
    assert match(net, "*") == ["stages", "unused", "head", "shared"]
    assert match(net, "**.1") == ["stages.0.1", "stages.1", "stages.1.1", "stages.2.1"]
    assert match(net, "s*") == ["stages", "shared"]
    assert "" not in match(net, "**")
    assert len(match(net, "**")) == len(list(net.named_modules(remove_duplicate=False))) - 1


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("stage.0", "did you mean 'stages.0'"),
        ("backbone.head", "did you mean 'head'"),
        ("heat", "'head'"),
        ("xyz", "at the top there are stages, unused, head, shared"),
        ("xyz.*", "at the top there are"),
        ("head.weight", "the student \\(Net\\) has no module 'head.weight'"),
    ],
)
def test_paths_that_are_not_there_are_refused_with_the_nearest(pattern, hint):
    with pytest.raises(SlivoError, match=hint):
        match(Net(), pattern, role="student")


def test_hints_at_the_top_are_few():
    with pytest.raises(SlivoError, match=r"there are 0, 1, 2, 3, 4, 5, 6, 7 \.\.\.$"):
        match(nn.Sequential(*(nn.ReLU() for _ in range(12))), "xyz")
    with pytest.raises(SlivoError, match="it has none"):
        match(nn.ReLU(), "xyz")
