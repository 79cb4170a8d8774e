"""What does one-shot pruning cost a language model? Perplexity after SparseGPT, Wanda and magnitude, and after cuts.

Usage: python benchmarks/sparse_lm.py --data DIR [--text tinyshakespeare.txt] [--steps 500] [--json FILE]

Trains a small Llama-shaped model on the bytes of ``DIR/TEXT``, prunes it by slivo and by a slow reference that is
written here from the papers' formulas (float64, the inverse of the Hessian computed anew for each column), and prints
perplexities per byte on text that was not trained on. Then the model is made narrower (by activations, as Minitron
does) and shallower (by the influence of blocks), to equal numbers of parameters. It needs transformers.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slivo
from slivo.prune import drop, one_shot, refit

PATTERNS: dict[str, dict[str, Any]] = {
    "50 %": {"sparsity": 0.5},
    "60 %": {"sparsity": 0.6},
    "4:8": {"pattern": "4:8"},
    "2:4": {"pattern": "2:4"},
}
METHODS = ("magnitude", "wanda", "sparsegpt")
DAMPING, COLUMNS = 0.01, 128


def llama(width: int, layers: int) -> nn.Module:
    """Make a Llama-shaped model of bytes, with half as many heads of keys as of queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=width * 11 // 4 // 8 * 8, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def windows(text: Tensor, length: int) -> Tensor:
    """Part a text into windows, shape (windows, length)."""
    return text[: len(text) // length * length].reshape(-1, length)


def cross_entropy(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def train(model: nn.Module, text: Tensor, steps: int, length: int, batch: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(1)
    model.train()
    for step in range(steps):
        starts = torch.randint(len(text) - length, (batch,), generator=generator)
        loss = cross_entropy(model, torch.stack([text[start : start + length] for start in starts]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.3f} nats a byte", flush=True)
    model.eval()


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor) -> float:
    """Return the perplexity per byte, of windows of one length."""
    losses = [float(cross_entropy(model.eval(), part)) * len(part) for part in ids.split(32)]
    return math.exp(sum(losses) / len(ids))


# The reference: modules are watched, not operators; each layer takes passes of the whole model; weights are taken one
# column at a time.


@torch.no_grad()
def inputs_of(model: nn.Module, layers: Sequence[nn.Linear], calibration: Tensor) -> list[Tensor]:
    """Run the whole model, and return the second moments XᵀX of what layers read."""
    sums: dict[nn.Module, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))

    def note(layer: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> None:
        for row in args[0]:
            sums[layer] = sums[layer] + torch.einsum("ti,tj->ij", row, row)

    handles = [layer.register_forward_hook(note) for layer in layers]
    for part in calibration.split(16):
        model(input_ids=part, use_cache=False)
    for handle in handles:
        handle.remove()
    return [sums[layer] for layer in layers]


def reference(
    model: nn.Module, calibration: Tensor, method: str, sparsity: float = 0.5, pattern: str = ""
) -> nn.Module:
    """Prune by the papers' formulas, slowly, in float64."""
    new = deepcopy(model).double()
    kept, group = (int(each) for each in pattern.split(":")) if pattern else (0, 0)
    for block in new.model.layers:
        layers = [each for each in block.modules() if isinstance(each, nn.Linear)]
        seen = calibration if method != "magnitude" else calibration[:1]
        for layer, hessian in zip(layers, inputs_of(new, layers, seen), strict=True):
            weight = layer.weight.data
            if method == "sparsegpt":
                weight.copy_(surgeon(weight, hessian, sparsity, kept, group))
                continue
            norms = hessian.diagonal().sqrt() if method == "wanda" else torch.ones(weight.shape[1])
            worth = weight.abs() * norms
            if group:
                for start in range(0, weight.shape[1], group):
                    part = worth[:, start : start + group]
                    least = part.topk(kept, dim=1).values[:, -1:]
                    weight[:, start : start + group][part < least] = 0
            elif method == "wanda":
                least = worth.kthvalue(round(sparsity * weight.shape[1]), dim=1, keepdim=True).values
                weight[worth <= least] = 0
            else:
                weight[worth <= worth.flatten().kthvalue(round(sparsity * worth.numel())).values] = 0
    return new.float()


def surgeon(weight: Tensor, hessian: Tensor, sparsity: float, kept: int, group: int) -> Tensor:
    """Zero weights column by column; for each column the Hessian of those from it on is inverted anew."""
    size = len(hessian)
    hessian = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    inverses = [torch.linalg.inv(hessian[column:, column:])[0] for column in range(size)]
    spread = torch.stack([row[0] for row in inverses])
    weight, mask = weight.clone(), torch.ones_like(weight)
    for column, row in enumerate(inverses):
        if group and column % group == 0:
            part = slice(column, column + group)
            cost = weight[:, part] ** 2 / spread[part]
            mask[:, part] = torch.zeros_like(cost).scatter(1, cost.topk(kept, dim=1).indices, 1.0)
        elif not group and column % COLUMNS == 0:
            part = slice(column, min(column + COLUMNS, size))
            cost = weight[:, part] ** 2 / spread[part]
            mask[:, part] = (cost > cost.flatten().kthvalue(round(sparsity * cost.numel())).values).double()
        gone = mask[:, column] == 0
        weight[gone, column:] -= weight[gone, column, None] / row[0] * row
    return weight * mask


def sparse_rows(model: nn.Module, calibration: Tensor, held: Tensor, dense: float) -> Iterator[dict[str, Any]]:
    """Prune by each method in each pattern, and judge."""
    batches = [{"input_ids": part} for part in calibration.split(8)]
    for pattern, how in PATTERNS.items():
        for method in METHODS:
            start = time.perf_counter()
            ours = one_shot(model, batches, method=method, damping=DAMPING, columns=COLUMNS, **how)
            seconds = time.perf_counter() - start
            row = {"pattern": pattern, "method": method, "slivo": perplexity(ours, held), "seconds": seconds}
            row["reference"] = perplexity(reference(model, calibration, method, **how), held)
            row["ratio"] = row["slivo"] / row["reference"]
            row["over dense"] = row["slivo"] / dense
            yield row


def cut_rows(model: nn.Module, calibration: Tensor, held: Tensor) -> Iterator[dict[str, Any]]:
    """Drop one block, cut widths to as many parameters, and judge."""
    call, batches = {"input_ids": calibration[:2]}, [{"input_ids": each[None]} for each in calibration]
    whole = sum(each.numel() for each in model.parameters())
    shallow = drop(model, call, keep=slivo.Budget(params=1 - 0.5 / len(model.model.layers)), batches=batches)
    budget = sum(each.numel() for each in shallow.parameters()) / whole
    made: dict[str, Callable[[], nn.Module]] = {"depth: block influence": lambda: shallow}
    for criterion in ("activation_mean", "l2"):
        for what, (only, scope) in WIDTHS.items():
            made[f"{what}: {criterion}"] = lambda criterion=criterion, only=only, scope=scope: slivo.prune(
                model, call, keep=slivo.Budget(params=budget), criterion=criterion, scope=scope, only=only,
                batches=batches,
            )  # fmt: skip
    for what, make in made.items():
        try:
            small = make()
        except slivo.TargetError as error:
            print(f"{what}: {error}")
            continue
        row = {"cut": what, "params": sum(each.numel() for each in small.parameters()) / whole}
        row["perplexity"] = perplexity(small, held)
        if "depth" not in what:
            many = [{"input_ids": part} for part in calibration.split(32)]
            row["refit"] = perplexity(refit(small, model, many), held)
        yield row


WIDTHS: dict[str, tuple[list[str], Any]] = {
    "MLP": (["*gate_proj*"], "uniform"),
    "heads and MLP": (["*heads*", "*gate_proj*"], "global"),
    "hidden width": (["*embed_tokens*"], "uniform"),
}
"""Axes that are cut together. Of two heads in a group no share between a half and one can be kept of all alike."""


def arguments(about: str | None) -> argparse.ArgumentParser:
    """Return what a script on this model can be told."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text", default="tinyshakespeare.txt")
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="bytes of a sample")
    parser.add_argument("--samples", type=int, default=32, help="unlabelled samples of the training text")
    parser.add_argument("--held-out", type=int, default=128, help="samples to judge by")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="file of the trained weights: written if it is not there, or read")
    parser.add_argument("--json", type=Path)
    return parser


def prepare(options: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the trained model, and windows of text that it has not seen, and that it has."""
    torch.manual_seed(options.seed)
    text = torch.frombuffer(bytearray((options.data / options.text).read_bytes()), dtype=torch.uint8).long()
    first = len(text) * 9 // 10
    model = llama(options.width, options.layers)
    if options.keep is not None and options.keep.exists():
        model.load_state_dict(torch.load(options.keep, weights_only=True))
        model.eval()
    else:
        train(model, text[:first], options.steps, options.length, options.batch)
        if options.keep is not None:
            torch.save(model.state_dict(), options.keep)
    return model, windows(text[first:], options.length)[: options.held_out], windows(text[:first], options.length)


def sample(seen: Tensor, count: int, seed: int) -> Tensor:
    """Choose windows to calibrate on."""
    return seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed))[:count]]


