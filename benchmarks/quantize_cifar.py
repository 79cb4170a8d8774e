"""What does int8 cost, and what is it worth? ResNet-56 on CIFAR-10, without fine-tuning, in PyTorch and ONNX Runtime.

Usage: python benchmarks/quantize_cifar.py --data DIR [--artifact FOLDER] [--settings static corrected] [--json FILE]

DIR holds ``cifar10_jpeg_{train,test}.npz`` and ``cifar10_jpeg_resnet56.safetensors``; decoding them takes Pillow.
Ranges come from unlabelled training images. With ``--artifact`` a pruned network, saved by `slivo.save`, is quantized
in the dense one's place, which stays what latencies are compared with.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import slivo
from cifar import Images, ResNet56, accuracy, decode, normalize, resnet56, some
from slivo import artifact
from slivo.errors import SlivoError
from slivo.export import bench, onnx
from slivo.export.bench import Running

SETTINGS: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "static": {},
    "equalized": {"equalize": True},
    "corrected": {"correct_bias": True},
    "both": {"equalize": True, "correct_bias": True},
    "8 bits": {"weight_bits": 8},
    "8 bits corrected": {"weight_bits": 8, "correct_bias": True},
    "4 bits": {"weight_bits": 4},
    "4 bits equalized": {"weight_bits": 4, "equalize": True},
    "4 bits corrected": {"weight_bits": 4, "correct_bias": True},
    "weights alone": {"scheme": "int8-weights"},
}


def judged(model: nn.Module, name: str, test: Images, options: Any, folder: Path) -> dict[str, Any]:
    """Measure accuracy in both, and sizes."""
    found: dict[str, Any] = {"setting": name}
    found["accuracy, PyTorch"] = accuracy(model, some(test, options.pytorch))
    found["bytes"] = artifact.size_bytes(slivo.save(model, folder / name.replace(" ", "-")))
    found["bytes, packed"] = slivo.pack(model, folder / f"{name.replace(' ', '-')}.slivo").bytes
    file = folder / f"{name.replace(' ', '-')}.onnx"
    try:
        onnx.export(model, file, normalize(test[0][:2]))
    except SlivoError as error:
        return {**found, "refused": str(error)}
    run = onnx.runner(file)
    found["accuracy, ONNX Runtime"] = accuracy(Running(lambda x: run(x.contiguous().numpy())), test)
    return {**found, "bytes, ONNX": file.stat().st_size}


def smaller(options: Any, dense: nn.Module) -> nn.Module:
    """Return the network that is quantized."""
    if options.artifact is None:
        return dense
    named = artifact.read(options.artifact)["factory"] is not None
    return slivo.load(options.artifact, factory=None if named else ResNet56)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--artifact", type=Path, help="a pruned ResNet-56, in place of the dense one")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=[*SETTINGS][:7])
    parser.add_argument("--samples", type=int, default=512, help="unlabelled training images")
    parser.add_argument("--test", type=int, help="images to measure accuracy on; all by default")
    parser.add_argument("--pytorch", type=int, help="how many of these in PyTorch, which takes most of the time")
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    order = np.random.default_rng(0).permutation(50_000)[: options.samples].tolist()
    batches = list(normalize(decode(options.data, "train", order)[0]).split(128))
    test = some(decode(options.data, "test"), options.test)
    dense = resnet56(options.data)
    source = smaller(options, dense)
    print(f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}")
    columns = ["accuracy, PyTorch", "accuracy, ONNX Runtime", "bytes", "bytes, packed", "bytes, ONNX"]
    print("| setting | " + " | ".join(columns) + " | s |\n" + "|---" * (len(columns) + 2) + "|")
    rows, chosen = [], None
    with tempfile.TemporaryDirectory() as folder:
        for name in options.settings:
            setting, start = SETTINGS[name], time.perf_counter()
            model = source if setting is None else slivo.quantize(source, batches=batches, **setting)
            chosen = model if setting is not None and setting.get("weight_bits", 7) == 7 else chosen
            found = judged(model, name, test, options, Path(folder))
            rows.append(found | {"seconds": time.perf_counter() - start})
            cells = [f"{found[c]:.2%}" if "acc" in c and c in found else f"{found.get(c, '–')}" for c in columns]
            print(f"| {name} | {' | '.join(cells)} | {rows[-1]['seconds']:.0f} |", flush=True)
    timed = []
    if chosen is not None:
        timed = bench(
            chosen, normalize(test[0][:32]), teacher=dense, runtimes=options.runtimes, repeats=options.repeats
        )
        print("\n| runtime | batch | ms | dense, float32, ms | times faster |\n|---|---|---|---|---|")
        for row in timed:
            said = row.reason or f"{row.p50_ms:.2f} | {row.teacher_p50_ms:.2f} | {row.faster:.2f}"
            print(f"| {row.runtime} {row.version} | {row.batch} | {said} |")
    if options.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        text = json.dumps({"settings": settings, "rows": rows, "latency": [vars(each) for each in timed]}, indent=1)
        options.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
