"""Damage packed files in every way there is, and see that reading one gives an error or the right tensors.

Files that together use every codec and coding are mutated: bits flipped, ends cut off, parts overwritten, moved, put in
or taken out, the header's text and values changed. Of many, the header is sealed again, so that what is behind its
checksum is reached. Reading may end in an `ArtifactError` or in tensors that are the original ones bit by bit; not in
other tensors, another exception, more than five seconds, or more than a gigabyte of memory. For example::

    python benchmarks/fuzz_pack.py --count 100000

Exits with 1 if anything else happened, and leaves the first such files in ``--keep``.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slivo import ArtifactError
from slivo.artifact import PackedFile
from slivo.artifact.container import PRELUDE, _digest, write_packed
from slivo.artifact.streams import CODINGS, expand, squeeze

MANIFEST = {"format": 1, "factory": None, "args": {}, "edits": [{"kind": "mask"}], "tied": {"b": "a"}, "meta": {}}
SECONDS, MEMORY = 5, 2**30

# What takes the place of a value in a header.
NASTY: list[Any] = [
    0, 1, -1, 2, 3, 4, 7, 8, 255, 256, 65535, 2**31 - 1, 2**31, 2**40, 2**59, 2**62, 2**63, 2**64, 10**30, 0.5, 1e300,
    True, None, "", "x", "\ud800", [], {}, [[]], [0], [2**40], [2**59, 2**59], {"a": 1}, *sorted(CODINGS), "all",
    "mask", "gaps", "groups", "words", "codebook", "float32", "int64", "bool", "bfloat16", "float16", "qint8",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files that are not read as they should be")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, limited():
        found, bad = fuzz(options.count, options.seed, Path(folder), lambda done: said(done, options.count, started))
    for number, (told, content) in enumerate(bad):
        print(f"bad: {told}")
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            (options.keep / f"{number}.slivo").write_bytes(content)
    print("| mutation | error | right | wrong | crash |\n|---|---|---|---|---|")
    for kind in dict.fromkeys(kind for kind, _ in found):
        print(f"| {kind} | {' | '.join(str(found[kind, end]) for end in ('error', 'right', 'wrong', 'crash'))} |")
    ends = {
        end: sum(n for (_, each), n in found.items() if each == end) for end in ("error", "right", "wrong", "crash")
    }
    print(f"{options.count} files in {time.perf_counter() - started:.0f} s: {ends}")
    if options.json:
        options.json.write_text(json.dumps({"count": options.count, "seed": options.seed, **ends}), encoding="utf-8")
    return 1 if ends["wrong"] or ends["crash"] else 0


def said(done: int, count: int, started: float) -> None:
    if done % 10_000 == 0:
        print(f"{done} of {count}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


@contextmanager
def limited() -> Iterator[None]:
    """Allow a gigabyte more memory than is in use, and let an alarm end what takes too long."""
    used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    old = signal.signal(signal.SIGALRM, _late)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, old)


def _late(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def fuzz(
    count: int, seed: int, folder: Path, each: Callable[[int], None] | None = None
) -> tuple[Counter[tuple[str, str]], list[tuple[str, bytes]]]:
    """Mutate and read so many files; return how often each mutation ended in what, and the files that ended badly."""
    draw = random.Random(seed)
    groups = samples()
    contents = []
    for tensors in groups:
        write_packed(folder / "whole.slivo", MANIFEST, tensors.items())
        contents.append((folder / "whole.slivo").read_bytes())
    found: Counter[tuple[str, str]] = Counter()
    bad: list[tuple[str, bytes]] = []
    for number in range(count):
        which = draw.randrange(len(contents))
        mutate = draw.choice(MUTATIONS)
        content = mutate(contents[which], draw.choice(contents), draw)
        end, told = read(content, groups[which], folder / "mutated.slivo")
        found[mutate.__name__, end] += 1
        if end in ("wrong", "crash") and len(bad) < 20:
            bad.append((f"{mutate.__name__}: {told}", content))
        if each is not None:
            each(number + 1)
    return found, bad


def read(content: bytes, tensors: dict[str, Tensor], file: Path) -> tuple[str, str]:
    """Read a file as a whole; return how that ended."""
    file.write_bytes(content)
    signal.alarm(SECONDS)
    try:
        with PackedFile(file) as packed:
            for name in packed:
                tensor = packed.tensor(name)
                if name not in tensors or not same(tensor, tensors[name]):
                    return "wrong", name
    except ArtifactError as error:
        return "error", str(error)
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return "crash", repr(error)
    finally:
        signal.alarm(0)
    return "right", ""


def same(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are the same bit by bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def samples() -> list[dict[str, Tensor]]:
    """Return groups of small tensors that together need every codec and every coding."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    def sparse(values: Tensor, density: float) -> Tensor:
        return torch.where(torch.rand(values.shape, generator=draw) < density, values, 0)

    shared = (normal(48, 40) * 3).round().clamp(-8, 8) / 8
    patterned = torch.zeros(128, 4).scatter(1, normal(128, 4).topk(2).indices, normal(128, 2)).view(16, 32)
    codes, order = (normal(16, 48) * 2).round().clamp(-7, 7).to(torch.int8), torch.arange(300)
    wide, third = (normal(4000) * 250).round() / 7, torch.randint(0, 3, (3000,), generator=draw)
    half, brain = normal(40).half(), normal(3, 5, 7).bfloat16()
    return [
        {"dense": normal(8, 32), "half": half, "brain": brain, "one": torch.tensor(3.5)},
        {"gaps": sparse(normal(24, 40), 0.1), "mask": sparse(normal(16, 30), 0.5), "groups": patterned},
        {"book": shared, "few": sparse(shared, 0.08), "flags": normal(300) > 0, "none": torch.zeros(3, 0, 2)},
        {"codes": codes, "order": order, "zeros": torch.zeros(4000)},
        {"wide": wide, "skewed": (normal(4000) > 1.7).byte(), "third": third},
        {"steps": (torch.arange(3000) // 100 % 3).byte(), "blocks": torch.arange(3000) // 50 % 2 > 0},
    ]


def flip(content: bytes, _: bytes, draw: random.Random) -> bytes:
    """Flip a few bits."""
    damaged = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def truncate(content: bytes, _: bytes, draw: random.Random) -> bytes:
    """Cut the end off, or add one."""
    if draw.random() < 0.2:
        return content + draw.randbytes(draw.randrange(1, 40))
    return content[: draw.randrange(len(content))]


def splice(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """Put a part of a file over, into or in place of a part."""
    start = draw.randrange(len(other))
    part = other[start : start + draw.randrange(1, 200)]
    at = draw.randrange(len(content))
    return content[:at] + part + content[at + draw.choice((0, len(part), draw.randrange(200))) :]


def payload(content: bytes, _: bytes, draw: random.Random) -> bytes:
    """Change bytes behind the header, which is whole."""
    start = PRELUDE.size + _parts(content)[0]
    damaged = bytearray(content)
    for _ in range(draw.choice((1, 1, 3, 20))):
        damaged[draw.randrange(start, len(damaged))] = draw.choice((0, 255, draw.randrange(256)))
    return bytes(damaged)


def text(content: bytes, _: bytes, draw: random.Random) -> bytes:
    """Change characters of the header, and seal it."""
    length, header = _parts(content)
    damaged = bytearray(header)
    for _ in range(draw.choice((1, 1, 2))):
        damaged[draw.randrange(len(damaged))] = draw.choice(b'0123456789,[]{}":-e.x\xff')
    return _sealed(content, length, bytes(damaged))


def value(content: bytes, _: bytes, draw: random.Random) -> bytes:
    """Change values of the header, seal it, and perhaps change the payload's length with it."""
    length, header = _parts(content)
    tree = json.loads(header)
    for _ in range(draw.choice((1, 1, 2, 4))):
        _change(tree, draw)
    return _sealed(content, length, json.dumps(tree).encode())


def shift(content: bytes, _: bytes, draw: random.Random) -> bytes:
    """Change what a tensor takes in the file, in header and payload alike, so that sizes add up."""
    length, header = _parts(content)
    tree = json.loads(header)
    streams = [stream for row in tree["tensors"] for stream in row[4]]
    at = PRELUDE.size + length
    chosen = draw.randrange(len(streams))
    start = at + sum(stream[2] for stream in streams[:chosen])
    old, new = streams[chosen][2], draw.choice((0, 1, 4, streams[chosen][2] + 1, max(0, streams[chosen][2] - 1)))
    streams[chosen][2] = new
    streams[chosen][0] = draw.choice((streams[chosen][0], *sorted(CODINGS)))
    data = (content[start : start + old] + draw.randbytes(4))[:new].ljust(new, b"\0")
    return _sealed(content[:start] + data + content[start + old :], length, json.dumps(tree).encode())


def raw_header(content: bytes, _: bytes, draw: random.Random) -> bytes:
    """Change bytes of the compressed header, and seal it."""
    length, _ = _parts(content)
    header = bytearray(content[PRELUDE.size : PRELUDE.size + length])
    header[draw.randrange(min(len(header), draw.choice((12, len(header)))))] ^= 1 << draw.randrange(8)
    return _assembled(content, length, bytes(header))


MUTATIONS = (flip, truncate, splice, payload, text, value, value, value, shift, shift, raw_header)


def _change(tree: Any, draw: random.Random) -> None:
    """Change one value somewhere in nested lists and objects; mostly in the table of tensors."""
    node = (
        tree["tensors"] if isinstance(tree.get("tensors"), list) and tree["tensors"] and draw.random() < 0.8 else tree
    )
    while True:
        key = draw.choice(sorted(node)) if isinstance(node, dict) else draw.randrange(len(node))
        inner = node[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.85:
            node = inner
            continue
        choice = draw.random()
        if choice < 0.1:
            del node[key]
        elif choice < 0.2 and isinstance(node, list):
            node.insert(key, inner)
        elif choice < 0.5 and isinstance(inner, int):
            node[key] = inner + draw.choice((-1, 1, 8, 100))
        else:
            node[key] = draw.choice(NASTY)
        return


def _parts(content: bytes) -> tuple[int, bytes]:
    length = PRELUDE.unpack_from(content)[-2]
    return length, expand(content[PRELUDE.size : PRELUDE.size + length], None)


def _sealed(content: bytes, length: int, header: bytes) -> bytes:
    return _assembled(content, length, squeeze(header))


def _assembled(content: bytes, length: int, header: bytes) -> bytes:
    fields = PRELUDE.unpack_from(content)
    prelude = PRELUDE.pack(*fields[:-2], len(header), b"")[:-8]
    return prelude + _digest(prelude, header) + header + content[PRELUDE.size + length :]


if __name__ == "__main__":
    sys.exit(main())
