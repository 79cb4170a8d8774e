"""Write the documentation's page of what was measured, from files that `coverage.py --json` wrote.

For example::

    python benchmarks/page.py torchvision.json timm.json rest.json > docs/networks.md

Of networks that are in several files, the last row counts: those that ran out of time can be run again with more.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from coverage import middle, number, verdicts
from row import Row

TEXT = """# Which networks

Whether a network can be pruned is measured, not promised. `benchmarks/coverage.py` takes every classification,
segmentation, detection and video network of torchvision, the smallest member of each module of timm, the architectures
of transformers, Keras models on PyTorch, and small networks that were made to be difficult. Each is used as it comes,
with random weights and without a word of configuration: its axes are found, half of its MACs are pruned, and the result
is checked. All of this has to be right:

- The network is captured, and permuting **each** prunable axis in all of its members changes the outputs, in float64,
  by 1e-9 at most.
- No more than 51 % of the MACs are left, counted by operator in the pruned network.
- It runs, gives out what it gave out before in shape and type, and trains: every parameter that had a gradient has one.
- Modules hold the sizes that their weights have.
- Saved and loaded, it is the same bit by bit.

```text
python benchmarks/coverage.py --only 'torchvision/*' --json torchvision.json
```

## Results

"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--note", default="", help="what else to say of the measurement")
    options = parser.parse_args()
    found: dict[str, Row] = {}
    machines = []
    for file in options.files:
        data = json.loads(file.read_text(encoding="utf-8"))
        machines.append(data["machine"])
        for each in data["rows"]:
            found[each["name"]] = Row(**{key: value for key, value in each.items() if key not in ("passed", "reasons")})
    rows = list(found.values())
    print(TEXT + "\n".join([*table(rows), "", *notes(rows, machines[0], options.note)]))
    return 0


def table(rows: Sequence[Row]) -> list[str]:
    """Write a line for each source."""
    lines = [
        "| source | pass | largest permutation error | MACs in reach, median | seconds, median | Torch-Pruning |",
        "|---|---|---|---|---|---|",
    ]
    for source in dict.fromkeys(row.source for row in rows):
        mine = [row for row in rows if row.source == source]
        compared = [row for row in mine if row.peer_failure is not None]
        peer = f"{sum(not row.peer_failure for row in compared)} of {len(compared)}" if compared else "not run"
        worst = max((row.permutation for row in mine if row.permutation is not None), default=None)
        lines.append(
            f"| {source} | {sum(row.passed for row in mine)} of {len(mine)} | {number(worst, '.0e')} "
            f"| {middle((row.prunable_macs for row in mine), '.0%')} "
            f"| {middle((row.seconds for row in mine), '.1f')} | {peer} |"
        )
    return lines


def notes(rows: Sequence[Row], machine: str, note: str) -> list[str]:
    """Write what the table leaves out."""
    return [
        f"Measured on {machine}; seconds are those of one processor, to trace, plan and cut, the checks of\n"
        "`slivo.prune` by running included. The last column is Torch-Pruning 1.6 in the same run, all widths by half;\n"
        "it passes if the result runs forward and backward and is smaller.",
        *([note] if note else []),
        "",
        *[f"- {line}" for line in verdicts(rows)],
        "",
        "## What does not pass",
        "",
        *(listed(rows, lambda row: not row.passed, lambda row: "; ".join(row.reasons)) or ["Nothing."]),
        "",
        "## What runs as a graph",
        "",
        "Where the code of a module holds sizes that cannot be mended (a width of attention that is taken from the\n"
        "width of its input), its captured graph takes the module's place.",
        "",
        *(listed(rows, lambda row: bool(row.graphs), lambda row: kinds(row.graphs or [])) or ["Nothing."]),
        "",
        "## What takes longest",
        "",
        *listed(
            sorted((row for row in rows if row.seconds is not None), key=lambda row: -(row.seconds or 0))[:10],
            lambda _: True,
            lambda row: f"{row.seconds:.1f} s, {(row.params or 0) / 1e6:.0f} M parameters",
        ),
    ]


def listed(rows: Sequence[Row], which: Callable[[Row], bool], what: Callable[[Row], str]) -> list[str]:
    return [f"- `{row.name}`: {what(row)}" for row in rows if which(row)]


def kinds(graphs: Sequence[str]) -> str:
    """Name replaced modules by the last part of their names that is no number."""
    if "" in graphs:
        return "the whole network"
    names = sorted({next(part for part in reversed(name.split(".")) if not part.isdigit()) for name in graphs})
    return f"{len(graphs)} modules, {', '.join(f'`{name}`' for name in names)}"


if __name__ == "__main__":
    sys.exit(main())
