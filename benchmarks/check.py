"""Check one network and write its row; `coverage.py` runs this in a process of its own for each network.

The row is written again after each step, so that what was found out is there even if the process is killed.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import networks
import oracle
from row import Row
from slivo import Budget, load, prune, save, trace
from slivo.graph import Graph, as_args
from slivo.graph.capture import evaluating
from slivo.graph.program import tensors_of
from slivo.measure.cost import count_macs, count_params


@dataclass
class Subject:
    """The network under test, and what is made of it."""

    name: str
    model: nn.Module
    inputs: Any
    graph: Graph | None = None
    cut: nn.Module | None = None


def main(name: str, file: Path) -> None:
    """Check what slivo makes of a network."""
    quiet()
    row = Row(name)
    subject: list[Subject] = []

    attempt(row, "build", lambda: subject.append(make(name)), file)
    if not subject:
        return
    attempt(row, "count", lambda: count(row, subject[0]), file)
    attempt(row, "trace", lambda: find_axes(row, subject[0]), file)
    if subject[0].graph is not None:
        attempt(row, "prune", lambda: cut_half(row, subject[0]), file)
    if subject[0].cut is not None:
        attempt(row, "forward", lambda: forward(row, subject[0]), file)
        attempt(row, "backward", lambda: backward(row, subject[0]), file)
        attempt(row, "save", lambda: store(row, subject[0]), file)
    if subject[0].graph is not None:
        attempt(row, "permute", lambda: permute(row, subject[0]), file)  # last: it is slow, and changes the model
    row.step = "done"
    write(row, file)


def quiet() -> None:
    """Leave out warnings: what they are about is in the row."""
    warnings.simplefilter("ignore")
    logging.getLogger("slivo").setLevel(logging.ERROR)


def attempt(row: Row, step: str, action: Callable[[], None], file: Path) -> None:
    """Take a step; if it fails, note why and go on."""
    row.step = step
    write(row, file)
    start = time.process_time()
    try:
        action()
    except Exception as error:
        row.failures[step] = f"{type(error).__name__}: {short(error)} ({place(error)})"
    row.steps[step] = time.process_time() - start
    write(row, file)


def short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""


def place(error: Exception) -> str:
    """Say where an error comes from: the last line of slivo's on its way, or the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((each for each in reversed(frames) if "slivo" in Path(each.filename).parts), frames[-1])
    return f"{Path(frame.filename).name}:{frame.lineno}"


def write(row: Row, file: Path) -> None:
    file.write_text(json.dumps(asdict(row)), encoding="utf-8")


def make(name: str) -> Subject:
    torch.manual_seed(0)
    model, inputs = networks.make(name)
    enliven_(model)
    return Subject(name, model.eval(), inputs)


def enliven_(model: nn.Module) -> None:
    """Give parameters and statistics that start as constants values that tell their positions apart.

    A bias of zeros or a scale of ones is right in any order: mistakes with it would not show.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if (
                parameter.numel() > 1
                and parameter.is_floating_point()
                and bool((parameter == parameter.flatten()[0]).all())
            ):
                parameter += 0.1 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)


def count(row: Row, subject: Subject) -> None:
    row.params = count_params(subject.model)
    row.macs = count_macs(subject.model, subject.inputs)


def find_axes(row: Row, subject: Subject) -> None:
    warm_up()
    start = time.process_time()
    graph = trace(subject.model, subject.inputs)
    row.trace_seconds = time.process_time() - start
    subject.graph, row.captured = graph, True
    row.graph_macs = graph.macs
    row.axes, row.prunable = len(graph.axes), len(graph.prunable)
    row.prunable_macs, row.prunable_params = graph.prunable_macs, graph.prunable_params
    row.unknown = {str(name): count for name, count in graph.unknown_ops.items()}
    row.kind = kind(subject)


def warm_up() -> None:
    """Import what PyTorch imports when it captures for the first time, so that it is in no network's time."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    prune(net, torch.randn(2, 3, 8, 8), keep=Budget(macs=0.5), scope="uniform")


def cut_half(row: Row, subject: Subject) -> None:
    start, wall = time.process_time(), time.perf_counter()
    cut = prune(subject.model, subject.inputs, keep=Budget(macs=0.5), scope="uniform")
    row.seconds, row.wall_seconds = time.process_time() - start, time.perf_counter() - wall
    subject.cut = cut.eval()
    row.graphs = graphs(cut)
    wrong = misfits(cut)
    row.shapes = not wrong
    if wrong:
        row.failures["shapes"] = f"{len(wrong)} modules hold sizes that are not their weights': {wrong[0]}"


def forward(row: Row, subject: Subject) -> None:
    cut, row.forward = subject.cut, False
    before, after = run(subject.model, subject.inputs), run(cut, subject.inputs)
    row.forward = all(bool(each.isfinite().all()) for each in after) or not all(
        bool(each.isfinite().all()) for each in before
    )
    if not row.forward:
        row.failures["forward"] = "outputs are not finite"
    row.interface = [(each.shape, each.dtype) for each in before] == [(each.shape, each.dtype) for each in after]
    if not row.interface:
        shapes = [[tuple(each.shape) for each in outputs] for outputs in (before, after)]
        row.failures["interface"] = f"outputs were {shapes[0]} and are {shapes[1]}"
    if row.macs:
        row.macs_kept = count_macs(cut, subject.inputs) / row.macs


