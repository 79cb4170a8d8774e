"""The ground on which all trials stand: one trained teacher, its costs, and how sensitive its axes are."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slivo.errors import SlivoError, TargetError
from slivo.graph import Graph, trace
from slivo.measure import cost
from slivo.prune import Plan, cut
from slivo.prune.ranks import Group
from slivo.recipe import Loaded, Watch, run
from slivo.recipe import folder as files
from slivo.recipe.cuts import timer_of
from slivo.recipe.load import load
from slivo.recipe.models import made
from slivo.recipe.places import get
from slivo.recipe.prepare import prepare, task_of
from slivo.recipe.schema import Teacher
from slivo.search import sensitivity as measuring
from slivo.search.space import Arm, Candidate, arms
from slivo.search.widths import groups_of, sizes, written
from slivo.tasks import Task

REFERENCE = "reference"
LATENCIES = "latencies.json"

Told = Callable[[str], None]
"""Hears in a line what is going on."""


@dataclass(frozen=True)
class Ground:
    """What all trials share.

    Args:
        loaded: The recipe to start from.
        out: The folder of the search.
        seed: Of every trial, so that all have the same teacher.
        task: Data, loss and metrics.
        model: A trained teacher that was at hand, or None.
        arms: The strategies and what is varied in them.
        costs: The objectives beside the task's metric.
        teacher: What was measured of the teacher: the metric on the validation data, costs, latency, and on the test
            data.
        start: MACs and parameters of the network that is made smaller, before anything is done to it.
        graph: Its axes; None if no widths are set.
        groups: Those that may be cut.
        damages: How much it suffers when each is cut alone.
        network: The trained network that widths are of; None likewise.
    """

    loaded: Loaded
    out: Path
    seed: int
    task: Task
    model: nn.Module | None
    arms: tuple[Arm, ...]
    costs: tuple[str, ...]
    teacher: Mapping[str, Any]
    start: Mapping[str, int]
    graph: Graph | None = None
    groups: tuple[Group, ...] = ()
    damages: Mapping[str, float] | None = None
    network: nn.Module | None = None

    @property
    def metric(self) -> str:
        """Name of the task's metric."""
        return self.task.primary

    def settled(self, candidate: Candidate) -> tuple[dict[str, Any], dict[str, float]]:
        """Return a candidate's recipe with the widths that it asks for, and what is known of its costs by that.

        Raises:
            TargetError: If no widths are that cheap.
        """
        if candidate.shape is None or candidate.prune is None or self.graph is None or self.damages is None:
            return candidate.plain, {}
        part = get(candidate.plain, candidate.prune)
        share = {name: (part.get("keep") or candidate.plain["target"]).get(name) for name in ("macs", "params")}
        limits = {name: int(value * self.start[name]) for name, value in share.items() if value is not None}
        widths = sizes(self.graph, self.groups, self.damages, candidate.shape, limits)
        macs, params = self.graph.count(widths)
        part |= written(widths, macs, self.start["macs"])
        found: dict[str, float] = {"macs": macs, "params": params}
        target = self.loaded.recipe.target
        if "latency" in self.costs or target.latency_ms is not None or target.latency is not None:
            found["latency"] = self.timed(widths)
        return candidate.plain, found

    def timed(self, widths: Mapping[str, int]) -> float:
        """Return the latency of a network of these widths in PyTorch, as a share of the whole one's, from the table.

        What is in the table was measured on a network that was really cut; what is not is measured now.
        """
        assert self.graph is not None
        assert self.network is not None
        file, key = self.out / LATENCIES, " ".join(map(str, widths.values()))
        table = files.read_json(file) if file.is_file() else {}
        if key not in table:
            axes = [axis for group in self.groups for axis in group.axes]
            kept = {name: list(range(width)) for name, width in widths.items()}
            small = cut(self.network, self.task.example_inputs, Plan.of(axes, kept), graph=self.graph)
            time = timer_of(self.task)
            rounds = sorted(time(small) / time(self.network) for _ in range(5))
            table = (files.read_json(file) if file.is_file() else {}) | {key: rounds[len(rounds) // 2]}
            files.write_json(file, table)
        return float(table[key])


def lay(
    loaded: Loaded,
    out: Path,
    *,
    seed: int,
    costs: Sequence[str],
    task: Task | None,
    model: nn.Module | None,
    strategies: Sequence[str] | None,
    watch: Watch,
    tell: Told,
) -> Ground:
    """Prepare all that trials share, or read from the folder what an earlier start or another worker prepared.

    Args:
        loaded: The recipe to start from.
        out: The folder of the search.
        seed: Of everything random.
        costs: The objectives beside the task's metric.
        task: In place of what the recipe says.
        model: A trained teacher, in place of what the recipe says.
        strategies: Those that another worker found to fit; None to find out.
        watch: Hears of the teacher's training.
        tell: Hears what is being done.
    """
    plain = loaded.recipe.model_copy(update={"search": None})
    whole = replace(loaded, recipe=plain)
    task = task or task_of(whole)
    job = prepare(whole, task=task, model=model, seed=seed)
    teacher = _reference(whole, out, seed, task, model, watch, tell)
    ours = _teachers(whole, out, model)
    found = [arm for arm in arms(loaded.recipe) if strategies is None or arm.name in strategies]
    if strategies is None:
        fitting = {arm.name: _unfit(ours, arm, task, model, seed) for arm in found[1:]}
        for name, why in fitting.items():
            if why:
                tell(f"strategy {name} is left out: {why}")
        found = [arm for arm in found if not fitting.get(arm.name)]
    network = made(job.student, seed) if job.student is not None else _taught(ours, model, seed)
    counted = cost(network, task.example_inputs)
    ground = Ground(
        loaded, out, seed, task, model, tuple(found), tuple(costs), teacher,
        {"macs": counted.macs, "params": counted.params},
    )  # fmt: skip
    if found[0].prune is None:
        return ground
    graph = trace(network, task.example_inputs)
    part = loaded.recipe.stages[int(found[0].prune[1])].prune
    assert part is not None
    groups = groups_of(graph, part)
    tell(f"measuring how sensitive {len(groups)} axes are")
    measured = measuring.sensitivity(
        network, task, graph, groups, file=out / measuring.FILE, threads=os.cpu_count() or 1,
        progress=lambda done, total: watch.progress("sensitivity", done, total, {}),
    )  # fmt: skip
    return replace(ground, graph=graph, groups=tuple(groups), damages=measuring.damages(measured), network=network)


def trial_recipe(ground: Ground, data: Mapping[str, Any]) -> Loaded:
    """Return what a trial runs: its recipe, with the teachers that are trained already.

    Raises:
        RecipeError: If the choices do not go together.
    """
    return _teachers(load(data), ground.out, ground.model)


def _reference(
    loaded: Loaded, out: Path, seed: int, task: Task, model: nn.Module | None, watch: Watch, tell: Told
) -> dict[str, Any]:
    """Train and measure the teacher by a run that does nothing to the student; returns what was measured."""
    folder = out / REFERENCE
    data = loaded.recipe.plain() | {"student": {"from": "teacher"}, "stages": [{"sparsify": {"sparsity": 0.0}}]}
    data.pop("target")
    if not (folder / files.SUMMARY).is_file():
        tell("training and measuring the teacher, once for all trials")
        begun = (folder / files.RUN).is_file()
        run(load(data), folder, seed=seed, resume=begun, watch=watch, task=task, model=model)
    book, summary = files.read_json(folder / files.RUN), files.read_json(folder / files.SUMMARY)
    found = {name: summary["teacher"][name] for name in ("macs", "params", "bytes")}
    test = {name: value for name, value in summary["teacher"].items() if name not in (*found, "latency_ms")}
    return {
        task.primary: book["stages"][0]["after"][task.primary],
        **found,
        "latency_ms": summary["teacher"]["latency_ms"]["1"][0],
        "runtime": summary["runtime"],
        "test": test,
    }


def _teachers(loaded: Loaded, out: Path, model: nn.Module | None) -> Loaded:
    """Put artifacts in the place of teachers that would be trained first."""
    recipe = loaded.recipe
    update: dict[str, Any] = {}
    if model is None and recipe.teacher is not None and recipe.teacher.fit is not None:
        update["teacher"] = Teacher(model=str(out / REFERENCE / "teacher"))
    if recipe.committee is not None:
        others = [
            other if other.fit is None else Teacher(model=str(out / REFERENCE / "teachers" / str(number + 2)))
            for number, other in enumerate(recipe.committee.others)
        ]
        update["committee"] = recipe.committee.model_copy(update={"others": others})
    return replace(loaded, recipe=recipe.model_copy(update=update))


def _taught(loaded: Loaded, model: nn.Module | None, seed: int) -> nn.Module:
    """Return the trained teacher."""
    if model is not None:
        return model
    from slivo.recipe.models import named

    assert loaded.recipe.teacher is not None
    return made(named(loaded.recipe.teacher.model, loaded.recipe.teacher.args), seed)


def _unfit(loaded: Loaded, arm: Arm, task: Task, model: nn.Module | None, seed: int) -> str:
    """Return why a strategy does not suit the networks at hand; empty if it does."""
    try:
        found = load(arm.plain)
        recipe = found.recipe.model_copy(
            update={"teacher": loaded.recipe.teacher, "committee": loaded.recipe.committee, "task": None}
        )
        with torch.random.fork_rng(devices=[]):
            prepare(replace(found, recipe=recipe), task=task, model=model, seed=seed)
    except TargetError:  # with other numbers it may be had
        return ""
    except SlivoError as error:
        return str(error)
    return ""
