"""Break recipes in every way there is, and see that each is refused in one line that says where.

Recipes that ship, and small ones, are changed as data (other types, unknown and missing keys, values out of range,
nulls, wrong nesting) and as text (letters taken out or put in, keys twice, anchors, cycles, tags, numbers without end).
Reading one may give a recipe that is valid, or a `RecipeError` of one line that names file and line; not another
exception, and not more than five seconds. Of the valid ones, a number is prepared as for a run: networks and data are
made and tried on each other. That may end in an error of one line, too, and leaves nothing on the disk. For example::

    python benchmarks/fuzz_recipes.py --count 10000

Exits with 1 if anything else happened, and shows the first such recipes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import toys
import yaml

from slivo.errors import RecipeError, SlivoError
from slivo.recipe import Loaded, load, shipped
from slivo.recipe.prepare import prepare

SECONDS = 5
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 0.5, 1e-9, 1e300, -0.0, float("inf"), float("nan"), 10**18, 10**30, -(10**30),
    "", " ", "x", "0.5", "prune", "kd", "ünïcödé ☃", "‮", "a\nb", "[", [], {}, [[]], [None], {"a": 1}, {"": None},
    {1: 2}, [1, 2, 3], [{}], {"prune": {}}, [{"prune": {}}], "toys:net", "os:getcwd", ":", "a:b:c", "*", "[!", "..",
]  # fmt: skip
"""What takes the place of a value."""

WORDS = [
    "kep",
    "epoch",
    "Stages",
    "stages ",
    "lr",
    "macs",
    "é",
    "$ref",
    "<<",
    "1",
    "null",
    "stages.0",
    "from_",
    "x" * 300,
]
"""What takes the place of a key, or stands beside it."""

TEXTS = [
    "&a [*a]", "&b {c: *b}", "*nobody", "!!python/object:os.system ls", "!!binary x", "!!set {a, b}", "!!omap [a: 1]",
    "2001-99-99", "1" * 5000, "0x" + "f" * 300, "1:2:3:4", "1e999", ".inf", ".nan", "~", "---", "...", "%YAML 9.9",
    "<<: *a", "? a", "- - -", "{[1]: 2}", "{{a: b}: c}", "\t", "\x00", "\ufeff", "\x85", "\ufffd",
    "|", ">", "'", '"', "@", "`", "#", ": :", "[" * 3000, "{a: " * 800, "- " * 2000,
    "&x [1,1,1,1,1,1,1,1]",
]  # fmt: skip
"""What is put into the text."""

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
"""A few lines that stand for a billion values."""


def bases() -> list[dict[str, Any]]:
    """Return valid recipes."""
    small = [
        toys.recipe(*toys.ALL_KINDS),
        toys.recipe({"repeat": {"times": 2, "stages": [{"prune": {}}, {"distill": toys.KD}]}}),
        toys.recipe({"layers": {"groups": 2, "stages": [{"prune": {}}, {"finetune": {"epochs": 1}}]}}),
        toys.recipe({"sparsify": {"sparsity": 0.5}}, {"share": {"clusters": 4}}, {"factorize": {"energy": 0.9}}),
    ]
    return [*small, *(yaml.safe_load(text) for text in shipped().values())]


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


def at(data: Any, path: tuple[Any, ...]) -> Any:
    """Return a value by its path."""
    for key in path:
        data = data[key]
    return data


def change(data: dict[str, Any], draw: random.Random) -> str:
    """Change a recipe in place, as data; returns how."""
    *before, last = draw.choice([place for place in places(data) if place])
    holder, kind = at(data, tuple(before)), draw.choice(["value", "key", "missing", "beside", "nested", "moved", "far"])
    value = holder[last]
    if kind == "value":
        holder[last] = copy.deepcopy(draw.choice(ODD))
    elif kind == "far" and isinstance(value, int | float):
        holder[last] = value * draw.choice([-1, 0, 1e3, 1e12, 1e-12])
    elif kind == "key" and isinstance(holder, dict):
        holder[draw.choice(WORDS)] = holder.pop(last)
    elif kind == "missing":
        del holder[last]
    elif kind == "beside" and isinstance(holder, dict):
        holder[draw.choice(WORDS)] = copy.deepcopy(draw.choice(ODD))
    elif kind == "nested":
        holder[last] = draw.choice([[value], {last: value}, {"stages": [value]}, [value, value]])
    else:
        holder[last] = copy.deepcopy(at(data, draw.choice(places(data))))
    return kind


def spoil(text: str, draw: random.Random) -> tuple[str, str]:
    """Change a recipe's text; returns how, and the text."""
    place = draw.randrange(len(text) + 1)
    kind = draw.choice(["put in", "taken out", "line twice", "indented", "letter", "end", "value", "bomb"])
    lines = text.splitlines(keepends=True)
    line = draw.randrange(len(lines))
    if kind == "put in":
        return kind, text[:place] + draw.choice(TEXTS) + text[place:]
    if kind == "taken out":
        return kind, text[:place] + text[place + draw.randint(1, 9) :]
    if kind == "line twice":
        return kind, "".join([*lines[:line], lines[line], *lines[line:]])
    if kind == "indented":
        return kind, "".join([*lines[:line], " " * draw.randint(1, 3) + lines[line], *lines[line + 1 :]])
    if kind == "letter":
        return kind, text[:place] + chr(draw.choice([0, 7, 34, 39, 58, 91, 93, 123, 125, 0x2028, 0x1F600])) + text[
            place:
        ]
    if kind == "end":
        return kind, text[:place]
    if kind == "value" and ": " in lines[line]:
        lines[line] = f"{lines[line].partition(': ')[0]}: {draw.choice(TEXTS)}\n"
        return kind, "".join(lines)
    return "bomb", BOMB + text


