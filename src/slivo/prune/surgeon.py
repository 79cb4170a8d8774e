"""Surgeon: choose what to cut by the error that is left once the weights that stay have made up for it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slivo.errors import SlivoError, TargetError
from slivo.graph import Axis, Graph, as_args, trace
from slivo.graph.capture import evaluating
from slivo.graph.checks import check_values
from slivo.graph.copies import duplicate
from slivo.graph.inputs import ExampleInputs
from slivo.measure import readers
from slivo.measure.budget import Budget, check_budget
from slivo.measure.quality import distribution
from slivo.measure.readers import Reader, Watch, aten, grams, key, lay_out_, squares
from slivo.options import MinWidth, check_batches, check_widths
from slivo.prune import runs
from slivo.prune.budget import allocate
from slivo.prune.plans import Plan
from slivo.prune.width import candidates

_log = logging.getLogger("slivo")


def surgeon(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    keep: Budget,
    batches: Iterable[Any],
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    min_width: MinWidth = 0.1,
    round_to: int = 1,
    damping: float = 1e-3,
    graph: Graph | None = None,
) -> Plan:
    """Choose what `refit` makes up for best: positions go one by one, each the one whose loss is least by then.

    Criteria score each position as if it went alone. Of two channels that say the same, either can go, but not both;
    and when half of an axis goes, most of what is lost was shared. Here each removal is followed, on paper, by the
    best correction of the weights that stay (`slivo.prune.criteria.obs` after each step). What is then lost, in each
    output of the layers that read the axis, counts by how sharply the model's answer hangs on that output.

    Between axes these losses compare half by size and half by rank: in nats for each multiply-accumulate saved (each
    parameter, if the budget names only those) they starve layers whose losses are estimated too small, since losses
    add up to more than their sum; as shares of their mean on the axis they forget which layers matter. The geometric
    mean of both is what positions are ranked by.

    Args:
        model: The trained model; it is left untouched. It gives out logits, as for the criterion ``kl``.
        example_inputs: As for `prune`.
        keep: What may stay, in MACs, parameters or bytes.
        batches: Example inputs, unlabelled, each as for `prune`; a few hundred samples, best those of `refit`.
        only: As for `prune`.
        exclude: As for `prune`. Axes that no linear layer or convolution reads are left whole.
        min_width: As for `prune`.
        round_to: As for `prune`.
        damping: Added to the diagonal of a layer's second moments, as a share of its mean; as `refit`'s ridge.
        graph: What `slivo.trace` said of the model; traced here if None.

    Returns:
        A plan for `cut`; then give the batches to `refit`.

    Raises:
        CaptureError: If the model does not run on the inputs or cannot be captured.
        TargetError: If the budget cannot be met, or has a latency.
        SlivoError: If a glob matches nothing, there are no batches or no logits, or no axis can be judged.

    For a layer that reads x and gives out Wx, removing the columns i costs tr(S Wᵢ [(H⁻¹)ᵢᵢ]⁻¹ Wᵢᵀ) / 2 with H = Σ xxᵀ
    a sample and S the diagonal of mean squared gradients of the log-likelihood of drawn answers; then W becomes W −
    Wᵢ [(H⁻¹)ᵢᵢ]⁻¹ (H⁻¹)ᵢ, and H⁻¹ loses the columns by block elimination.

    Source: Hassibi, Stork 1993, "Second order derivatives for network pruning: Optimal Brain Surgeon"; with the Fisher
    information as a product of inputs' and outputs' for whole channels, Wang, Grosse, Fidler, Zhang 2019,
    "EigenDamage", arXiv:1905.05934, section 3. Greedy removal and how axes compare are ours.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
        >>> with torch.no_grad():  # the second half says what the first does
        ...     _ = net[0].weight[3:].copy_(net[0].weight[:3]), net[0].bias[3:].copy_(net[0].bias[:3])
        >>> found = surgeon(net, torch.randn(2, 4), keep=Budget(macs=0.5), batches=[torch.randn(64, 4)])
        >>> sorted(position % 3 for position in found.keep["0 out"])
        [0, 1, 2]
    """
    check_budget(keep)
    if keep.timed:
        raise TargetError("the budget has a latency; surgeon plans for macs=…, params=… or bytes=…, prune for latency")
    check_widths(min_width, round_to)
    check_batches(batches)
    check_values(model)
    graph = graph or trace(model, example_inputs)
    axes = candidates(graph, keep, only=only, exclude=exclude)
    judged = _judged(model, axes, batches)
    if not judged:
        raise SlivoError("no linear layer or convolution reads any of the axes; use prune, with a criterion")
    scores = {name: _ranked(losses(each, damping), _saved(graph, graph[name], keep)) for name, each in judged.items()}
    if len(judged) < len(axes):
        whole = ", ".join(axis.name for axis in axes if axis.name not in judged)
        _log.info("left whole, because no linear layer or convolution reads them: %s", whole)
    kept = allocate(graph, scores, keep, min_width=min_width, round_to=round_to)
    return Plan.of(axes, kept)


@dataclass(frozen=True)
class Judged:
    """A weight that reads an axis, and how sharply the answer hangs on what it gives out.

    Args:
        reader: The weight and what it reads, second moments summed over places and averaged over samples.
        gradients: Mean squared gradient of each output, shape (outputs,).
    """

    reader: Reader
    gradients: Tensor


def losses(judged: Sequence[Judged], damping: float) -> NDArray[np.float64]:
    """Return what each position of an axis costs when its turn comes, the cheapest going first.

    Args:
        judged: The weights that read the axis.
        damping: As for `surgeon`.

    Returns:
        Nats a sample, shape (positions,), not falling in the order in which positions go. The last to go cost what is
        left of the weights.
    """
    sides = [_Side(each, damping) for each in judged]
    alive = torch.ones(len(judged[0].reader.places), dtype=torch.bool)
    found, highest = torch.zeros(len(alive), dtype=torch.float64), 0.0
    for _ in range(len(alive)):
        left = alive.nonzero().flatten()
        costs = torch.stack([side.costs(left) for side in sides]).sum(0)
        place = int(costs.argmin())
        highest = max(highest, float(costs[place]))
        found[left[place]] = highest
        alive[left[place]] = False
        for side in sides:
            side.remove(int(left[place]))
    return found.numpy()


class _Side:
    """One weight that reads the axis, corrected after each removal; in float64."""

    def __init__(self, judged: Judged, damping: float) -> None:
        gram = judged.reader.gram.double().cpu()
        mean = gram.diagonal().mean()
        added = damping * (mean if mean > 0 else torch.ones_like(mean))
        self.inverse = torch.linalg.inv(gram + added * torch.eye(len(gram), dtype=gram.dtype))
        self.places = judged.reader.places.cpu()
        scale = judged.gradients.double().cpu().sqrt()
        self.weights = gram.new_zeros(len(gram), len(scale))
        self.weights[self.places] = judged.reader.weights.double().cpu() * scale

    def costs(self, positions: Tensor) -> Tensor:
        """Return what positions cost now, shape (positions,)."""
        places = self.places[positions]
        weights = self.weights[places]
        blocks = self.inverse[places[:, :, None], places[:, None, :]]
        found: Tensor = 0.5 * (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))
        return found

    def remove(self, position: int) -> None:
        """Take the columns of a position out, and correct the others."""
        places = self.places[position]
        rows = torch.linalg.solve(self.inverse[places[:, None], places], self.inverse[places])
        self.weights -= rows.mT @ self.weights[places]
        self.inverse -= self.inverse[:, places] @ rows


class _Gradients(Watch):  # type: ignore[no-untyped-call]
    """Takes statistics of the gradients that reach the outputs of weights, while they flow back."""

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Look at the gradient that a convolution is given; that of a product is a factor of one with the weight."""
        if func is aten.convolution_backward.default:
            gradient, _, view = args[:3]
            named, groups = self._name(view), args[9]
            if named is not None:
                rows = gradient.detach().movedim(1, -1).flatten(0, -2)
                self._add(named[0], 0, self.statistic(rows.reshape(len(rows), groups, -1).movedim(1, 0)))
        return super().__torch_dispatch__(func, types, args, kwargs)


