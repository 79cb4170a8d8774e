"""Kill runs at random instants, resume them, and compare what they leave with runs that were left alone, bit for bit.

Every run is a process of its own, which dies by SIGKILL: at an instant drawn over the run's time, or right before or
after one of the calls by which files are written, moved and removed. Most runs die several times. In the end the
student's tensors, the summary, the curves and all that was decided must be those of the undisturbed run, and nothing
else may be in the folder. For example::

    python benchmarks/kill_resume.py --kills 200

Exits with 1 if a run is lost, damaged or different.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import toys

import slivo
from slivo.recipe import Loaded, load, run, shipped
from slivo.recipe import work as trainings

SHORT = {"teacher.args.width": 16, "teacher.fit.epochs": 2, "target.macs": 0.5}
"""What makes a recipe that ships short; each training of its own is cut to two epochs beside it."""

KD = toys.KD
FIT = {"epochs": 2, "batch_size": 16}
PARTS: dict[str, dict[str, Any]] = {
    "steps": toys.recipe({"prune": {**toys.PRUNE, "refit": True}}, {"distill": toys.WITH_ADAPTER}, {"quantize": {}}),
    "sparse": toys.recipe(
        {"sparsify": {"sparsity": 0.5}}, {"finetune": FIT}, {"share": {"clusters": 8}}, {"distill": KD}, target={}
    ),
    "factors": toys.recipe(
        {"factorize": {"keep": {"params": 0.8}}}, {"distill": {**KD, "cache": True}}, {"quantize": {"aware": KD}},
        target={},
    ),
    "rounds": toys.recipe({"repeat": {"times": 2, "stages": [{"prune": {}}, {"distill": KD}]}}),
    "parts": toys.recipe({"layers": {"groups": 2, "stages": [{"prune": {}}, {"distill": KD}]}}),
    "controlled": toys.recipe(
        {"prune": {"controlled": {"max_drop": 0.05}, "schedule": {"steps": 3}, "recover": KD, "keep": {"macs": 0.2}}},
        target={},
    ),
    "pressure": toys.recipe({"prune": {"pressure": {"kind": "greg", **FIT}}}, {"finetune": FIT}),
    "committee": toys.recipe(
        {"prune": {}}, {"distill": KD}, committee={"others": [{"model": "toys:net", "args": {"width": 8}, "fit": FIT}]}
    ),
    "exported": toys.recipe({"prune": {}}, {"distill": KD}, {"export": {"to": "onnx"}}),
    "augmented": toys.recipe(
        {"finetune": FIT}, task={"kind": "image-classification", "data": "toys:moving_task"}, target={}
    ),
    "lost loss": toys.recipe(
        {"finetune": {"epochs": 1, "batch_size": 16, "optimizer": {"lr": 80.0, "momentum": 0.0}}},
        task={"kind": "image-classification", "data": "toys:touchy_task"}, target={},
    ),
}  # fmt: skip
"""Small recipes that have every kind of stage among them."""


@dataclass
class Row:
    """What came of a recipe.

    Attributes:
        seconds: That the undisturbed run took.
        calls: That it made to write, move and remove files.
        kills: By what aimed them.
        runs: That were killed and ended in the end.
        lost: That could not be resumed.
        different: That ended otherwise than the undisturbed run.
        faults: What was wrong with these.
    """

    seconds: float = 0.0
    calls: int = 0
    kills: dict[str, int] = field(default_factory=lambda: {"instant": 0, "write": 0})
    runs: int = 0
    lost: int = 0
    different: int = 0
    faults: list[str] = field(default_factory=list)


def recipes() -> dict[str, Loaded]:
    """Return the recipes by name, all of them short."""
    found = {}
    for name in shipped():
        plain = load(name).recipe.plain()
        settings = [f"{key}={value}" for key, value in SHORT.items()]
        found[name] = load(_cut(plain), settings)
    return {**{name: load(recipe) for name, recipe in PARTS.items()}, **found}


def _cut(value: Any) -> Any:
    """Return a recipe whose trainings take two epochs, whose rounds are two, and which is not exported to ONNX.

    Two exports take longer than all the rest; the small recipe "exported" has them.
    """
    if isinstance(value, list):
        return [_cut(item) for item in value if item != {"export": {"to": "onnx"}}]
    if isinstance(value, Mapping):
        short = {"epochs": 2, "times": 2}
        return {key: min(short[key], item) if key in short else _cut(item) for key, item in value.items()}
    return value


class Writes:
    """Counts calls that change files, and ends the process at one of them."""

    def __init__(self, at: int, *, before: bool) -> None:
        self.at, self.before, self.calls = at, before, 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that counts its calls with the others'."""

        def called(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            die = self.calls == self.at
            if die and self.before:
                os.kill(os.getpid(), signal.SIGKILL)
            found = function(*args, **kwargs)
            if die:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return called

    @contextmanager
    def on(self) -> Iterator[None]:
        """Count."""
        places = [(os, name) for name in ("fsync", "link", "mkdir", "rename", "replace", "unlink", "rmdir", "truncate")]
        places += [(Path, name) for name in ("write_text", "replace", "rename", "unlink", "open")]
        before = [getattr(place, name) for place, name in places]
        for (place, name), function in zip(places, before, strict=True):
            setattr(place, name, self.wrap(function))
        try:
            yield
        finally:
            for (place, name), function in zip(places, before, strict=True):
                setattr(place, name, function)


def start(loaded: Loaded, folder: Path, log: Path, *, at: int = 0, before: bool = False) -> int:
    """Begin or resume a run in a process of its own; returns its number."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        writes = Writes(at, before=before)
        with writes.on():
            run(loaded, folder, seed=3, resume=folder.exists())
        log.write_text(json.dumps({"calls": writes.calls, "modules": sorted(sys.modules)}), encoding="utf-8")
        code = 0
    except BaseException:
        log.write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        os._exit(code)


def ended(process: int, seconds: float | None = None) -> int | None:
    """Wait for a process to end; returns its code, or None if it runs on after so long."""
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        found, status = os.waitpid(process, 0 if until is None else os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if until is not None and time.monotonic() >= until:
            return None
        time.sleep(0.001)


def left(folder: Path) -> dict[str, Any]:
    """Return what a run left that must not depend on how often it was killed."""
    book, rows, summary = toys.read(folder)
    # A cache says when it repairs what a kill cut off.
    book["decisions"] = [each for each in book["decisions"] if "half written" not in each["why"]]
    return {
        "files": sorted(str(file.relative_to(folder)) for file in folder.rglob("*")),
        **{key: toys.timeless(book[key]) for key in ("status", "stages", "decisions", "axes", "agreement")},
        "rows": toys.timeless(rows),
        "summary": toys.timeless(summary),
    }


def compare(whole: Path, folder: Path) -> list[str]:
    """Return in what a run differs from the undisturbed one."""
    ours, theirs = left(folder), left(whole)
    found = [f"{key}: {ours[key]} instead of {theirs[key]}" for key in theirs if ours[key] != theirs[key]]
    for name in ("teacher", "student"):
        if not toys.same(slivo.load(folder / name), slivo.load(whole / name)):
            found.append(f"tensors of the {name} differ")
    return found


def kill(process: int, seconds: float) -> int | None:
    """Kill a process after a time; returns its code if it ended before."""
    code = ended(process, seconds)
    if code is None:
        os.kill(process, signal.SIGKILL)
        ended(process)
    return code


def torment(loaded: Loaded, whole: Path, folder: Path, row: Row, kills: int, draw: random.Random) -> None:
    """Start a run, kill it so many times, let it end, and compare."""
    log = folder.with_suffix(".log")
    for _ in range(kills):
        if draw.random() < 0.5:
            kind = "instant"
            code = kill(start(loaded, folder, log), draw.uniform(0, row.seconds))
        else:
            kind = "write"
            at = draw.randint(1, max(1, row.calls))
            code = ended(start(loaded, folder, log, at=at, before=draw.random() < 0.5))
        if code == 0:
            break  # it was through before
        if code not in (None, -signal.SIGKILL):
            row.faults.append(log.read_text(encoding="utf-8"))
            row.lost += 1
            return
        row.kills[kind] += 1
    row.runs += 1
    if ended(start(loaded, folder, log)) != 0:
        row.faults.append(log.read_text(encoding="utf-8"))
        row.lost += 1
    elif faults := compare(whole, folder):
        row.faults += faults
        row.different += 1


def measure(
    chosen: Mapping[str, Loaded], kills: int, draw: random.Random, folder: Path, say: Callable[[str], None]
) -> dict[str, Row]:
    """Kill runs, always of the recipe that has had the least time so far, until there were so many kills."""
    trainings.SAVE_EVERY = 0.01  # so that most kills find a checkpoint in the midst of an epoch
    rows = {name: Row() for name in chosen}
    for name, loaded in chosen.items():
        for again in (False, True):
            log, began = folder / "whole.log", time.monotonic()
            if ended(start(loaded, folder / name / "whole", log)) != 0:
                raise SystemExit(f"{name} fails undisturbed:\n{log.read_text(encoding='utf-8')}")
            told = json.loads(log.read_text(encoding="utf-8"))
            # What a run imports takes longer than all it does; the processes to come have it from this one.
            if again or not _imported(told["modules"]):
                break
            shutil.rmtree(folder / name / "whole")
        rows[name].seconds, rows[name].calls = time.monotonic() - began, told["calls"]
        say(f"{name}: {rows[name].seconds:.1f} s, {rows[name].calls} calls")
    spent = dict.fromkeys(chosen, 0.0)
    while (done := sum(sum(row.kills.values()) for row in rows.values())) < kills:
        name, began = min(spent, key=spent.__getitem__), time.monotonic()
        killed, times = folder / name / "killed", min(draw.randint(1, 5), kills - done)
        torment(chosen[name], folder / name / "whole", killed, rows[name], times, draw)
        shutil.rmtree(killed, ignore_errors=True)
        spent[name] += time.monotonic() - began
        say(f"{done} of {kills} kills, {name}: {rows[name].faults or 'good'}")
    return rows


def _imported(names: list[str]) -> int:
    """Import what another process had imported; returns how many were new here."""
    new = [name for name in names if name not in sys.modules and name != "__mp_main__"]
    for name in new:
        with suppress(Exception):  # some cannot be imported by name, and need not be
            importlib.import_module(name)
    return len(new)


def table(rows: Mapping[str, Row]) -> list[str]:
    """Return the rows as a table."""
    lines = ["| recipe | seconds | kills | of them at a write | runs | lost | different |", f"|---{'|---:' * 6}|"]
    for name, row in rows.items():
        cells = (name, f"{row.seconds:.1f}", sum(row.kills.values()), row.kills["write"], row.runs, row.lost)
        lines.append(f"| {' | '.join(map(str, cells))} | {row.different} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="recipes; all if left out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {name: loaded for name, loaded in recipes().items() if not options.only or name in options.only}
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(
            chosen, options.kills, random.Random(options.seed), Path(folder),
            lambda text: print(text, file=sys.stderr, flush=True),
        )  # fmt: skip
    print("\n".join(table(rows)))
    kills, runs, lost, different = (
        sum(each)
        for each in zip(
            *((sum(row.kills.values()), row.runs, row.lost, row.different) for row in rows.values()), strict=True
        )
    )
    print(f"{kills} kills, {runs} runs, {lost} lost or damaged, {different} different")
    if options.json:
        content = {"kills": kills, "seed": options.seed, "rows": {name: vars(row) for name, row in rows.items()}}
        options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return 1 if lost or different else 0


if __name__ == "__main__":
    sys.exit(main())
