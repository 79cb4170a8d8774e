"""Are budgets hit? Random pairs of a network and a budget, and targets of measured latency; all networks really cut.

Usage: python benchmarks/budgets.py [--pairs 200] [--only 'small/*' 'stress/*'] [--latency 0.8 0.7]
[--models '*'] [--clock wall|cpu] [--seed 0] [--json FILE]

Pairs: each draws a network (``zoo/*`` are some of those that ship with slivo), what the budget is in (params, macs or
bytes), a share from 0.15 to 0.95, scope, criterion, round_to and min_width. What is left is counted in the cut network
by `slivo.measure.cost`. A miss is what is left of the budget, as a share of it; a step is the least that giving back
one position (or multiple) of an axis that was cut would add.

Latency: the share of the time that is left is measured anew, in turns with the uncut network, after `slivo.prune` has
returned. ``--clock cpu`` times the processor instead of the wall clock, on which other work on the machine does not
count; it is the same on a machine that has nothing else to do and with one thread (set OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import networks
import slivo
from cifar import ResNet56
from coverage import machine
from slivo.errors import SlivoError, TargetError
from slivo.graph import Graph
from slivo.graph.capture import trying
from slivo.measure import Timer, clock, cost
from slivo.measure.latency import compare
from slivo.prune import cut, plan
from slivo.zoo import mlp, small_cnn

TARGETS = ("params", "macs", "bytes")
Record = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200, help="of a network and a budget; 0 for latency alone")
    parser.add_argument("--only", nargs="+", default=["small/*", "stress/*"], metavar="GLOB", help="which networks")
    parser.add_argument(
        "--latency", nargs="*", type=float, default=[0.8, 0.7], metavar="SHARE", help="none to leave out"
    )
    parser.add_argument("--models", nargs="+", default=["*"], metavar="GLOB", help="of those whose latency is cut")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(machine())
    pairs = list(drawn(options.pairs, options.only, options.seed)) if options.pairs else []
    if pairs:
        print("\n".join(counted_table(pairs)), flush=True)
    timed = []
    if options.latency:
        print(f"\n| network | target | measured | of the target | uncut, ms | cut, ms | seconds |\n{'|---' * 7}|")
        for row in latencies(options.latency, options.models, options.clock):
            timed.append(row)
            print(timed_line(row), flush=True)
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        found = {"machine": machine(), "settings": settings, "pairs": pairs, "latency": timed}
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


def drawn(count: int, globs: Sequence[str], seed: int) -> Iterator[Record]:
    """Draw pairs, the same for each seed, and yield a row for each."""
    names = [*networks.names()[0], *ZOO]
    chosen = [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]
    generator = np.random.default_rng(seed)
    drawn = sorted(str(generator.choice(chosen)) for _ in range(count))
    known: dict[str, tuple[nn.Module, Any, Graph | SlivoError]] = {}
    for number, name in enumerate(drawn):
        if name not in known:
            known = {name: traced(name)}
        options = {
            "scope": str(generator.choice(["global", "uniform", "isomorphic"])),
            "criterion": str(generator.choice(["l1", "l2", "lamp", "fpgm", "random"])),
            "round_to": int(generator.choice([1, 1, 2, 4, 8])),
            "min_width": [0.1, 0.25, 1][generator.integers(3)],
        }
        what, share = TARGETS[number % 3], float(generator.uniform(0.15, 0.95))
        yield {"network": name, "what": what, "share": share, **options, **pair(*known[name], what, share, options)}


ZOO: Mapping[str, Callable[[], tuple[nn.Module, Any]]] = {
    "zoo/small-cnn-16": lambda: (small_cnn(width=16), torch.randn(2, 1, 8, 8)),
    "zoo/small-cnn-64": lambda: (small_cnn(width=64), torch.randn(2, 1, 8, 8)),
    "zoo/mlp": lambda: (mlp(64, 200, 100, 10), torch.randn(2, 64)),
    "zoo/resnet56": lambda: (ResNet56(), torch.randn(2, 3, 32, 32)),
}


def traced(name: str) -> tuple[nn.Module, Any, Graph | SlivoError]:
    torch.manual_seed(0)
    model, inputs = ZOO[name]() if name in ZOO else networks.make(name)
    try:
        return model.eval(), inputs, slivo.trace(model, inputs)
    except SlivoError as error:
        return model, inputs, error


def pair(model: nn.Module, inputs: Any, graph: Graph | SlivoError, what: str, share: float, options: Record) -> Record:
    """Cut a network to a budget, and count what is left."""
    if isinstance(graph, SlivoError):
        return {"failure": str(graph)}
    keep = slivo.Budget(**{what: share})
    try:
        found = plan(model, inputs, keep=keep, graph=graph, **options)
        small = cut(model, inputs, found, graph=graph)
    except TargetError as error:
        return {"unmet": str(error)}
    except SlivoError as error:
        return {"failure": str(error)}
    limit = int(share * costs(model, inputs)[what])
    left = costs(small, inputs)[what]
    steps = sorted(after - counts(graph, found.cuts)[what] for after in grown(graph, found.cuts, options, what))
    return {"limit": limit, "left": left, "miss": (limit - left) / limit, "step": steps[0] if steps else None}


def costs(model: nn.Module, inputs: Any) -> dict[str, int]:
    found = cost(model, inputs)
    return {"macs": found.macs, "params": found.params, "bytes": found.size_bytes}


def counts(graph: Graph, kept: Mapping[str, Sequence[int]]) -> dict[str, int]:
    sizes = {name: len(each) for name, each in kept.items()}
    macs, params = graph.count(sizes)
    return {"macs": macs, "params": params, "bytes": graph.count_bytes(sizes)}


def grown(graph: Graph, kept: Mapping[str, Sequence[int]], options: Record, what: str) -> Iterator[int]:
    """Yield what would be left if one step were given back, for each axis that is cut."""
    for name in kept:
        tied = frozenset([name])
        for _ in graph.ties:
            tied = tied.union(*(tie for tie in graph.ties if tie & tied))
        multiple = lcm(options["round_to"], *(graph[each].multiple for each in tied))
        larger = min(graph[name].size, (len(kept[name]) // multiple + 1) * multiple)
        yield counts(graph, {**kept, **{each: range(larger) for each in tied}})[what]


def counted_table(rows: Sequence[Record]) -> list[str]:
    """Write a line for each thing that budgets are in."""
    lines = [
        "| budget in | pairs | cannot be met | above the budget | within 1 % | where a step is ≤ 1 % | miss: median "
        "| 95th percentile | largest | largest in steps |",
        "|---" * 10 + "|",
    ]
    for what in (*TARGETS, "all"):
        mine = [row for row in rows if what in (row["what"], "all")]
        met = [row for row in mine if "left" in row]
        fine = [row for row in met if row["step"] is not None and row["step"] <= 0.01 * row["limit"]]
        misses = [row["miss"] for row in met]
        in_steps = [(row["limit"] - row["left"]) / row["step"] for row in met if row["step"]]
        lines.append(
            f"| {what} | {len(mine)} | {sum('unmet' in row for row in mine)} "
            f"| {sum(row['left'] > row['limit'] for row in met)} "
            f"| {within(met)} of {len(met)} | {within(fine)} of {len(fine)} "
            f"| {np.median(misses):.2%} | {np.percentile(misses, 95):.2%} | {max(misses):.2%} | {max(in_steps):.2f} |"
        )
    failures = {f"- {row['network']}: {row['failure']}" for row in rows if "failure" in row}
    return [*lines, *sorted(failures)]


def within(rows: Sequence[Record]) -> int:
    return sum(row["miss"] <= 0.01 for row in rows)


class Encoder(nn.Module):
    """A small transformer, for sequences of vectors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, norm_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify sequences, shape (batch, length, 128)."""
        return self.head(self.layers(x).mean(1))


MODELS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "small_cnn(width=64), batch 16": (lambda: small_cnn(width=64), (16, 1, 8, 8)),
    "ResNet-56, batch 4": (ResNet56, (4, 3, 32, 32)),
    "transformer of 4 layers of width 128, batch 4": (Encoder, (4, 64, 128)),
}


def latencies(shares: Sequence[float], globs: Sequence[str], kind: str) -> Iterator[Record]:
    """Cut each model to each share of its latency, and measure what came of it."""
    for name in (name for name in MODELS if any(fnmatchcase(name, glob) for glob in globs)):
        make, shape = MODELS[name]
        torch.manual_seed(0)
        model, x = make().eval(), torch.randn(shape)
        timer = clock(x) if kind == "wall" else processor(x)
        for share in shares:
            start = time.process_time()
            row: Record = {"network": name, "target": share}
            try:
                small = slivo.prune(model, x, keep=slivo.Budget(latency=share), timer=timer)
            except TargetError as error:
                yield {**row, "unmet": str(error)}
                continue
            row["seconds"] = time.process_time() - start
            again = compare(timer, model, small)
            yield {**row, "measured": again.share, "ms": again.ms, "dense_ms": again.ms / again.share}


def processor(x: torch.Tensor) -> Timer:
    """Time the processor, not the wall clock: the median of calls, as many as fit into 60 ms."""

    def timer(model: nn.Module) -> float:
        times = []
        with trying(model), torch.inference_mode():
            model(x)
            while len(times) < 3 or (sum(times) < 60 and len(times) < 100):
                start = time.process_time_ns()
                model(x)
                times.append((time.process_time_ns() - start) / 1e6)
        return float(np.median(times))

    return timer


def timed_line(row: Record) -> str:
    if "unmet" in row:
        return f"| {row['network']} | {row['target']:.0%} | {row['unmet']} | | | | |"
    return (
        f"| {row['network']} | {row['target']:.0%} | {row['measured']:.1%} | {row['measured'] / row['target']:.1%} "
        f"| {row['dense_ms']:.2f} | {row['ms']:.2f} | {row['seconds']:.0f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
