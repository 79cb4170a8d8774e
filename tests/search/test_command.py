"""The command and the page: what they show of a search, and how they fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import toys
import yaml

from slivo import console, report, search
from slivo.errors import ArtifactError
from slivo.search import Found, Row

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(call: Call) -> Call:
    """Runs the command in a folder with a recipe; gives exit code, stdout and stderr."""
    Path("recipe.yaml").write_text(yaml.safe_dump(toys.searched()), encoding="utf-8")
    return call


def test_a_search_prints_its_front_and_leaves_a_page_and_a_recipe_that_runs(call: Call) -> None:
    code, out, err = call("search", "recipe.yaml", "--trials", 2, "--cost", "params", "--set", "target.macs=0.6")
    assert (code, err) == (0, "")
    folder = Path("runs/toy-search")
    assert "training and measuring the teacher" in out
    assert "trial 0 (recipe): " in out
    assert "What nothing beats of 2 trials" in out
    assert f"slivo run {folder.absolute() / 'best.yaml'}" in out
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "What nothing beats" in page
    assert "stages.0.prune.criterion" in page
    assert "http" not in page.split("<script>")[0].replace("http-equiv", "")
    (folder / "report.html").unlink()
    assert call("report", folder)[1].strip() == str(folder / "report.html")
    assert (folder / "report.html").read_text(encoding="utf-8") == page
    code, out, err = call("search", "recipe.yaml", "--trials", 2, "--cost", "params", "--set", "target.macs=0.6", "-q")
    assert (code, err) == (0, "")
    assert "training" not in out
    code, out, err = call("search", "recipe.yaml", "--trials", 2)
    assert code == 2
    assert err.startswith("error: ")
    assert "holds a search of another recipe" in err
    assert call("run", folder / "best.yaml", "--quiet")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing.yaml",), "nothing.yaml is no file, and no recipe that ships"),
        (("recipe.yaml", "--cost", "time"), "the cost time is none"),
        (("recipe.yaml", "--trials", "0"), "Invalid value for '--trials'"),
        (("recipe.yaml", "--set", "search.vary={target.macs: [7]}"), "macs[0] makes no valid recipe"),
        (("recipe.yaml", "--timeout", "-1"), "timeout is -1.0; seconds, a number above 0"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(call: Call, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = call("search", *arguments)
    assert code in (1, 2)
    assert message in err
    assert not Path("runs").exists()


def test_an_interrupt_says_how_to_go_on(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object, out: Path, **__: object) -> None:
        out.mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "search", interrupted)
    code, _, err = call("search", "recipe.yaml")
    assert code == 130
    assert "interrupted; go on with: the same command" in err


def nothing_done(folder: Path, **parts: Any) -> Found:
    teacher = {"accuracy": 0.9, "test": {"accuracy": 0.8}}
    rows = (Row(0, "failed", "recipe", reason="out of luck"),)
    return Found(**{
        "rows": rows, "front": (), "best": None, "objectives": ("accuracy", "macs"), "teacher": teacher, "target": {},
        "waiting": 1, "folder": folder, "recipe": None, **parts,
    })  # fmt: skip


def test_a_search_without_results_fails_and_says_so(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "search", lambda loaded, out, **_: nothing_done(out))
    code, out, err = call("search", "recipe.yaml")
    assert code == 1
    assert "no report: " in err
    assert "no trial is done" in err
    assert "1 trials were broken off; the same command goes on with them" in out


def test_lines_tell_what_came_of_trials(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with console.searching(quiet=False) as shown:
        shown.trial(Row(1, "refused", "alternate", reason="too dear"))
        shown.trial(Row(2, "done", "recipe", values=(0.9, 0.5), misses=("macs is 50%",), seconds=2.0))
    out = capsys.readouterr().out
    assert "trial 1 (alternate) refused: too dear" in out
    assert "trial 2 (recipe): 0.9 at 50.0 %, misses the target: macs is 50%" in out
    real = console.out
    monkeypatch.setattr(console, "out", lambda: terminal(real()))
    with console.searching(quiet=False) as shown:
        shown.watch.finished({})
        shown.watch.started("trial 0: distill", 0, 1)
    with console.searching(quiet=True) as shown:
        shown.note("x")
        shown.trial(Row(1, "refused"))
    missing = Row(3, "done", "recipe", (), (0.9, 0.5), {"test": {}}, ("accuracy fell",))
    console.found(nothing_done(Path("x"), rows=(missing,), front=(missing,), best=missing, recipe=Path("b")), None)
    assert "take trial 3, which misses the target: accuracy fell: slivo run b" in capsys.readouterr().out


def terminal(drawn: Any) -> Any:
    drawn._force_terminal = True
    return drawn


def test_records_that_are_no_search_are_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is not the folder of a search: it has no search.json"):
        report.write_search(tmp_path)
    file = tmp_path / "search.json"
    for text, message in (
        ("{", "is damaged"), ('{"format": 2}', "has format 2"), ('{"format": 1, "trials": 3}', "damaged: trials"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ArtifactError, match=message):
            report.write_search(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(ArtifactError, match="cannot be read: Is a directory"):
        report.write_search(tmp_path)


def test_a_page_escapes_what_it_shows(tmp_path: Path) -> None:
    trial: Mapping[str, Any] = {"number": 0, "state": "failed", "reason": "<b>", "settings": {"<i>": ["<u>", 1]}}
    book = {"format": 1, "name": "<script>", "trials": [trial], "front": [7], "teacher": {"accuracy": None}}
    (tmp_path / "search.json").write_text(json.dumps(book))
    page = report.write_search(tmp_path).read_text(encoding="utf-8")
    assert "<b>" not in page
    assert "<i>" not in page
    assert "&lt;script&gt;" in page
    assert "Plotly" not in page
