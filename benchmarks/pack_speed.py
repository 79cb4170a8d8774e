"""How fast packed tensors are read, and how small they are, for each kind of tensor that compression leaves.

Each tensor is packed into a file of its own, alone; then it is read from there, with all checks, again and again, on
one core. For example::

    python benchmarks/pack_speed.py --json pack.json

Speeds are bytes of the tensor in memory by seconds of processor time (``--clock wall`` for those of the wall), so that
other work on the machine counts for little. The column *bound* is the entropy of positions and values, each drawn
independently: what no code of single symbols goes below. *Huffman alone* is what the file would have without ANS,
*zip* what zlib's best makes of the tensor as it is in memory. A second table has the two entropy coders by themselves.
Exits with 1 if a large tensor is read at less than 200 MB/s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coverage import machine
from slivo.artifact import PackedFile, choice
from slivo.artifact.codecs import Plan, coded, put_together, take_apart
from slivo.artifact.container import write_packed
from slivo.artifact.streams import decode, encode

BAR = 200
MANIFEST = {"format": 1, "factory": None, "args": {}, "edits": [], "tied": {}, "meta": {}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the tensors")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    parser.add_argument("--plans", action="store_true", help="show what the other codecs would have given, too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    now = time.process_time if options.clock == "cpu" else time.perf_counter
    print(machine())
    heads = (
        "tensor", "codec", "bits each", "bound", "Huffman alone", "zip", "smaller", "read, MB/s", "slowest",
        "written, MB/s",
    )  # fmt: skip
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    rows = []
    for name, tensor in tensors(options.size).items():
        row = measured(name, tensor, options.repeats, now)
        rows.append(row)
        print(
            f"| {name} | {row['codec']} | {row['bits']:.3f} | {row['bound_bits']:.3f} "
            f"| {row['huffman_bits']:.3f} | {row['zip_bits']:.3f} | {row['ratio']:.1f}× "
            f"| {row['read']:.0f} | {row['slowest']:.0f} | {row['written']:.0f} |",
            flush=True,
        )
        if options.plans:
            compared(tensor, now)
    coders = [coder(ans, options.size**2, options.repeats, now) for ans in (True, False)]
    print("\n| coder, 32 symbols | bytes to the entropy | decoded, million symbols a second |\n|---|---|---|")
    for each in coders:
        print(f"| {each['coding']} | {each['excess']:.4f} | {each['speed']:.0f} |")
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        found = {"machine": machine(), "settings": settings, "rows": rows, "coders": coders}
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    missed = [row["tensor"] for row in rows if row["read"] < BAR and row["dense_bytes"] > 2**20]
    if missed:
        print(f"missed: {', '.join(missed)}")
    return 1 if missed else 0


def tensors(size: int) -> dict[str, Tensor]:
    """Return square tensors of each kind."""
    draw = torch.Generator().manual_seed(0)
    dense = torch.randn(size, size, generator=draw)
    share = torch.rand(size, size, generator=draw)
    groups = dense.view(-1, 4)
    best = torch.zeros_like(groups, dtype=torch.bool).scatter(1, groups.abs().topk(2).indices, True).view(size, size)
    # Centroids at even distances on a normal distribution, as k-means with linear centroids leaves them.
    shared = torch.randn(32, generator=draw).sort().values[(dense * 5 + 16).round().clamp(0, 31).long()]
    zero = torch.zeros(())
    found = {
        "random, float32": dense,
        "random, bfloat16": dense.bfloat16(),
        "90 % zeros": dense.where(share < 0.1, zero),
        "50 % zeros": dense.where(share < 0.5, zero),
        "2:4": dense.where(best, zero),
        "32 values": shared,
        "32 values, 92 % zeros": shared.where(share < 0.08, zero),
        "32 values, 2:4": shared.where(best, zero),
        "1000 values": (dense * 125).round().clamp(-499, 500) / 125,
        "int8 codes": (dense * 40).round().clamp(-127, 127).to(torch.int8),
        "4-bit codes in int8": (dense * 3).round().clamp(-7, 7).to(torch.int8),
    }
    for rows, columns, kept in ((300, 784, 0.08), (500, 800, 0.02)):
        if rows * columns <= size * size:
            layer = shared.where(share < kept, zero).view(-1)[: rows * columns].view(rows, columns)
            found[f"{rows}×{columns}, 32 values, {1 - kept:.0%} zeros"] = layer
    return found


def measured(name: str, tensor: Tensor, repeats: int, now: Callable[[], float]) -> dict[str, Any]:
    """Write and read a tensor; return sizes and speeds."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "one.slivo"
        started = now()
        write_packed(file, MANIFEST, [("x", tensor)])
        written = now() - started
        seconds = []
        for _ in range(repeats):
            started = now()
            with PackedFile(file) as opened:
                found = opened.tensor("x")
            seconds.append(now() - started)
        with PackedFile(file) as opened:
            streams = opened._streams(opened.packed.tensors[0])
        assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))
        packed = opened.packed
    huffman = packed.header_bytes + sum(
        len(encode(decode(each, 1), ans=False).data) if each.coding == "ans" else len(each.data) for each in streams
    )
    speeds = [tensor.nbytes / each / 1e6 for each in seconds]
    return {
        "tensor": name,
        "codec": packed.tensors[0].codec,
        "codings": [coding for coding, _, _ in packed.tensors[0].streams],
        "dense_bytes": tensor.nbytes,
        "bytes": packed.bytes,
        "bits": packed.bits,
        "bound_bits": bound(tensor),
        "zip_bits": 8 * len(zlib.compress(tensor.view(torch.uint8).numpy(), 9)) / tensor.numel(),
        "huffman_bits": 8 * huffman / tensor.numel(),
        "ratio": packed.ratio,
        "read": statistics.median(speeds),
        "slowest": min(speeds),
        "written": tensor.nbytes / written / 1e6,
    }