def main() -> None:
    options = arguments(__doc__).parse_args()
    start = time.perf_counter()
    model, held, seen = prepare(options)
    calibration = sample(seen, options.samples, 0)
    dense = perplexity(model, held)
    params = sum(each.numel() for each in model.parameters())
    print(f"dense: {params:,} parameters, perplexity {dense:.4f}; {time.perf_counter() - start:.0f} s", flush=True)
    found: dict[str, Any] = {"dense": dense, "params": params, "sparse": [], "cut": []}
    for row in sparse_rows(model, calibration, held, dense):
        found["sparse"].append(row)
        print("{pattern:>5} {method:>10}  slivo {slivo:.4f}  reference {reference:.4f}  ratio {ratio:.5f}  "
              "over dense {over dense:.4f}  {seconds:.1f} s".format(**row), flush=True)  # fmt: skip
    for row in cut_rows(model, calibration, held):
        found["cut"].append(row)
        print(
            ", ".join(f"{key} {value if isinstance(value, str) else round(value, 4)}" for key, value in row.items()),
            flush=True,
        )
    found["worst ratio"] = max(max(row["ratio"], 1 / row["ratio"]) for row in found["sparse"])
    found["settings"] = {name: str(value) for name, value in vars(options).items()}
    found["machine"] = f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
    found["seconds"], found["cpu seconds"] = time.perf_counter() - start, time.process_time()
    print(
        f"worst ratio to the reference {found['worst ratio']:.5f}; {found['seconds']:.0f} s in all, "
        f"{found['cpu seconds']:.0f} s of them on a processor"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