def backward(row: Row, subject: Subject) -> None:
    if not any(parameter.requires_grad for parameter in subject.model.parameters()):
        row.backward = True  # a frozen model has nothing to train, before as after
        return
    row.backward = False
    before = trained(copy.deepcopy(subject.model), subject.inputs)
    after = trained(copy.deepcopy(subject.cut), subject.inputs)
    row.backward = len(after) == len(before)
    if not row.backward:
        row.failures["backward"] = f"{len(before)} parameters had gradients, {len(after)} have"


def store(row: Row, subject: Subject) -> None:
    cut, row.saved = subject.cut, False
    with tempfile.TemporaryDirectory() as folder:
        path = save(cut, Path(folder) / "cut")
        again = load(path, factory=lambda: networks.make(subject.name)[0])
    one, other = state(cut), state(again)
    differ = [name for name in one if name not in other or not same(one[name], other[name])]
    equal = all(same(a, b) for a, b in zip(run(cut, subject.inputs), run(again, subject.inputs), strict=True))
    row.saved = not differ and len(one) == len(other) and equal
    if not row.saved:
        row.failures["save"] = f"tensors differ: {differ[:3]}" if differ else "outputs differ"


def permute(row: Row, subject: Subject) -> None:
    row.permutation, row.axis, row.alone = oracle.worst(subject.model, subject.graph, subject.inputs)


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    args, kwargs = as_args(inputs)
    torch.manual_seed(0)
    with evaluating(model), torch.no_grad():
        return tensors_of(model(*args, **kwargs))


def trained(model: nn.Module, inputs: Any) -> set[str]:
    """Go forward and backward in training mode; return the parameters that have a gradient then."""
    args, kwargs = as_args(inputs)
    torch.manual_seed(0)
    model.train()
    total = sum(each.float().sum() for each in tensors_of(model(*args, **kwargs)) if each.requires_grad)
    total.backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())


def kind(subject: Subject) -> str:
    """Tell transformers, networks with attention, from convolutional networks and others."""
    nodes = subject.graph.inference.capture.graph.graph.nodes
    if any(is_attention(node) for node in nodes):
        return "transformer"
    return "cnn" if any(sees_neighbors(node) for node in nodes) else "other"


def sees_neighbors(node: fx.Node) -> bool:
    """Tell whether a node is a convolution whose windows overlap; others cut patches, or look at points alone."""
    if node.op != "call_function" or "conv" not in str(node.target):
        return False
    window = node.args[1].meta["val"].shape[2:]
    stride = node.args[3] if len(node.args) > 3 else [1]
    return any(size > step for size, step in zip(window, cycle(stride), strict=False))


def is_attention(node: fx.Node) -> bool:
    """Tell whether a node is attention: the fused operator, or a softmax whose result goes into a matrix product."""
    if "scaled_dot_product" in str(node.target):
        return True
    return "softmax" in str(node.target) and feeds_product(node, steps=4)


def feeds_product(node: fx.Node, steps: int) -> bool:
    products = ("matmul", "bmm", "einsum")
    return any(
        any(product in str(user.target) for product in products) or (steps > 0 and feeds_product(user, steps - 1))
        for user in node.users
    )


def graphs(model: nn.Module) -> list[str]:
    """List the outermost modules that are captured graphs."""
    found = [name for name, module in model.named_modules() if isinstance(module, fx.GraphModule)]
    if "" in found:
        return [""]
    return [name for name in found if not any(name.startswith(f"{each}.") for each in found)]


def misfits(model: nn.Module) -> list[str]:
    """List modules whose own account of their sizes is not that of their weights."""
    return [
        f"{name} ({type(module).__name__}) says {said}, its weight is {tuple(module.weight.shape)}"
        for name, module in model.named_modules()
        for said in [told(module)]
        if said is not None
        and isinstance(getattr(module, "weight", None), Tensor)
        and said != tuple(module.weight.shape)
    ]


def told(module: nn.Module) -> tuple[int, ...] | None:
    """Return the shape that a module's weight should have by its attributes; None for kinds that are not looked at."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Bilinear):
        return module.out_features, module.in1_features, module.in2_features
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return module.in_channels, module.out_channels // module.groups, *module.kernel_size
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels, module.in_channels // module.groups, *module.kernel_size
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return (module.num_features,)
    if isinstance(module, nn.GroupNorm):
        return (module.num_channels,)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return tuple(module.normalized_shape)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return module.num_embeddings, module.embedding_dim
    return None


def check_peer(name: str, file: Path) -> None:
    """Check what the peer makes of a network."""
    import peer

    quiet()
    row = Row(name)

    def judge() -> None:
        subject = make(name)
        row.peer_seconds, row.peer_params, row.peer_failure = peer.judge(subject.model, subject.inputs)

    attempt(row, "peer", judge, file)
    if "peer" in row.failures:
        row.peer_failure = re.sub(r"\s+", " ", row.failures["peer"])
    row.step = "done"
    write(row, file)
