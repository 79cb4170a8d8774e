"""The first look at a model: what it costs, and how much of that could be pruned away."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from slivo.graph import ExampleInputs, trace
from slivo.graph.capture import check_runs, trying
from slivo.graph.checks import check_values
from slivo.graph.inputs import fresh
from slivo.measure.cost import cost
from slivo.measure.latency import latency


@dataclass(frozen=True)
class Inspection:
    """What a look at a model tells.

    Args:
        params: Weights and biases; tied ones count once.
        macs: Multiply-accumulates per sample.
        bytes: Bytes of the model's tensors as a safetensors file.
        latency_ms: Median time of one call on the example inputs, in PyTorch, on the device and with the threads
            that it has now.
        prunable_macs: Share of the MACs, 0-1, of operators in which something can be cut.
    """

    params: int
    macs: int
    bytes: int
    latency_ms: float
    prunable_macs: float


def inspect(model: nn.Module, example_inputs: ExampleInputs, *, repeats: int = 20) -> Inspection:
    """Look at a model.

    Args:
        model: Any module that PyTorch can capture; run in evaluation mode, left as it was.
        example_inputs: A tensor, a tuple of positional arguments or a mapping of keyword arguments.
        repeats: Calls that are timed.

    Raises:
        CaptureError: If the model does not run on the inputs or cannot be captured.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> seen = inspect(net, torch.randn(2, 4))
        >>> seen.params, seen.macs, seen.prunable_macs
        (67, 56, 1.0)
    """
    check_runs(model, example_inputs)
    share = trace(model, example_inputs).prunable_macs
    check_values(model)
    counted = cost(model, example_inputs)
    args, kwargs = fresh(example_inputs)

    def run() -> None:
        model(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    with trying(model), torch.inference_mode():
        p50, _ = latency(run, repeats=repeats, warmup=3)
    return Inspection(counted.params, counted.macs, counted.size_bytes, p50, share)
