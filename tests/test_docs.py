"""What the documents say is so: examples run, recipes are valid, commands and links exist, no page is lost."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
import yaml

from slivo.cli import app
from slivo.recipe.load import load
from slivo.recipe.shipped import shipped

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The blocks of a language, with the line on which each begins."""
    text = page.read_text(encoding="utf-8")
    return [
        (text[: match.start("code")].count("\n"), re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE))
        for match in FENCE.finditer(text)
        if match["language"] == language
    ]


@cache
def inserts() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_inserts", DOCS / "_inserts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def filled(page: Path) -> str:
    """What a page says once the parts that come from the code are in it."""
    return inserts().on_page_markdown(page.read_text(encoding="utf-8"))


def prose(page: Path) -> str:
    return FENCE.sub("", filled(page))


def having(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


@pytest.mark.parametrize("page", having("python"), ids=name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")  # classes of the page find the module that they say they are of
    monkeypatch.setitem(sys.modules, "page", module)
    for line, code in blocks(page, "python"):
        exec(compile("\n" * line + code, str(page), "exec"), vars(module))  # lines of a traceback are those of the page


@pytest.mark.parametrize("page", having("yaml"), ids=name)
def test_yaml_blocks_are_recipes(page: Path) -> None:
    for _, text in blocks(page, "yaml"):
        load(whole(yaml.safe_load(text)))


def whole(data: Any) -> Mapping[str, Any]:
    """Make a recipe of what may be a list of stages, or some keys, alone."""
    base = yaml.safe_load(shipped()["prune-then-distill"])
    return {**base, "stages": data} if isinstance(data, list) else {**base, **data}


def calls(page: Path) -> Iterator[list[str]]:
    """The words of each call of ``slivo`` or ``make`` that a page shows."""
    lines = [line for _, code in blocks(page, "bash") for line in code.splitlines()]
    for line in [*lines, *re.findall(r"`((?:slivo|make) [^`]+)`", prose(page))]:
        words = line.partition("  #")[0].split()
        if words[:1] in (["slivo"], ["make"]):
            yield words


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page: Path) -> None:
    commands = typer.main.get_command(app).commands
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for program, *words in calls(page):
        if program == "make":
            assert {word for word in words if "=" not in word and word != "..."} <= set(targets)
        elif not words[0].startswith("-"):
            # `slivo recipes | criteria` names several commands.
            first, *others = " ".join(words).split(" | ")
            options = {option for parameter in commands[first.split()[0]].params for option in parameter.opts}
            assert {word.partition("=")[0] for word in first.split() if word.startswith("--")} <= {*options, "--help"}
            assert {word.split()[0] for word in others} <= set(commands)


def heading(text: str) -> str:
    """The anchor that GitHub and MkDocs make of a heading."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", text.replace("`", "")).strip().lower())


def anchors(page: Path) -> set[str]:
    return {heading(line.lstrip("#")) for line in prose(page).splitlines() if re.match(r"#+ ", line)}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path) if path else page
        assert goal.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(goal), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tables_are_whole(page: Path) -> None:
    assert "<!-- insert:" not in filled(page)
    for table in re.findall(r"(?:^\|.*\|\n)+", prose(page), re.MULTILINE):
        # A bar in a cell would cut it in two.
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
        assert len(table.splitlines()) > 2


def test_navigation_has_every_page() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(leaves(config["nav"]))
    assert len(listed) == len(set(listed))
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert set(listed) == pages


def test_index_has_every_decision() -> None:
    index = (DOCS / "decisions/index.md").read_text(encoding="utf-8")
    linked = re.findall(r"^\| \[(\d{4})\]\((\1-[^)]+)\) \| (.+) \|$", index, re.MULTILINE)
    records = sorted(DOCS.glob("decisions/0*.md"))
    titles = [record.read_text(encoding="utf-8").partition("\n")[0].partition(": ")[2] for record in records]
    assert [(link, title) for _, link, title in linked] == [
        (record.name, title) for record, title in zip(records, titles, strict=True)
    ]


def leaves(nav: Any) -> Iterator[str]:
    for item in nav:
        for value in item.values() if isinstance(item, dict) else [item]:
            yield from [value] if isinstance(value, str) else leaves(value)
