"""Which networks slivo can prune without configuration, whether it is right about them, and how long it takes.

Every network of `benchmarks/networks` is traced, half of its MACs are pruned, and the result is checked. Run from the
root of the repository::

    python benchmarks/coverage.py                                  # everything; takes an hour
    python benchmarks/coverage.py --only 'torchvision/resnet*'     # a part
    python benchmarks/coverage.py --only 'stress/*' --peer torch-pruning --json coverage.json

The columns:

- ``network``: source and name; ``kind`` tells transformers (attention occurs), cnn (convolutions whose windows overlap)
  and other.
- ``params``: millions of parameters.
- ``axes``: prunable axes / all axes. An axis is a dimension that several tensors share; those of the network's inputs
  and outputs, at least, may not be cut.
- ``error``: the largest relative change of the outputs when a prunable axis is permuted everywhere at once, in
  float64: rounding if the axis is right (1e-9 at most passes). ``g`` behind it: permuted in groups, where one by one
  would take more than 10 s (`oracle.worst` says why that proves as much).
- ``macs``, ``weights``: share of the MACs of operators in which a prunable axis takes part, and of the parameters
  that lie on one.
- ``left``: share of the MACs left by pruning half of them, counted by operator in the pruned model.
- ``runs``: what of the pruned model is right: ``f`` runs, ``b`` trains, ``s`` the sizes its modules state, ``i``
  outputs have the shapes from before, ``l`` saved and loaded it is the same bit by bit; ``-`` in the place of what is
  wrong. A number behind them: so many modules were replaced by their captured graphs, because their code holds sizes
  that cannot be mended; ``g``: the model was replaced as a whole.
- ``trace``, ``all``: processor seconds to find the axes; and to trace, plan and cut, with all checks that
  `slivo.prune` makes. Other work on the machine does not count, and with one thread (set OMP_NUM_THREADS) they are the
  seconds on a machine that has nothing else to do. Measured after a warm-up on a small network.
- ``peer``: with ``--peer torch-pruning``, its processor seconds to prune all widths by half, or FAIL; ``left``: the
  share of the parameters that it left.

Networks pass if nothing is wrong and no more than 51 % of the MACs are left. Notes below a row say what is wrong, which
operators have no rule, and where the graph counts other MACs than the run does. Each network runs in a process of its
own, with a limit on time and memory: one that crashes has a row that says so. Sources whose library is not installed
are left out with a line; they need torchvision, timm, transformers and keras (pip install 'slivo[vision,text]' keras),
the peer needs torch-pruning.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median

import torch

import check
import networks
from row import LARGEST_ERROR, Row

Task = Callable[[str, Path], None]
"""Finds something out about the network of that name, and writes a row to that file."""

HEADER = (
    f"{'network':42} {'kind':11} {'params':>7} {'axes':>9} {'error':>8} {'macs':>5} {'weights':>7} {'left':>5} "
    f"{'runs':7} {'trace':>6} {'all':>6}"
)


def main() -> int:
    options = arguments()
    peer = options.peer is not None
    if peer and importlib.util.find_spec("torch_pruning") is None:
        sys.exit("the peer is not installed: pip install torch-pruning")
    names, missing = networks.names()
    chosen = [name for name in names if any(fnmatchcase(name, glob) for glob in options.only)]
    for line in missing:
        print(line)
    if not chosen:
        sys.exit(f"no network matches {' '.join(options.only)}; there are {', '.join(names[:8])} …")
    print(machine(), HEADER + ("   peer  left" if peer else ""), sep="\n", flush=True)
    rows = []
    for name in chosen:
        rows.append(measure(name, peer=peer, seconds=options.limit, memory=options.memory))
        print(line_of(rows[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(record(rows), indent=1), encoding="utf-8")
    print("", *summary(rows), "", *verdicts(rows), sep="\n")
    return 0 if all(row.passed for row in rows) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="networks to run: 'timm/*'")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows to a file, after each network")
    parser.add_argument("--peer", choices=["torch-pruning"], help="run another tool beside")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="for each network and tool (300)")
    parser.add_argument("--memory", type=float, default=16, metavar="GIB", help="address space of a process (16)")
    return parser.parse_args()


def machine() -> str:
    """Say what the run was made on."""
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    )


def measure(name: str, *, peer: bool, seconds: float, memory: float) -> Row:
    """Check one network in a process of its own, and the peer in another."""
    row = run(name, check.main, seconds, memory)
    if peer:
        other = run(name, check.check_peer, seconds, memory)
        row.peer_seconds, row.peer_params = other.peer_seconds, other.peer_params
        row.peer_failure = other.peer_failure if other.peer_failure is not None else other.failures.get("process")
    return row


def run(name: str, task: Task, seconds: float, memory: float) -> Row:
    """Run a task of `check.py` and return the row it wrote, with a word on how the process ended if it ended badly."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        # A fork of this process, which has imported all libraries: a fresh one would import them for each network.
        process = multiprocessing.get_context("fork").Process(target=limited, args=(task, name, file, memory))
        started = time.perf_counter()
        process.start()
        process.join(seconds)
        ended = ""
        if process.is_alive():
            process.kill()
            process.join()
            ended = f"stopped at the limit of {seconds:.0f} s"
        elif process.exitcode < 0:
            ended = f"killed by {signal.Signals(-process.exitcode).name}"
        elif process.exitcode:
            ended = f"exit {process.exitcode}"
        row = read(name, file)
    if ended:
        took = time.perf_counter() - started
        row.failures["process"] = f"{ended} in step {row.step!r} after {took:.0f} s"
    return row


