"""What can be quantized in a model, read off its captured graph: where data flows, not what things are called."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn

from slivo.edits.quantize import NORMS, QUANTIZABLE
from slivo.errors import CaptureError, SlivoError
from slivo.graph.capture import Capture, capture
from slivo.quantize.calibrate import calls

aten = torch.ops.aten
_log = logging.getLogger("slivo")

_LAYER_OPS = (aten.linear, aten.conv1d, aten.conv2d, aten.conv3d)

_RECTIFIERS = (aten.relu, aten.relu_)

# Operators that a runtime moves quantize nodes through, or merges with them: they keep or clip values.
_TRANSPARENT = (
    *_RECTIFIERS, aten.hardtanh, aten.hardtanh_, aten.clamp, aten.max_pool1d, aten.max_pool2d, aten.max_pool3d,
    aten.flatten, aten.view, aten.reshape, aten.permute, aten.transpose, aten.squeeze, aten.unsqueeze,
    aten.dropout, aten.contiguous, aten.clone,
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is done to a model.

    Args:
        layers: The layers to quantize, in order of first use.
        folded: For each batch norm the layer that takes it in.
        rounded: The layers whose output must be rounded for an integer kernel to be used, because what follows them
            computes in floating point; and whether only the positive part of it is used.
    """

    layers: tuple[str, ...]
    folded: Mapping[str, str]
    rounded: Mapping[str, bool]


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that could be quantized: of the right classes, with weights of their own."""
    owners = Counter(id(tensor) for module in model.modules() for tensor in module.parameters(recurse=False))
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in QUANTIZABLE and owners[id(module.weight)] == 1
    }


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the batch norms that could be folded."""
    return {name: module for name, module in model.named_modules() if type(module) in NORMS}


def plan(captured: Capture, layers: Mapping[str, nn.Module], once: frozenset[str]) -> Plan:
    """Find which batch norms can be folded, and which outputs must be rounded.

    Args:
        captured: The model's graph.
        layers: The layers that will be quantized.
        once: Names of modules that one forward pass calls exactly once.
    """
    places = _layer_nodes(captured, layers)
    results: dict[str, list[fx.Node]] = defaultdict(list)
    for node, layer in places.items():
        results[layer].append(node)
    folded: dict[str, str] = {}
    for layer, nodes in list(results.items()):
        norm = _norm_behind(captured, nodes[0]) if len(nodes) == 1 and layer in once else None
        if norm is not None and norm[0] in once:
            folded[norm[0]] = layer
            results[layer] = [norm[1]]
    rounded = {
        layer: all(_is(user, _RECTIFIERS) for node in nodes for user in node.users)
        for layer, nodes in results.items()
        if type(layers[layer]) is not nn.Linear  # integer matrix products may give out floating point
        and any(_meets_floating_point(node, places) for node in nodes)
    }
    return Plan(tuple(layers), folded, rounded)


def planned(model: nn.Module, batch: Any, exclude: Sequence[str] = ()) -> Plan:
    """Run a model on a batch, and find what of it can be quantized.

    Args:
        model: Left as it was.
        batch: What it is called with.
        exclude: Globs over module paths; what they match is left out.

    Raises:
        SlivoError: If a glob matches nothing.
    """
    layers = candidates(model)
    for glob in exclude:
        matched = [name for name in layers if fnmatchcase(name, glob) or fnmatchcase(name, f"{glob}.*")]
        if not matched:
            raise SlivoError(f"{glob!r} matches no layer that can be quantized; there are {', '.join(layers)}")
        layers = {name: layer for name, layer in layers.items() if name not in matched}
    counted = calls(model, {**layers, **norms(model)}, batch)
    layers = {name: layer for name, layer in layers.items() if counted[name]}
    once = frozenset(name for name, count in counted.items() if count == 1)
    try:
        captured = capture(model, batch)
    except CaptureError as error:
        _log.warning("batch norms are not folded before quantization: %s", error)
        return Plan(tuple(layers), {}, {})
    return plan(captured, layers, once)


def _layer_nodes(captured: Capture, layers: Mapping[str, nn.Module]) -> dict[fx.Node, str]:
    """Return the nodes that apply the weights of layers."""
    weights = {f"{name}.weight".lstrip("."): name for name in layers}
    found: dict[fx.Node, str] = {}
    for node in captured.graph.graph.nodes:
        if _is(node, _LAYER_OPS):
            name = weights.get(_tensor(captured, node.args[1]))
            if name is not None:
                found[node] = name
    return found


def _norm_behind(captured: Capture, node: fx.Node) -> tuple[str, fx.Node] | None:
    """Return the batch norm that alone reads a layer's output, and its node."""
    users = list(node.users)
    if len(users) != 1 or not _is(users[0], (aten.batch_norm,)):
        return None
    mean = _tensor(captured, users[0].args[3])
    if not mean.endswith("running_mean"):
        return None
    value = node.meta.get("val")
    if _is(node, (aten.linear,)) and not (isinstance(value, Tensor) and value.dim() == 2):
        return None  # the channels of the norm are another dimension than the layer's
    return mean.rpartition(".")[0], users[0]


def _meets_floating_point(node: fx.Node, places: Mapping[fx.Node, str]) -> bool:
    """Tell whether something other than a quantized layer, or the caller, reads a value."""
    for user in node.users:
        if user.op == "output" or (user in places and user.args[0] is node):
            continue
        if not _is(user, _TRANSPARENT) or _meets_floating_point(user, places):
            return True
    return False


def _is(node: fx.Node, ops: tuple[Any, ...]) -> bool:
    return getattr(node.target, "overloadpacket", None) in ops


def _tensor(captured: Capture, node: Any) -> str:
    return captured.tensors.get(node.name, "") if isinstance(node, fx.Node) else ""
