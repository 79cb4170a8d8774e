"""Calibration: the ranges of a model's activations on real inputs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slivo.errors import SlivoError
from slivo.graph import as_args
from slivo.graph.capture import evaluating

BINS = 2048
"""Bins of the histograms: eight for each code of a byte."""


@dataclass
class Site:
    """A tensor to look at: what goes into a module or what comes out of it; and what was seen of it.

    Args:
        name: The module's name, for messages.
        module: The module.
        role: Which of its tensors.
        positive: Whether only the positive part counts.
    """

    name: str
    module: nn.Module
    role: Literal["input", "output"]
    positive: bool = False
    low: float = field(default=0.0, init=False)
    high: float = field(default=0.0, init=False)
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64), init=False)

    def widen(self, x: Tensor) -> None:
        """Extend the extremes, which start at zero, to cover a tensor.

        Raises:
            SlivoError: If the tensor is not finite.
        """
        low, high = (float(value) for value in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise SlivoError(
                f"the {self.role} of {self.name or 'the model'} is not finite on a calibration batch; mend the model "
                "or leave that batch out"
            )
        self.low, self.high = 0.0 if self.positive else min(self.low, low), max(self.high, high)

    def count(self, x: Tensor) -> None:
        """Add a tensor to the histogram between the extremes."""
        if self.high > self.low:
            self.counts += torch.histc(x.float().cpu(), BINS, self.low, self.high).double()


def calls(model: nn.Module, modules: Mapping[str, nn.Module], batch: Any) -> Counter[str]:
    """Count how often each module is called in one forward pass."""
    counted: Counter[str] = Counter()
    with ExitStack() as stack:
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(lambda *_, name=name: counted.update([name]))
            stack.callback(hook.remove)
        run(model, [batch])
    return counted


def observe(model: nn.Module, sites: Iterable[Site], batches: Sequence[Any]) -> None:
    """Run the model on all batches, twice: for the extremes of each site, and for its histogram between them.

    Args:
        model: Run in evaluation mode, without gradients; left as it was.
        sites: Where to look; they take up what is seen.
        batches: Arguments of the model, in any form that `slivo.graph.as_args` takes.

    Raises:
        SlivoError: If an activation is not finite.
    """
    for step in (Site.widen, Site.count):
        with _watching(sites, step):
            run(model, batches)


def best_range(site: Site, bits: int) -> tuple[float, float]:
    """Return the range whose codes lose least: of all shares of the extremes, the one of least squared error.

    Rounding errs less within a narrower range, clipping errs less with a wider one.

    Args:
        site: Holds a histogram.
        bits: Width of the codes.

    Source: Nagel et al. 2021, arXiv:2106.08295, section 3.1 (mean squared error).
    """
    levels, span = 2**bits - 1, site.high - site.low
    centers = site.low + span / BINS * (torch.arange(BINS, dtype=torch.float64) + 0.5)
    shares = torch.linspace(1.0, 0.2, 81, dtype=torch.float64)[:, None]
    scale = (shares * span / levels).clamp(min=1e-12)
    zero = (-shares * site.low / scale).round()
    rounded = ((centers / scale).round() + zero).clamp(0, levels) - zero
    error = ((rounded * scale - centers).square() * site.counts).sum(1)
    share = float(shares[int(error.argmin())])
    return share * site.low, share * site.high


@contextmanager
def _watching(sites: Iterable[Site], step: Callable[[Site, Tensor], None]) -> Iterator[None]:
    def before(site: Site) -> Callable[..., None]:
        return lambda _module, args, kwargs: step(site, next(iter((*args, *kwargs.values()))))

    def after(site: Site) -> Callable[..., None]:
        return lambda _module, _args, output: step(site, output)

    with ExitStack() as stack:
        for site in sites:
            if site.role == "input":
                stack.callback(site.module.register_forward_pre_hook(before(site), with_kwargs=True).remove)
            else:
                stack.callback(site.module.register_forward_hook(after(site)).remove)
        yield


def run(model: nn.Module, batches: Iterable[Any]) -> None:
    """Run a model on batches, in evaluation mode and without gradients."""
    with evaluating(model), torch.no_grad():
        for batch in batches:
            args, kwargs = as_args(batch)
            model(*args, **kwargs)
