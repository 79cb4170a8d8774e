"""Searches: they end with a front, and with a recipe that gives its student again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from toys import same

import slivo
from slivo.errors import OutputError, SlivoError
from slivo.recipe import Watch, load, run
from slivo.search import Found, search, store, study, work
from slivo.search.space import arms, suggest
from slivo.search.study import Options

SHAPED = toys.searched({}, search={"widths": True, "vary": {}, "margin": 1.0, "objectives": ["params", "latency"]})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return search(SHAPED, tmp_path_factory.mktemp("searches") / "one", trials=4, seed=3)


def test_a_search_ends_with_its_trials_a_front_and_the_best(found: Found) -> None:
    assert [row.number for row in found.rows] == [0, 1, 2, 3]
    assert found.objectives == ("accuracy", "params", "latency")
    assert found.front
    assert found.best in found.front
    done = [row for row in found.rows if row.values]
    assert all(row.state == "done" and len(row.values) == 3 for row in done)
    assert [row.reason for row in found.rows if not row.values] == [
        row.reason for row in found.rows if row.state in ("refused", "stopped")
    ]
    assert {row.settings["stages.0.prune.scope"] for row in found.rows[:2]} == {"global", "shaped"}
    book = json.loads((found.folder / "search.json").read_text())
    assert book["front"] == [row.number for row in found.front]
    assert [each["number"] for each in book["trials"]] == [0, 1, 2, 3]
    assert set(book["damages"]) == {"first.0 out", "second.0 out"}
    latencies = json.loads((found.folder / "latencies.json").read_text())
    assert all(value > 0 for value in latencies.values())


def test_the_best_recipe_gives_its_trials_student_again_bit_for_bit(found: Found, tmp_path: Path) -> None:
    assert found.best is not None
    assert found.recipe is not None
    assert "slivo run best.yaml --seed 3" in found.recipe.read_text()
    kept = slivo.load(found.folder / "trials" / found.best.folder / "student")
    again = run(load(found.recipe), tmp_path / "again", seed=3)
    assert same(again.model, kept)
    assert again.summary["student"]["params"] == found.best.measured["params"]
    for row in found.front:
        own = load(found.folder / "trials" / row.folder / "recipe.yaml").recipe
        assert own == load(row.recipe).recipe


def test_folders_of_trials_are_small_and_only_the_front_keeps_students(found: Found) -> None:
    ahead = {row.folder for row in found.front}
    wrote = {"run.json", "summary.json", "metrics.jsonl", "recipe.yaml"}
    for row in found.rows:
        folder = found.folder / "trials" / row.folder
        if row.state == "done":
            assert {file.name for file in folder.iterdir()} == wrote | ({"student"} if row.folder in ahead else set())
        else:
            assert not folder.exists() or "student" not in {file.name for file in folder.iterdir()}


def test_the_same_call_goes_on_where_it_was_and_more_trials_are_the_rest(tmp_path: Path) -> None:
    heard: list[int] = []
    first = search(toys.searched(), tmp_path / "s", trials=2, tell=lambda row: heard.append(row.number))
    assert heard == [0, 1]
    sensitivity = first.folder / "reference" / "run.json"
    before = sensitivity.stat().st_mtime_ns
    again = search(toys.searched(), tmp_path / "s", trials=2, tell=lambda row: heard.append(row.number))
    assert heard == [0, 1]
    assert again.rows == first.rows
    more = search(toys.searched(), tmp_path / "s", trials=3, tell=lambda row: heard.append(row.number))
    assert heard == [0, 1, 2]
    assert more.rows[:2] == first.rows
    assert sensitivity.stat().st_mtime_ns - before >= 0
    options = Options(("macs",), None, 0, 60, None, None)
    going = study._going(load(toys.searched()), tmp_path / "s", options, Watch(), print)
    # Another worker was faster in beginning the last one.
    assert work._one(going.study, going.ground, work.Limits(3), Watch()) is None
    assert going.write().rows == more.rows
    with pytest.raises(OutputError, match="holds a search of another recipe, seed or objectives"):
        search(toys.searched(), tmp_path / "s", trials=3, seed=1)
    with pytest.raises(OutputError, match="exists and is not empty"):
        search(toys.searched(), tmp_path, trials=3)


def test_choices_are_a_function_of_the_seed_and_the_trials_before(tmp_path: Path) -> None:
    found = arms(load(toys.searched()).recipe)

    def chosen(name: str, seed: int) -> list[Mapping[str, Any]]:
        settings = []
        with store.quiet():
            for _ in range(4):  # a start of its own for each, as after a kill
                study = store.open_study(f"sqlite:///{tmp_path / name}", "toy", ["macs"], seed=seed)
                trial = study.ask()
                settings.append(suggest(trial, found).settings)
                study.tell(trial, [0.5, len(settings)])
        return settings

    one = chosen("a", 0)
    assert chosen("b", 0) == one
    assert chosen("c", 1) != one
    assert len({each["target.macs"] for each in one}) == 4


def test_a_network_and_a_task_at_hand_are_searched_with(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = toys.net(12)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = search(toys.searched(), tmp_path / "s", trials=1, task=toys.task(), model=net, costs=["bytes"])
    assert found.objectives == ("accuracy", "bytes")
    assert found.best is not None
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    with pytest.raises(SlivoError, match=r"cannot be sent to other processes: .* or leave jobs at 1"):
        search(toys.searched(), tmp_path / "t", trials=1, task=toys.task(), model=net, jobs=2)


def test_teachers_beside_the_teacher_are_trained_once(tmp_path: Path) -> None:
    spec = toys.searched(committee={"others": [{**toys.searched()["teacher"], "args": {"width": 8}}]})
    found = search(spec, tmp_path / "s", trials=1)
    assert found.best is not None
    assert found.best.recipe["committee"]["others"][0]["fit"]["epochs"] == 1
    again = run(load(found.best.recipe), tmp_path / "again")
    assert same(again.model, slivo.load(found.folder / "trials" / "0000" / "student"))


def test_a_student_of_another_kind_is_searched_with(tmp_path: Path) -> None:
    stages = [{"distill": {**toys.KD, "epochs": 1, "optimizer": {"lr": 0.1}}}]
    small = {"model": "toys:net", "args": {"width": 8}}
    spec = toys.recipe(*stages, teacher=toys.searched()["teacher"], target={"macs": 0.9}, student=small)
    found = search({**spec, "search": {"strategies": []}}, tmp_path / "s", trials=1, costs=["macs", "params"])
    assert found.rows[0].predicted["macs"] < 0.5
    assert found.rows[0].values[1] == found.rows[0].predicted["macs"]


def test_a_run_of_a_recipe_with_a_search_passes_it_by(tmp_path: Path) -> None:
    assert run(load(toys.searched()), tmp_path / "run").met
