"""What does low rank cost a convolutional network right away? ResNet-56 on CIFAR-10, by method, without training.

Usage: python benchmarks/factorize_cifar.py --data DIR [--faster 1.5 2] [--methods auto channel] [--json FILE]

DIR holds ``cifar10_jpeg_{train,test}.npz`` and ``cifar10_jpeg_resnet56.safetensors``; decoding them takes Pillow. Ranks
are chosen for as many multiply-accumulates in all, from the weights alone and from unlabelled training images; accuracy
is that on test images, right afterwards, and with batch norms re-estimated on the same training images.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

import slivo
from cifar import accuracy, decode, normalize, resnet56, some
from slivo.measure import cost
from slivo.prune import reestimate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--faster", type=float, nargs="+", default=[1.5, 2.0], help="how many times fewer MACs")
    parser.add_argument("--methods", nargs="+", default=["channel", "spatial", "tucker2", "auto"])
    parser.add_argument("--samples", type=int, default=128, help="unlabelled training images")
    parser.add_argument("--test", type=int, help="so many of the test images; all by default")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, test = resnet56(options.data).eval(), some(decode(options.data, "test"), options.test)
    chosen = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))[: options.samples].tolist()
    x = normalize(decode(options.data, "train", chosen)[0])
    whole, dense = cost(model, x[:2]), accuracy(model, test)
    print(f"dense: {whole.macs:,} MACs, accuracy {dense:.2%}", flush=True)
    rows: list[dict[str, Any]] = []
    for faster in options.faster:
        for method in options.methods:
            for by, batches in (("weights", None), ("activations", list(x.split(64)))):
                start = time.perf_counter()
                small = slivo.factorize(
                    model, x[:2], keep=slivo.Budget(macs=1 / faster), method=method, batches=batches
                )  # fmt: skip
                row = {"faster": faster, "method": method, "by": by, "seconds": time.perf_counter() - start}
                found = cost(small, x[:2])
                row |= {"macs": found.macs / whole.macs, "params": found.params / whole.params}
                row["accuracy"] = accuracy(small, test)
                row["batch norm"] = accuracy(reestimate(small, list(x.split(64))), test)
                rows.append(row)
                told = (
                    "{faster} x {method:<8} {by:<12} MACs {macs:.2%}, parameters {params:.2%}, "
                    "accuracy {accuracy:.2%}, batch norms {batch norm:.2%}; {seconds:.0f} s"
                )
                print(told.format(**row), flush=True)
    if options.json is not None:
        settings = {name: str(value) for name, value in vars(options).items()}
        machine = f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
        made = {"dense": dense, "rows": rows, "settings": settings, "machine": machine}
        options.json.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
