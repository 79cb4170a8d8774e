"""What do few bits cost a language model? Perplexity of nearest codes, GPTQ and AWQ, next to a slow reference.

Usage: python benchmarks/quantize_lm.py --data DIR [--keep FILE] [--seeds 0 1 2] [--json FILE]

Takes the model of sparse_lm.py, rounds its weights by slivo and by a reference of GPTQ that is written here from the
paper's formulas (float64, a column at a time, the inverse of the Hessian computed anew for each), and prints
perplexities per byte on text that was not trained on, the divergence from the model in floating point, and bytes on
disk. Methods that look at samples are given others for each seed. It needs transformers.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slivo
from slivo.artifact import size_bytes
from sparse_lm import arguments, inputs_of, perplexity, prepare, sample

DAMPING = 0.01
SHARINGS: tuple[Any, ...] = ("channel", 64)


@torch.no_grad()
def divergence(model: nn.Module, dense: nn.Module, ids: Tensor) -> float:
    """Return the mean divergence of a model's distributions from those of another, in nats a byte."""
    total = 0.0
    for part in ids.split(32):
        ours, theirs = (each(input_ids=part, use_cache=False).logits.log_softmax(-1) for each in (model, dense))
        total += float(F.kl_div(ours, theirs, reduction="sum", log_target=True))
    return total / ids.numel()


def reach(values: Tensor, top: int) -> Tensor:
    """Return the step of each row whose multiples, up to so many, come nearest to its values."""
    most = values.abs().amax(1)
    trials = [(most * share / top).clamp(min=1e-12) for share in torch.linspace(0.2, 1, 81).tolist()]
    errors = [
        ((values / step[:, None]).round().clamp(-top, top) * step[:, None] - values).square().sum(1) for step in trials
    ]
    return torch.stack(trials).gather(0, torch.stack(errors).argmin(0)[None])[0]


def gptq(weight: Tensor, hessian: Tensor, bits: int, sharing: int | str) -> Tensor:
    """Round a matrix column by column, those of the largest diagonal first."""
    size, top = len(hessian), 2 ** (bits - 1) - 1
    group = sharing if isinstance(sharing, int) else size
    hessian = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    order = hessian.diagonal().argsort(descending=True).tolist()
    weight, left, steps = weight.clone(), list(order), {}
    while left:
        column = left[0]
        inverse = torch.linalg.inv(hessian[left][:, left])[0]
        if column // group not in steps:
            first = column // group * group
            steps[column // group] = reach(weight[:, first : first + group], top)
        step = steps[column // group]
        rounded = (weight[:, column] / step).round().clamp(-top, top) * step
        error = (weight[:, column] - rounded) / inverse[0]
        weight[:, left] -= error[:, None] * inverse
        weight[:, column] = rounded
        left = left[1:]
    return weight


@torch.no_grad()
def reference(model: nn.Module, calibration: Tensor, bits: int, sharing: int | str) -> nn.Module:
    """Round the layers of one block after the other, then the head; each reads what the rounded ones before it give."""
    new = deepcopy(model).double()
    for block in (*new.model.layers, new.lm_head):
        layers = [each for each in block.modules() if isinstance(each, nn.Linear)]
        for layer, hessian in zip(layers, inputs_of(new, layers, calibration), strict=True):
            layer.weight.copy_(gptq(layer.weight, hessian, bits, sharing))
    return new.float()


def disk(model: nn.Module) -> int:
    """Return the bytes of a model's artifact."""
    with tempfile.TemporaryDirectory() as folder:
        return size_bytes(slivo.save(model, Path(folder) / "model"))


def rows(model: nn.Module, seen: Tensor, held: Tensor, samples: int, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Round by each method, and judge."""

    def judged(method: str, new: nn.Module, seconds: float, **more: Any) -> dict[str, Any]:
        found = {"perplexity": perplexity(new, held), "divergence": divergence(new, model, held)}
        return {"method": method, **more, **found, "seconds": seconds}

    for bits in (4, 3):
        for sharing in SHARINGS:
            for seed in seeds:
                calibration = sample(seen, samples, seed)
                batches = [{"input_ids": part} for part in calibration.split(8)]
                ways: dict[str, dict[str, Any]] = {
                    "gptq": {"method": "gptq", "damping": DAMPING},
                    "awq": {"method": "awq"},
                }
                if seed == seeds[0]:
                    ways = {"round": {}, **ways}
                what = {"bits": bits, "sharing": sharing, "seed": seed}
                for name, way in ways.items():
                    start = time.perf_counter()
                    new = slivo.quantize(
                        model, "int4-weights", batches=batches, weight_bits=bits, group_size=sharing, **way
                    )
                    yield judged(name, new, time.perf_counter() - start, bytes=disk(new), **what)
                start = time.perf_counter()
                slow = reference(model, calibration, bits, sharing)
                yield judged("reference", slow, time.perf_counter() - start, **what)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration samples")
    options = parser.parse_args()
    start = time.perf_counter()
    model, held, seen = prepare(options)
    batches = [{"input_ids": seen[:2]}]
    whole = {name: slivo.quantize(model, "int8-weights", batches=batches, group_size=name) for name in SHARINGS}
    found: dict[str, Any] = {
        "dense": perplexity(model, held),
        "bytes": {"float": disk(model), **{f"8 bits, {name}": disk(each) for name, each in whole.items()}},
        "rows": [],
    }
    print(f"float: perplexity {found['dense']:.4f}; bytes {found['bytes']}", flush=True)
    for row in rows(model, seen, held, options.samples, options.seeds):
        found["rows"].append(row)
        print(
            "{bits} bits  {sharing!s:>7}  seed {seed}  {method:>9}  perplexity {perplexity:.4f}  "
            "divergence {divergence:.6f}  {seconds:.1f} s".format(**row),
            *([f" {row['bytes']:,} bytes"] if "bytes" in row else []),
            flush=True,
        )
    found["means"] = {}
    for bits in (4, 3):
        for sharing in SHARINGS:
            for method in ("round", "gptq", "awq", "reference"):
                these = [
                    row
                    for row in found["rows"]
                    if (row["bits"], row["sharing"], row["method"]) == (bits, sharing, method)
                ]
                means = {key: fmean(row[key] for row in these) for key in ("perplexity", "divergence", "seconds")}
                means["spread"] = stdev([row["perplexity"] for row in these]) if len(these) > 1 else 0.0
                found["means"][f"{bits} {sharing} {method}"] = means
                print(f"{bits} bits {sharing!s:>7} {method:>9}: " + ", ".join(f"{k} {v:.5f}" for k, v in means.items()))
    found["settings"] = {name: str(value) for name, value in vars(options).items()}
    found["machine"] = f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
    found["seconds"], found["cpu seconds"] = time.perf_counter() - start, time.process_time()
    print(f"{found['seconds']:.0f} s in all, {found['cpu seconds']:.0f} s of them on a processor")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
