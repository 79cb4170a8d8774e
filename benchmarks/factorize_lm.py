"""What does low rank cost a language model? Perplexity at half the weights, by weights alone and by what layers read.

Usage: python benchmarks/factorize_lm.py --data DIR [--text tinyshakespeare.txt] [--seeds 0 1 2] [--json FILE]

Trains small Llama-shaped models on the bytes of ``DIR/TEXT``, one for each seed, and factorizes the linear layers of
their blocks to a share of their parameters: by the singular values of the weights alone and by activations, with ranks
chosen by what layers lose themselves, by how the model's outputs move, and with the same share for every layer. It
prints perplexities per byte on text that was not trained on. It needs transformers.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

import slivo
from sparse_lm import llama, perplexity, train, windows

HEAD = "lm_head"


def ways(
    model: nn.Module, batches: list[Any], share: float, dampings: list[float]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the ways to factorize, each to the same number of parameters, with the options that say it."""
    layers = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and name != HEAD}
    whole = sum(each.weight.numel() for each in layers.values())
    keep = slivo.Budget(params=sum(each.numel() for each in model.parameters()) - whole + int(share * whole))
    even = {name: int(share * each.weight.numel() / sum(each.weight.shape)) for name, each in layers.items()}
    yield "weights, even ranks", {"ranks": even}
    yield "activations, even ranks", {"ranks": even, "batches": batches}
    yield "weights, global", {"keep": keep}
    for damping in dampings:
        yield f"activations, global, damping {damping:g}", {"keep": keep, "batches": batches, "damping": damping}
    yield "activations, sensitivity", {"keep": keep, "batches": batches, "by": "sensitivity"}


def rows(
    model: nn.Module, calibration: Tensor, held: Tensor, share: float, dampings: list[float]
) -> Iterator[dict[str, Any]]:
    """Factorize in each way, and judge."""
    call, batches = {"input_ids": calibration[:2]}, [{"input_ids": part} for part in calibration.split(8)]
    whole = sum(each.numel() for each in model.parameters())
    for way, options in ways(model, batches, share, dampings):
        start = time.perf_counter()
        small = slivo.factorize(model, call, exclude=HEAD, **options)
        seconds = time.perf_counter() - start
        params = sum(each.numel() for each in small.parameters()) / whole
        yield {"way": way, "params": params, "perplexity": perplexity(small, held), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text", default="tinyshakespeare.txt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--share", type=float, default=0.5, help="of the parameters of the blocks' linear layers that stays"
    )
    parser.add_argument("--dampings", type=float, nargs="+", default=[0.01])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="bytes of a sample")
    parser.add_argument("--samples", type=int, default=32, help="unlabelled samples of the training text")
    parser.add_argument("--held-out", type=int, default=128, help="samples to judge by")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    start = time.perf_counter()
    text = torch.frombuffer(bytearray((options.data / options.text).read_bytes()), dtype=torch.uint8).long()
    first = len(text) * 9 // 10
    held = windows(text[first:], options.length)[: options.held_out]
    seen = windows(text[:first], options.length)
    found: list[dict[str, Any]] = []
    for seed in options.seeds:
        torch.manual_seed(seed)
        model = llama(options.width, options.layers)
        train(model, text[:first], options.steps, options.length, options.batch)
        order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed))
        dense = perplexity(model, held)
        print(f"seed {seed}, dense: perplexity {dense:.4f}; {time.perf_counter() - start:.0f} s", flush=True)
        for row in rows(model, seen[order[: options.samples]], held, options.share, options.dampings):
            found.append({"seed": seed, "dense": dense, **row})
            told = "{way:<40} {params:.2%} of the parameters, perplexity {perplexity:.4f}, {seconds:.1f} s"
            print(told.format(**row), flush=True)
    summary = {
        way: mean(row["perplexity"] / row["dense"] for row in found if row["way"] == way)
        for way in dict.fromkeys(row["way"] for row in found)
    }
    print("perplexity over that of the dense model, mean of the seeds")
    for way, ratio in summary.items():
        print(f"{way:<40} {ratio:.4f}")
    machine = f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
    seconds = time.perf_counter() - start
    print(f"{machine}; {seconds:.0f} s in all, {time.process_time():.0f} s of them on a processor")
    if options.json is not None:
        settings = {name: str(value) for name, value in vars(options).items()}
        made = {"rows": found, "over dense": summary, "settings": settings, "machine": machine, "seconds": seconds}
        options.json.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
