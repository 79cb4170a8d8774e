"""Sensitivity: by hand, kept on the disk, and taken up where it was left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toys
from torch import nn

from slivo.graph import trace
from slivo.prune import Plan, cut
from slivo.recipe.schema import Prune
from slivo.search import sensitivity as module
from slivo.search.sensitivity import damages, sensitivity
from slivo.search.widths import groups_of, name_of

TASK = toys.task()


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return toys.net(6).train()


def test_it_is_the_divergence_of_a_network_with_one_axis_cut(net: nn.Module, tmp_path: Path) -> None:
    graph = trace(net, TASK.example_inputs)
    groups = groups_of(graph, Prune())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = sensitivity(net, TASK, graph, groups, file=tmp_path / "s.json")
    assert net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert set(found) == {name_of(group) for group in groups}
    x, labels = TASK.val.tensors  # type: ignore[attr-defined]
    axis = groups[0].axes[0]
    wanted = found[axis.name]["0.5"]
    net.eval()
    with torch.no_grad():
        whole = net(x).double().log_softmax(1)
        possible = []
        for kept in torch.combinations(torch.arange(6), 3).tolist():
            small = cut(net, TASK.example_inputs, Plan.of([axis], {axis.name: kept}), graph=graph).eval()
            ours = small(x).double().log_softmax(1)
            drop = (whole.argmax(1) == labels).double().mean() - (ours.argmax(1) == labels).double().mean()
            possible.append((float((whole.exp() * (whole - ours)).sum(1).mean()), float(drop)))
    close = [pair for pair in possible if abs(pair[0] - wanted["divergence"]) < 1e-5]
    assert any(abs(drop - wanted["drop"]) < 1e-6 for _, drop in close)


def test_what_was_measured_is_read_and_only_the_rest_is_measured(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = trace(net, TASK.example_inputs)
    groups, file = groups_of(graph, Prune()), tmp_path / "s.json"
    heard: list[tuple[int, int]] = []
    found = sensitivity(net, TASK, graph, groups, file=file, threads=1, progress=lambda *at: heard.append(at))
    assert heard == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    data = json.loads(file.read_text())
    del data["damages"][name_of(groups[1])]["0.5"]
    file.write_text(json.dumps(data))
    cuts = []
    real = module.cut
    monkeypatch.setattr(module, "cut", lambda *args, **options: cuts.append(1) or real(*args, **options))
    assert sensitivity(net, TASK, graph, groups, file=file) == found
    assert len(cuts) == 1
    assert sensitivity(net, TASK, graph, groups, file=file) == found
    assert len(cuts) == 1
    with torch.no_grad():
        net.head.bias.add_(1)  # type: ignore[union-attr, operator]
    assert sensitivity(net, TASK, graph, groups, file=file) != found  # another network's are not taken
    assert len(cuts) == 5
    file.write_text("{")
    sensitivity(net, TASK, graph, groups, file=file, samples=5)
    assert len(cuts) == 9


def test_numbers_are_compared_by_their_distance(net: nn.Module, tmp_path: Path) -> None:
    class Regress(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)[:, 0]

    task = replace(TASK, update=lambda metrics, output, batch: metrics.update(output.long().clamp(0, 2), batch[1]))
    model = Regress()
    graph = trace(model, task.example_inputs)
    found = sensitivity(model, task, graph, groups_of(graph, Prune()), file=tmp_path / "s.json")
    assert all(each["divergence"] > 0 for of in found.values() for each in of.values())


def test_one_number_for_each_group() -> None:
    found = {"a": {"0.75": {"divergence": 1.0, "drop": 0.0}, "0.5": {"divergence": 3.0, "drop": 0.0}}}
    assert damages(found) == {"a": 2.0}