def limited(task: Task, name: str, file: Path, memory: float) -> None:
    """Run a task in this process, with a limit on its memory and without a word on the terminal."""
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    tempfile.tempdir = str(file.parent)  # so that what a killed process leaves is removed
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())
    task(name, file)


def read(name: str, file: Path) -> Row:
    try:
        return Row(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return Row(name)


def line_of(row: Row) -> str:
    """Write a row as a line, and why it fails as another."""
    checks = zip("fbsil", (row.forward, row.backward, row.shapes, row.interface, row.saved), strict=True)
    runs = "".join(letter if right else "-" for letter, right in checks) + replaced(row.graphs)
    error = "-" if row.permutation is None else f"{row.permutation:.0e}" + ("" if row.alone else "g")
    axes = "-" if row.axes is None else f"{row.prunable}/{row.axes}"
    line = (
        f"{row.name:42} {row.kind or '-':11} {number(row.params and row.params / 1e6, '.2f'):>7} {axes:>9} {error:>8} "
        f"{number(row.prunable_macs, '.2f'):>5} {number(row.prunable_params, '.2f'):>7} "
        f"{number(row.macs_kept, '.2f'):>5} {runs:7} "
        f"{number(row.trace_seconds, '.1f'):>6} {number(row.seconds, '.1f'):>6}"
    )
    if row.peer_failure is not None:
        line += (
            f" {'FAIL' if row.peer_failure else number(row.peer_seconds, '.1f'):>6} {number(row.peer_params, '.2f'):>5}"
        )
    notes = [f"unknown: {name} x{count}" for name, count in row.unknown.items()]
    if row.macs and row.graph_macs is not None and abs(row.graph_macs / row.macs - 1) > 0.01:
        notes.append(f"counts differ: {row.graph_macs} MACs by the graph, {row.macs} as it runs")
    notes += [f"FAIL {reason}" for reason in row.reasons]
    if row.peer_failure:
        notes.append(f"peer: {row.peer_failure}")
    return "\n    ".join([line, *notes])


def replaced(graphs: Sequence[str] | None) -> str:
    """Write how many modules were replaced by their graphs; g if it is the whole model."""
    return "" if not graphs else "g" if "" in graphs else str(len(graphs))


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def summary(rows: Sequence[Row]) -> list[str]:
    """Say for each source how many pass, and the medians of what was measured."""
    lines = [f"{'source':12} {'passed':>9} {'error':>9} {'macs':>6} {'weights':>7} {'left':>6} {'all s':>6}"]
    for source in dict.fromkeys(row.source for row in rows):
        mine = [row for row in rows if row.source == source]
        passed = f"{sum(row.passed for row in mine)}/{len(mine)}"
        line = (
            f"{source:12} {passed:>9} {middle((row.permutation for row in mine), '.1e'):>9} "
            f"{middle((row.prunable_macs for row in mine), '.2f'):>6} "
            f"{middle((row.prunable_params for row in mine), '.2f'):>7} "
            f"{middle((row.macs_kept for row in mine), '.2f'):>6} {middle((row.seconds for row in mine), '.1f'):>6}"
        )
        compared = [row for row in mine if row.peer_failure is not None]
        if compared:
            line += f"   peer {sum(not row.peer_failure for row in compared)}/{len(compared)}"
            line += f", median {middle((row.peer_seconds for row in compared if not row.peer_failure), '.1f')} s"
        lines.append(line)
    return lines


def middle(values: Iterable[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(median(known), form) if known else "-"


@dataclass(frozen=True)
class Bar:
    """Something to reach.

    Args:
        text: What.
        which: The rows it is about.
        found: The figure that those rows give.
        met: Whether the figure is good enough.
        form: How to write the figure.
    """

    text: str
    which: Callable[[Row], bool]
    found: Callable[[list[Row]], float]
    met: Callable[[float], bool]
    form: str


def share(rows: list[Row]) -> float:
    return sum(row.passed for row in rows) / len(rows)


def largest_error(rows: list[Row]) -> float:
    return max((math.inf if math.isnan(row.permutation) else row.permutation for row in rows), default=math.nan)


def slowest(rows: list[Row]) -> float:
    return max(row.seconds for row in rows)


def median_macs(rows: list[Row]) -> float:
    return median(row.prunable_macs for row in rows)


BARS = (
    Bar("torchvision: all pass", lambda r: r.source == "torchvision", share, lambda x: x == 1, ".1%"),
    Bar("timm: 95 % of modules pass", lambda r: r.source == "timm", share, lambda x: x >= 0.95, ".1%"),
    Bar("all others: all pass", lambda r: r.source not in ("torchvision", "timm"), share, lambda x: x == 1, ".1%"),
    Bar(
        "permutation error at most 1e-9", lambda r: r.permutation is not None, largest_error,
        lambda x: x <= LARGEST_ERROR, ".1e",
    ),
    Bar(
        "CNNs: median prunable share of MACs at least 0.95", lambda r: r.kind == "cnn", median_macs,
        lambda x: x >= 0.95, ".2f",
    ),
    Bar(
        "transformers: median prunable share of MACs at least 0.90", lambda r: r.kind == "transformer", median_macs,
        lambda x: x >= 0.9, ".2f",
    ),
    Bar(
        "up to 100 M parameters: at most 10 s", lambda r: r.seconds is not None and r.params <= 1e8, slowest,
        lambda x: x <= 10, ".1f",
    ),
    Bar("ResNet-50: at most 2 s", lambda r: r.name == "torchvision/resnet50", slowest, lambda x: x <= 2, ".1f"),
    Bar("DenseNet-201: at most 6 s", lambda r: r.name == "torchvision/densenet201", slowest, lambda x: x <= 6, ".1f"),
)  # fmt: skip


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Say of each bar whether it is met; nothing of bars whose networks did not run."""
    lines = []
    for bar in BARS:
        mine = [row for row in rows if bar.which(row)]
        known = [row for row in mine if row.seconds is not None] if bar.found is slowest else mine
        if known:
            found = bar.found(known)
            lines.append(f"{'met   ' if bar.met(found) else 'missed'} {bar.text}: {format(found, bar.form)}")
    return lines


def record(rows: Sequence[Row]) -> dict[str, object]:
    """Return all that was found out, as JSON-ready data."""
    return {
        "machine": machine(),
        "columns": [each.name for each in fields(Row)],
        "rows": [{**asdict(row), "passed": row.passed, "reasons": row.reasons} for row in rows],
        "summary": summary(rows),
        "bars": verdicts(rows),
    }


if __name__ == "__main__":
    sys.exit(main())