def broken(draw: random.Random, valid: list[dict[str, Any]]) -> tuple[str, str]:
    """Return how a recipe was broken, and its text."""
    data, kinds = copy.deepcopy(draw.choice(valid)), []
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        if len(places(data)) > 1:
            kinds.append(change(data, draw))
    text = yaml.safe_dump(data, allow_unicode=draw.random() < 0.5, default_flow_style=draw.choice([None, False, True]))
    if not kinds or draw.random() < 0.3:
        kind, text = spoil(text, draw)
        kinds.append(kind)
    return kinds[-1], text


def late(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def judged(file: Path, text: str) -> tuple[str, str | Loaded]:
    """Return what reading a recipe ends in: ``refused``, ``valid``, or ``bad`` with the reason."""
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    signal.alarm(SECONDS)
    try:
        return "valid", load(file)
    except RecipeError as error:
        told = str(error)
        if len(told.splitlines()) != 1 or not re.match(rf"{re.escape(str(file))}:\d+: ", told):
            return "bad", f"not located in one line: {told}"
        return "refused", told
    except Exception:
        return "bad", traceback.format_exc(limit=-3)
    finally:
        signal.alarm(0)


def prepared(loaded: Loaded, seconds: int = 60) -> tuple[str, str]:
    """Return what preparing a recipe for a run ends in."""
    signal.alarm(seconds)
    try:
        prepare(loaded)
    except SlivoError as error:
        return ("refused", str(error)) if len(str(error).splitlines()) == 1 else ("bad", f"lines: {error}")
    except Exception:
        return "bad", traceback.format_exc(limit=-3)
    finally:
        signal.alarm(0)
    return "valid", ""


def fuzz(
    count: int, seed: int, folder: Path, *, prepares: int = 0, each: Callable[[int], None] | None = None
) -> tuple[Counter[tuple[str, str]], list[tuple[str, str]]]:
    """Break and read so many recipes; returns how often what ended in what, and those that ended badly."""
    draw, valid, found, bad = random.Random(seed), bases(), Counter[tuple[str, str]](), list[tuple[str, str]]()
    before = signal.signal(signal.SIGALRM, late)
    try:
        for number in range(count):
            kind, text = broken(draw, valid)
            end, told = judged(folder / "recipe.yaml", text)
            found[kind, end] += 1
            if end == "valid" and prepares and isinstance(told, Loaded):
                prepares -= 1
                end, told = prepared(told)
                found["prepared", end] += 1
            if end == "bad":
                bad.append((str(told), text))
            if each is not None:
                each(number + 1)
    finally:
        signal.signal(signal.SIGALRM, before)
    if sorted(file.name for file in folder.iterdir()) not in ([], ["recipe.yaml"]):
        bad.append(("something was left on the disk", str(list(folder.iterdir()))))
    return found, bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--prepare", type=int, default=200, help="valid recipes that are prepared as for a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()

    def said(done: int) -> None:
        if done % 1000 == 0:
            print(f"{done} of {options.count}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        found, bad = fuzz(options.count, options.seed, Path(folder), prepares=options.prepare, each=said)
    for told, text in bad[:20]:
        print(f"bad: {told}\n{text[:600]}\n")
    ends = ("refused", "valid", "bad")
    print("| what was changed | refused | valid | bad |\n|---|---:|---:|---:|")
    for kind in sorted({kind for kind, _ in found}):
        print(f"| {kind} | {' | '.join(str(found[kind, end]) for end in ends)} |")
    total = {
        end: sum(number for (kind, each), number in found.items() if each == end and kind != "prepared") for end in ends
    }
    print(f"{options.count} recipes in {time.perf_counter() - started:.0f} s: {total}; bad in all: {len(bad)}")
    if options.json:
        options.json.write_text(json.dumps({"count": options.count, "seed": options.seed, **total}), encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
