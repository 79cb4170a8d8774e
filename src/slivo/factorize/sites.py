"""Sites: the layers of a model that could be factorized, what they cost, and why others cannot be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from slivo.edits.factorize import FACTORIZABLE, Factors, Kind, Layer
from slivo.edits.quantize import QuantizedLayer
from slivo.edits.swap import exchanged
from slivo.errors import SlivoError
from slivo.graph import Call
from slivo.graph.inputs import batch_size, fresh
from slivo.options import few, matches, wanted

Shape = tuple[int, ...]


@dataclass
class Site:
    """A layer that could be factorized.

    Args:
        name: Its qualified name.
        layer: The layer.
        uses: For each call in one run, the images that it read and gave out, as (how many, size in, size out); of a
            linear layer the sizes are empty.
        samples: Of that run.
    """

    name: str
    layer: Layer
    samples: int = 1
    uses: list[tuple[int, Shape, Shape]] = field(default_factory=list)

    @property
    def shape(self) -> Shape:
        """Of the weight: (outputs, inputs, kernel …)."""
        return tuple(self.layer.weight.shape)

    @property
    def macs(self) -> float:
        """Multiply-accumulates of the layer for a sample."""
        return sum(many * prod(after) for many, _, after in self.uses) * prod(self.shape) / self.samples

    def most(self, kind: Kind) -> Shape:
        """Return the ranks at which nothing is lost; of ``cp`` no more than could pay."""
        outputs, inputs, *kernel = self.shape
        places = prod(kernel)
        if kind == "tucker2":
            return min(inputs, outputs * places), min(outputs, inputs * places)
        if kind == "spatial":
            return (min(inputs * kernel[0], outputs * kernel[1]),)
        if kind == "inputs":
            return (min(inputs, outputs * places),)
        return (prod(self.shape) // sum(self.shape) if kind == "cp" else min(outputs, inputs * places),)

    def numbers(self, factors: Factors) -> list[int]:
        """Return how many weights each of the thin layers has."""
        outputs, inputs, *kernel = self.shape
        first, last, places = factors.ranks[0], factors.ranks[-1], prod(kernel)
        if factors.kind == "svd" or factors.kind == "outputs":
            return [first * inputs * places, outputs * first]
        if factors.kind == "inputs":
            return [first * inputs, outputs * first * places]
        if factors.kind == "spatial":
            return [first * inputs * kernel[0], outputs * first * kernel[1]]
        if factors.kind == "tucker2":
            return [first * inputs, last * first * places, outputs * last]
        return [first * inputs, first * kernel[0], first * kernel[1], outputs * first]

    def macs_of(self, factors: Factors) -> float:
        """Return the multiply-accumulates of the thin layers for a sample."""
        whole = 0
        for many, before, after in self.uses:
            images = {
                "svd": [after, after],
                "outputs": [after, after],
                "inputs": [before, after],
                "spatial": [(*after[:1], *before[1:]), after],
                "tucker2": [before, after, after],
                "cp": [before, (*after[:1], *before[1:]), after, after],
            }[factors.kind]
            whole += many * sum(n * prod(image) for n, image in zip(self.numbers(factors), images, strict=True))
        return whole / self.samples


def find(
    model: nn.Module, call: Call, only: Sequence[str], exclude: Sequence[str]
) -> tuple[dict[str, Site], dict[str, str]]:
    """Find the layers that could be factorized, in the order in which they are called, and run the model on a batch.

    Args:
        model: In evaluation mode; left as it was.
        call: A batch.
        only: Globs over names of layers and modules; if given, no others are meant.
        exclude: Globs over names of layers and modules that are left as they are.

    Returns:
        The layers by name; and for each layer that was meant but cannot be factorized why.

    Raises:
        SlivoError: If a glob matches no layer.
    """
    every = {name: each for name, each in model.named_modules() if _is_layer(each)}
    for glob in (*only, *exclude):
        if not matches(glob, every):
            raise SlivoError(f"{glob!r} matches no linear layer or convolution; there are {few(list(every)) or 'none'}")
    meant = {name: each for name, each in every.items() if wanted(name, only, exclude)}
    owners = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    left = {name: reason for name, each in meant.items() if (reason := _reason(each, owners))}
    sites = {name: Site(name, cast(Layer, each)) for name, each in meant.items() if name not in left}
    sites = _used(model, sites, call)
    left |= {name: "no call of it was seen on the first batch" for name in meant if name not in sites | left}
    read = _read_elsewhere(model, sites, call)
    left |= dict.fromkeys(read, "code outside of it reads its weight")
    return {name: site for name, site in sites.items() if name not in read}, left


def _is_layer(module: nn.Module) -> bool:
    """Tell modules that a reader would take for layers with a matrix, whether they can be factorized or not."""
    weight = getattr(module, "weight", None) if not isinstance(module, nn.Embedding | nn.EmbeddingBag) else None
    return isinstance(module, nn.RNNBase | QuantizedLayer) or (isinstance(weight, torch.Tensor) and weight.dim() > 1)


def _reason(layer: nn.Module, owners: Mapping[int, int]) -> str:
    """Say why a layer cannot be factorized; nothing if it can."""
    if isinstance(layer, QuantizedLayer):
        return "it is quantized: factorize first, quantize then"
    if type(layer) not in FACTORIZABLE:
        return f"it is a {type(layer).__name__}, and only Linear, Conv1d and Conv2d themselves are factorized"
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, nn.Parameter) or layer._forward_pre_hooks or layer._forward_hooks:
        return "hooks or parametrizations compute with it"
    if owners[id(weight)] > 1:
        return "its weight is tied"
    if not weight.is_floating_point():
        return f"its weight is of {str(weight.dtype).removeprefix('torch.')}"
    return "it has groups" if getattr(layer, "groups", 1) > 1 else ""


def _used(model: nn.Module, sites: Mapping[str, Site], call: Call) -> dict[str, Site]:
    """Note what layers read and give out in a run; returns those that were called, in the order of first calls."""
    order: dict[str, Site] = {}
    samples = batch_size(call)

    def note(site: Site, args: Any, kwargs: Any, output: Tensor) -> None:
        given: Tensor = args[0] if args else kwargs["input"]
        dims = len(site.shape) - 2
        ends = (given.dim() - dims, output.dim() - dims)
        # A linear layer's features are last, a convolution's channels come before the image.
        many = prod(given.shape[:-1]) if not dims else prod(given.shape[: ends[0] - 1])
        site.uses.append((many, tuple(given.shape[ends[0] :]), tuple(output.shape[ends[1] :])))
        site.samples = samples
        order[site.name] = site

    with ExitStack() as stack:
        for site in sites.values():
            hook = site.layer.register_forward_hook(
                lambda _, args, kwargs, output, site=site: note(site, args, kwargs, output), with_kwargs=True
            )
            stack.callback(hook.remove)
        args, kwargs = fresh(call)
        model(*args, **kwargs)
    return order


def _read_elsewhere(model: nn.Module, sites: Mapping[str, Site], call: Call) -> list[str]:
    """Return the layers that cannot be sequences, because code reads what a layer has and a sequence has not."""
    if not sites or _runs(model, list(sites.values()), call):
        return []
    return [name for name, site in sites.items() if not _runs(model, [site], call)]


def _runs(model: nn.Module, sites: Sequence[Site], call: Call) -> bool:
    """Tell whether a model runs with some layers each in a sequence of one."""
    args, kwargs = fresh(call)
    with exchanged(model, [(site.layer, nn.Sequential(site.layer)) for site in sites]) as other:
        try:
            other(*args, **kwargs)
        except (AttributeError, TypeError):
            return False
    return True