def bound(tensor: Tensor) -> float:
    """Return the entropy of an entry in bits: whether it is zero, and which value it is otherwise.

    Zeros of 2:4 are counted by their groups. Where nearly all values differ, each takes all bits of its fraction and
    sign, and the entropy of its exponent.
    """
    words = tensor.view(torch.uint8).numpy().reshape(-1, tensor.itemsize).view(f"u{tensor.itemsize}").reshape(-1)
    filled = words != 0
    values = words[filled]
    share = len(values) / len(words)
    positions = entropy(filled)
    if len(words) % 4 == 0 and (filled.reshape(-1, 4).sum(1) <= 2).all():
        positions = entropy(np.packbits(filled.reshape(-1, 4), axis=1)) / 4
    if len(np.unique(values)) > len(values) / 2 or tensor.dtype == torch.bfloat16:
        fraction = {torch.float32: 23, torch.bfloat16: 7}[tensor.dtype]
        exponents = values >> fraction & 255
        return positions + share * (fraction + 1 + entropy(exponents))
    return min(positions + share * entropy(values), entropy(words))


def entropy(symbols: np.ndarray) -> float:
    counts = np.unique(symbols, return_counts=True)[1]
    return float((counts / len(symbols) * np.log2(len(symbols) / counts)).sum())


def coder(ans: bool, count: int, repeats: int, now: Callable[[], float]) -> dict[str, Any]:
    """Code symbols of a normal distribution; return how near the entropy that is, and how fast they are decoded."""
    random = np.random.default_rng(0)
    symbols = (random.normal(size=count) * 5 + 16).round().clip(0, 31).astype("u1")
    stream = encode(symbols, ans=ans)
    speeds = []
    for _ in range(repeats):
        started = now()
        decode(stream, 1)
        speeds.append(count / (now() - started) / 1e6)
    excess = 8 * len(stream.data) / count / entropy(symbols)
    return {"coding": stream.coding, "excess": excess, "speed": statistics.median(speeds)}


def compared(tensor: Tensor, now: Callable[[], float]) -> None:
    """Print what each way of positions and values gives, and how fast it is put together."""
    words = tensor.view(torch.uint8).numpy().reshape(-1, tensor.itemsize).view(f"u{tensor.itemsize}").reshape(-1)
    floating, shape = tensor.is_floating_point(), tuple(tensor.shape)
    seen = set()
    for _, plan in sorted(choice.plans(words, shape, floating=floating), key=lambda each: each[0]):
        if (plan.positions, plan.values) in seen:
            continue
        seen.add((plan.positions, plan.values))
        streams = coded(take_apart(words, shape, plan, floating=floating), words.nbytes)
        started = now()
        put_together(streams, shape, plan, width=tensor.itemsize, floating=floating)
        speed = words.nbytes / (now() - started) / 1e6
        size = 8 * sum(len(each.data) for each in streams) / len(words)
        kinds = ", ".join(each.coding for each in streams)
        print(
            f"  {plan.name if plan != Plan() else 'dense'}: {size:.3f} bits, {speed:.0f} MB/s without checks ({kinds})"
        )


if __name__ == "__main__":
    sys.exit(main())
