"""What the project promises about itself: one version, a light import, documented names, pins, and clean text."""

from __future__ import annotations

import doctest
import inspect
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import slivo

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Not all that git tracks, since a source archive has no git: all that is written by hand.
SUFFIXES = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".css", ".js", ".j2"}
FOLDERS = ("src", "tests", "docs", ".ci")
TEXTS = sorted(
    path
    for path in [*ROOT.iterdir(), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    if path.suffix in SUFFIXES or path.name in {"Makefile", "run"}
)


def test_there_is_one_version() -> None:
    assert PROJECT["version"] == slivo.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] == slivo.__version__


def test_the_command_exists() -> None:
    module, _, function = PROJECT["scripts"]["slivo"].partition(":")
    assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize("name", slivo.__all__)
def test_public_names_are_documented(name: str) -> None:
    public = getattr(slivo, name)
    text = inspect.getdoc(public)
    assert text
    # An error is shown where it is raised.
    if not (inspect.isclass(public) and issubclass(public, slivo.SlivoError)):
        assert doctest.DocTestParser().get_examples(text), f"slivo.{name} has no example"


def imported(statement: str) -> set[str]:
    """Top-level packages that a statement brings into a new process."""
    script = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {module.partition(".")[0] for module in done.stdout.split()}


OPTIONAL = {
    "plotly",
    "jinja2",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "scipy",
    "sklearn",
    "torchvision",
    "transformers",
    "peft",
    "lightning",
    "constriction",
    "zstandard",
    "optuna",
    "sqlalchemy",
}


def test_import_is_immediate() -> None:
    assert not imported("import slivo") & {*OPTIONAL, "torch", "numpy", "rich", "typer", "accelerate", "torchmetrics"}


def test_help_does_not_wait_for_pytorch() -> None:
    assert "torch" not in imported("import slivo.cli")


def test_extras_are_imported_when_they_are_needed() -> None:
    statement = "import slivo\nfor name in slivo.__all__: getattr(slivo, name)"
    assert not imported(statement) & {*OPTIONAL, "typer", "torchmetrics"}


def test_every_constraint_is_one_version() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), "local versions (+cpu) are not on every index"
    assert len({canonical(pin.partition("==")[0]) for pin in pins}) == len(pins)


def test_what_is_needed_is_pinned() -> None:
    pins = {canonical(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    extras = PROJECT["optional-dependencies"]
    used = [
        *PROJECT["dependencies"],
        *(each for name in ("export", "report", "pack", "search", "demo", "dev", "docs") for each in extras[name]),
    ]
    assert {canonical(re.match(r"[\w.-]+", each)[0]) for each in used} - {"slivo"} <= pins


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_extras_name_extras() -> None:
    extras = PROJECT["optional-dependencies"]
    named = {name for each in extras.values() for item in each for name in re.findall(r"^slivo\[([\w,]+)\]", item)}
    assert {name for group in named for name in group.split(",")} <= set(extras)


# The motto, "prune, then distil", is a name.
BRITISH = re.compile(
    r"\b(?:behaviour|colour|favour|neighbour|centre|fibre|artefact|licence|catalogue|grey|whilst|modelled|travelled|"
    r"(?:anal|catal|paral)ys|(?:binar|character|custom|discret|emphas|equal|factor|final|general|initial|local|maxim|memor|"
    r"minim|normal|optim|organ|penal|prior|quant|real|recogn|regular|serial|special|standard|summar|synchron|token|util|"
    r"vector|visual)is(?:e|ed|er|es|ing|ation)\b|(?:pre|de|re)?(?:initial|normal|serial|quant)is(?:e|ation))\w*",
    re.IGNORECASE,
)
# Temporary folders and devices are on every machine; homes and workplaces are not.
MACHINE = re.compile(r"(?<![\w.~}>)/:-])/(?:home|root|work|Users|mnt|opt|scratch)/\w+")


def test_texts_end_with_a_newline() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in TEXTS}
    assert [path for path, text in texts.items() if text and not text.endswith("\n")] == []


def test_texts_name_no_machine() -> None:
    assert found(MACHINE) == {}


def test_spelling_is_american() -> None:
    assert found(BRITISH) == {}


def found(pattern: re.Pattern[str]) -> dict[str, list[str]]:
    """What a pattern finds, by file; this file, which has to spell out what it looks for, aside."""
    hits = {path: pattern.findall(path.read_text(encoding="utf-8")) for path in TEXTS if path != Path(__file__)}
    return {path.relative_to(ROOT).as_posix(): words for path, words in hits.items() if words}