def _judged(model: nn.Module, axes: Sequence[Axis], batches: Iterable[Any]) -> dict[str, list[Judged]]:
    """Run the batches forward and back; return what reads each axis, of the axes that anything reads."""
    with torch.inference_mode(False):
        twin = lay_out_(duplicate(model).requires_grad_(True))
        weights = dict(twin.named_parameters(remove_duplicate=False))
    reading = {axis.name: [member for member in axis.members if member.reads] for axis in axes}
    seen = Watch(weights, grams, spread=False)
    felt, flowed = _Gradients(weights, squares, spread=False), _Gradients(weights, _counts, spread=False)
    generator, samples = torch.Generator().manual_seed(0), 0
    with evaluating(twin), torch.inference_mode(False), torch.enable_grad():
        for batch in batches:
            args, kwargs = as_args(runs.usable(batch))
            with seen:
                log = distribution(twin(*args, **kwargs))
            samples += len(log)
            chances = log.detach().exp().double().cpu().flatten(0, -2)
            drawn = torch.multinomial(chances, 1, generator=generator).to(log.device)
            with felt, flowed:
                torch.autograd.grad(log.flatten(0, -2).gather(1, drawn).sum(), [*weights.values()], allow_unused=True)
    if not samples:
        raise SlivoError("there are no batches; give at least one, as batches=[images]")
    found: dict[str, list[Judged]] = {}
    for name, members in reading.items():
        for member in members:
            used, back = key(member.tensor, member.dim), key(member.tensor, 1 - member.dim)
            if used not in seen.found or back not in felt.found:
                continue
            gradients = felt.found[back] / flowed.found[back].clamp(min=1)
            laid = readers.lay([member], weights, {used: seen.found[used] / samples})
            for reader, each in zip(laid, gradients.expand(len(laid), -1), strict=True):
                repeats = reader.weights.shape[-1] // len(each)
                found.setdefault(name, []).append(Judged(reader, each.repeat_interleave(repeats)))
    return found


def _counts(gradients: Tensor) -> Tensor:
    """Number of rows, for each column."""
    return torch.full_like(gradients[:, 0], gradients.shape[1])


def _ranked(costs: NDArray[np.float64], saved: float) -> NDArray[np.float64]:
    """Return the geometric mean of losses in nats for a unit saved, and as shares of their mean."""
    mean = float(costs.mean())
    return costs / np.sqrt(saved * mean) if mean > 0 else costs


def _saved(graph: Graph, axis: Axis, keep: Budget) -> float:
    """Return what a position of an axis saves, as a share of the model: of what the budget names, MACs first."""
    macs, params = graph.count({axis.name: axis.size - 1})
    saved = 1 - macs / graph.macs if keep.macs is not None and graph.macs else 1 - params / graph.params
    return max(saved, 1e-9)
