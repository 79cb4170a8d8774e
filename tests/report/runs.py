"""Run folders as a run writes them, without the run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

Json = dict[str, Any]

RECIPE: Json = {
    "name": "digits: prune, then distill",
    "task": {"kind": "image-classification", "data": "digits"},
    "teacher": {"model": "slivo.zoo:small_cnn", "args": {"width": 64}, "fit": {"epochs": 10, "lr": 0.05}},
    "student": {"from": "teacher"},
    "target": {"macs": 0.4, "max_drop": 0.01},
    "stages": [
        {
            "prune": {
                "criterion": "taylor",
                "scope": "global",
                "keep": {"macs": 0.25},
                "schedule": {"kind": "cubic", "steps": 3},
            }
        },
        {"distill": {"losses": [{"kd": {"temperature": 4.0, "weight": 0.9}}], "epochs": 12}},
        {"quantize": {"scheme": "int8-static"}},
        {"export": {"to": "onnx"}},
    ],
}

# label, kind, epochs, MACs, parameters, bytes, accuracy on validation data, seconds, details
STAGES: list[tuple[str, str, int, int, int, int, float, float, Json]] = [
    (
        "teacher",
        "teacher",
        10,
        4_792_448,
        112_330,
        451_874,
        0.9917,
        21.4,
        {"model": "slivo.zoo:small_cnn", "epochs": 10},
    ),
    (
        "prune 1/3",
        "prune",
        2,
        2_731_520,
        63_904,
        258_120,
        0.9833,
        5.1,
        {"criterion": "taylor", "kept": 0.57, "axes": 6},
    ),
    ("prune 2/3", "prune", 2, 1_628_672, 38_226, 155_410, 0.975, 4.2, {"criterion": "taylor", "kept": 0.34, "axes": 6}),
    (
        "prune 3/3",
        "prune",
        2,
        1_192_512,
        28_114,
        114_928,
        0.9583,
        3.8,
        {"criterion": "taylor", "kept": 0.249, "axes": 6},
    ),
    (
        "distill",
        "distill",
        12,
        1_192_512,
        28_114,
        114_928,
        0.9917,
        14.9,
        {"losses": ["kd"], "temperature": 4.0, "adapters": 0},
    ),
    ("quantize", "quantize", 0, 1_192_512, 28_114, 33_480, 0.9917, 1.2, {"scheme": "int8-static", "modules": 7}),
    ("export", "export", 0, 1_192_512, 28_114, 33_480, 0.9917, 2.3, {"to": "onnx", "largest_difference": 1.9e-06}),
]

AXES = [
    ("features.0.weight:0", 32, 19),
    ("features.3.weight:0", 32, 21),
    ("features.7.weight:0", 64, 33),
    ("features.10.weight:0", 64, 29),
    ("features.14.weight:0", 128, 52),
    ("classifier.0.weight:0", 128, 128),
]


def run() -> Json:
    """run.json of a run that is done."""
    stages, before = [], None
    for index, (label, kind, _, macs, params, size, accuracy, seconds, details) in enumerate(STAGES):
        after = {"accuracy": accuracy, "params": params, "macs": macs, "bytes": size}
        stages.append(
            {"index": index, "kind": kind, "label": label, "seconds": seconds, "before": before, "after": after}
            | {"details": details}
        )
        before = after
    return {
        "format": 1,
        "slivo": "0.1.0",
        "name": "digits: prune, then distill",
        "seed": 0,
        "recipe": RECIPE,
        "machine": {
            "cpu": "AMD EPYC 7B13",
            "cores": 8,
            "threads": 2,
            "python": "3.11.7",
            "torch": "2.13.0+cpu",
            "platform": "Linux-6.1-x86_64",
        },
        "started": "2026-11-21T07:18:26+00:00",
        "status": "done",
        "seconds": 61.2,
        "stages": stages,
        "decisions": [
            {
                "stage": 1,
                "what": "classifier.0.weight:0 was left as it is",
                "why": "it is 0.7 % of the MACs; cutting it first lost 3.1 points",
            },
            {"stage": 4, "what": "kept the weights of epoch 11", "why": "best accuracy on validation data, 99.2 %"},
            {
                "stage": 5,
                "what": "the last layer stays in float32",
                "why": "int8 there cost 0.8 points on calibration data and saves 1.3 kB",
            },
        ],
        "confusion": {"teacher": _confusion(8), "student": _confusion(10, shift=1)},
        "classes": [str(digit) for digit in range(10)],
        "axes": [{"name": name, "before": old, "after": new} for name, old, new in AXES],
        "agreement": 0.9883,
    }


def _confusion(errors: int, shift: int = 0) -> list[list[int]]:
    matrix = [[59 + (i % 2) if i == j else 0 for j in range(10)] for i in range(10)]
    for k in range(errors):
        true, wrong = (8, 1, 9, 3, 8, 4)[(k + shift) % 6], (1, 8, 3, 9, 2, 7)[(k + shift) % 6]
        matrix[true][wrong] += 1
        matrix[true][true] -= 1
    return matrix


def epochs() -> list[Json]:
    """metrics.jsonl: curves that fall as such curves do, jumping where a cut hurts."""
    rows = []
    for index, (label, kind, number, *_, accuracy, seconds, _details) in enumerate(STAGES):
        start = {"teacher": 2.1, "prune": 0.4, "distill": 1.6}.get(kind, 0.0)
        for epoch in range(1, number + 1):
            left = math.exp(-3.2 * epoch / number)
            ripple = 1 + 0.06 * math.sin(5 * epoch + index)
            loss = (0.04 + start * left) * ripple
            terms = {"label": 0.18 * loss, "kd": 0.82 * loss} if kind == "distill" else {"label": loss}
            val = {"accuracy": accuracy - (0.35 if kind == "teacher" else 0.03) * (left - math.exp(-3.2)) * ripple}
            rows.append(
                {"stage": index, "label": label, "epoch": epoch, "loss": loss, "terms": terms}
                | {"lr": 0.05 * left, "val": val, "seconds": seconds / number}
            )
    return rows


def summary() -> Json:
    """summary.json of the same run."""
    teacher = {"accuracy": 0.9866, "precision": 0.9868, "recall": 0.9865, "f1": 0.9865}
    student = {"accuracy": 0.9833, "precision": 0.9836, "recall": 0.9832, "f1": 0.9832}
    teacher |= {"params": 112_330, "macs": 4_792_448, "bytes": 451_874}
    student |= {"params": 28_114, "macs": 1_192_512, "bytes": 33_480}
    return {
        "teacher": teacher | {"latency_ms": {"1": [0.2841, 0.3312], "64": [9.842, 10.61]}},
        "student": student | {"latency_ms": {"1": [0.0912, 0.1127], "64": [2.714, 2.998]}},
        "target": {"macs": 0.4, "max_drop": 0.01},
        "met": True,
        "seconds": 61.2,
        "runtime": "onnxruntime 1.31.1, 2 threads",
        "seed": 0,
    }


def build(
    folder: Path, *, run: Json | None = None, epochs: list[Json] | None = None, summary: Json | None = None
) -> Path:
    """Write the records that are given into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if run is not None:
        (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    if epochs is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in epochs), encoding="utf-8")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder
