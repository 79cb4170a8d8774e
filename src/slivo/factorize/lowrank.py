"""Low rank: wide layers become products of thin ones."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from slivo import edits
from slivo.edits.factorize import Factorize, Factors
from slivo.errors import SlivoError, TargetError
from slivo.factorize.budgets import chosen_by_budget
from slivo.factorize.given import given, meant_by
from slivo.factorize.ladder import METHODS, Ladder, Method, enough, kinds, ladder
from slivo.factorize.passes import Sensitivity, fill_, walk
from slivo.factorize.sites import Site, find
from slivo.factorize.solve import Basis, basis, pieces
from slivo.graph import Call, ExampleInputs, as_args
from slivo.graph.capture import check_runs, trying
from slivo.graph.checks import check_values
from slivo.graph.copies import duplicate
from slivo.measure import Timer
from slivo.measure.budget import COUNTED, Budget, check_budget
from slivo.options import calls_of, few, is_count, is_number, listed, said
from slivo.train.progress import Report

_log = logging.getLogger("slivo")

By = Literal["loss", "sensitivity"]
Rank = int | tuple[int, int]


@dataclass(frozen=True)
class _Options:
    """How layers are measured and solved."""

    calls: Sequence[Call]
    methods: Mapping[str, Method]
    round_to: int
    damping: float
    hold: torch.device | str | None
    report: Report | None

    def method_of(self, site: Site) -> Method:
        """Return the method for a layer: of the first glob that matches."""
        return meant_by(self.methods, site.name, "auto")


def factorize(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    keep: Budget | None = None,
    energy: float | None = None,
    ranks: Mapping[str, Rank] | None = None,
    batches: Iterable[Any] | None = None,
    by: By = "loss",
    method: Method | Mapping[str, Method] = "auto",
    only: Sequence[str] | str = (),
    exclude: Sequence[str] | str = (),
    round_to: int = 1,
    damping: float = 0.01,
    timer: Timer | None = None,
    hold: torch.device | str | None = None,
    report: Report | None = None,
) -> nn.Module:
    """Return a model in which wide linear layers and convolutions are sequences of thin ones of low rank.

    No training and no labels. With ``batches`` the factors are those that change least what layers give out on the
    samples (activation-aware); without, those that are nearest to the weights. Each layer is measured behind those
    that have been factorized already, and only one block's measurements are held at a time.

    What takes a layer's place is a `torch.nn.Sequential` of linear layers or convolutions, with the bias in the last,
    and with the stride, padding and dilation parted among them. Layers with tied weights or groups, of subclasses,
    quantized, or whose weights other code reads, stay as they are; the edit on the result's record says why
    (`slivo.edits.factorize.Factorize.left`).

    Args:
        model: The trained model, on any device; it is left untouched.
        example_inputs: A tensor, a tuple of positional arguments or a mapping of keyword arguments.
        keep: What may stay of the whole model: parameters, MACs, bytes or latency. Ranks are chosen for all layers
            together; what is counted is hit up to the next step of a rank, and never exceeded.
        energy: In place of ``keep``: the share of each layer's squared output (with ``batches``) or squared singular
            values that the factors keep, as 0.95.
        ranks: For layers, by name or glob, their ranks: a number, or for Tucker-2 two (inputs, outputs). Other layers
            follow ``keep`` or ``energy``, or stay as they are if neither is given. The first entry that matches
            decides.
        batches: Inputs as for `prune`, where the model is. A hundred sequences or a few hundred images, unlabelled;
            all are held in memory.
        by: How ``keep`` weighs layers: ``loss`` by the shares that they lose themselves; ``sensitivity`` by how far
            the model's outputs move, in nats, when a layer alone is factorized, measured on the batches at three
            ranks. It costs three runs over the batches a layer.
        method: For convolutions: ``channel`` (k x k to few channels, then 1 x 1; or 1 x 1 first), ``spatial``
            (k x 1, 1 x k), ``tucker2`` (1 x 1, k x k, 1 x 1), ``cp`` (1 x 1, k x 1 and 1 x k of each channel alone,
            1 x 1; needs the extra ``factorize``) or ``auto``: of the first three, for each layer, what loses least at
            equal cost. Or a mapping of globs to these. Linear layers have but one way, and kernels along one
            dimension are parted by channels.
        only: Globs over names of layers and modules; if given, no others are factorized.
        exclude: Globs over names of layers and modules that stay as they are.
        round_to: Ranks are multiples of this, for hardware that likes them (8, 16, 32).
        damping: With ``batches``: what is added to the diagonal of XᵀX, as a share of its mean; how much weight
            directions have that the samples do not show.
        timer: Times models for a budget of latency; if None, PyTorch on the example inputs.
        hold: Device for what is kept of the samples between blocks; ``"cpu"`` frees an accelerator's memory.
        report: Told after each part: its name, how many are done, of how many, and the share of weights ``kept``.

    Returns:
        A new model that carries a `slivo.edits.Factorize`.

    Raises:
        TargetError: If the budget cannot be met; says what the least is.
        SlivoError: If an option is out of its range, a glob matches nothing, nothing can be factorized, a rank that is
            given saves nothing, or a layer reads or holds what is no finite number.
        CaptureError: If the model does not run on the inputs.

    Formula: W ≈ U (UᵀW), U = the first r left singular vectors of W S, S Sᵀ = XᵀX + damping; a layer of m outputs and
    n inputs has r (m + n) weights in place of m n, so r below m n / (m + n) saves. Kinds and sources:
    `slivo.factorize.solve.basis`.

    Example:
        >>> net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        >>> small = factorize(net, torch.randn(2, 16), ranks={"0": 4}, batches=[torch.randn(64, 16)])
        >>> small[0]
        Sequential(
          (0): Linear(in_features=16, out_features=4, bias=False)
          (1): Linear(in_features=4, out_features=16, bias=True)
        )
    """
    _check(keep, energy, ranks, by, batches)
    options = _options(batches, method, round_to, damping, hold, report)
    only, exclude = listed(only, "only"), listed(exclude, "exclude")
    check_runs(model, example_inputs)
    check_values(model)
    with torch.inference_mode(False):
        work = duplicate(model)
        with trying(work):
            sites, left = find(work, Call(*as_args(example_inputs)), only, exclude)
            if not sites:
                raise SlivoError(f"nothing can be factorized: {_why(left)}")
            chosen = dict(given(sites, ranks or {}, options.method_of))
            free = {name: site for name, site in sites.items() if name not in chosen}
            if keep is not None or energy is not None:
                ladders = _ladders(work, free, options, counted(keep), by)
                if energy is not None:
                    found = {each.name: enough(each, energy) for each in ladders}
                else:
                    assert keep is not None
                    found = chosen_by_budget(model, example_inputs, keep, sites, chosen, ladders, timer)
                chosen |= {name: factors for name, factors in found.items() if factors is not None}
                why = "the budget leaves it" if keep is not None else "no rank that saves keeps the energy"
                left |= dict.fromkeys((name for name in free if name not in chosen), why)
            chosen = {name: chosen[name] for name in sites if name in chosen}
            weights = _solved(work, {name: sites[name] for name in chosen}, chosen, options)
        for name, reason in left.items():
            _log.info("%s stays as it is: %s", name, reason)
        new = edits.apply(model, Factorize(chosen, left))
        for name, thin in weights.items():
            fill_(new.get_submodule(name), thin)
        return new


def counted(keep: Budget | None) -> tuple[str, ...]:
    """Return what a budget counts; parameters where it counts nothing."""
    found = tuple(name for name in COUNTED if keep is not None and getattr(keep, name) is not None)
    return found or ("macs",) if keep is not None and keep.timed else found or ("params",)


def _check(keep: object, energy: object, ranks: object, by: object, batches: object) -> None:
    if keep is not None:
        check_budget(keep)
    if keep is not None and energy is not None:
        raise TargetError("there are keep and energy; give one of them")
    if keep is None and energy is None and not ranks:
        raise TargetError(
            "nothing says how small the layers become; give keep=Budget(params=0.5), energy=0.95 or ranks={'fc1': 16}"
        )
    if ranks is not None and not isinstance(ranks, Mapping):
        raise SlivoError(f"ranks is {said(ranks)}; a mapping of names or globs to ranks, as ranks={{'fc1': 16}}")
    if energy is not None and not (is_number(energy) and 0 < energy < 1):
        raise SlivoError(f"energy is {said(energy)}; a share between 0 and 1, as 0.95")
    if by not in get_args(By):
        raise SlivoError(f"by is {said(by)}; one of {', '.join(get_args(By))}")
    if by == "sensitivity" and (batches is None or keep is None):
        raise SlivoError("by='sensitivity' measures on batches how to part a budget; give batches=[…] and keep=…")


def _options(
    batches: Iterable[Any] | None,
    method: object,
    round_to: int,
    damping: object,
    hold: torch.device | str | None,
    report: Report | None,
) -> _Options:
    methods: Mapping[Any, Any] = method if isinstance(method, Mapping) else {"*": method}
    for each in methods.values():
        if each not in METHODS:
            raise SlivoError(f"method is {said(each)}; one of {', '.join(METHODS)}, or a mapping of globs to these")
    if not is_count(round_to, least=1):
        raise TargetError(f"round_to is {said(round_to)}; an int of at least 1 (8 makes ranks multiples of 8)")
    if not (is_number(damping) and 0 <= damping < inf):
        raise SlivoError(f"damping is {said(damping)}; 0 or a positive number, 0.01 adds a hundredth of the mean")
    calls = calls_of(batches) if batches is not None else []
    return _Options(calls, methods, round_to, float(damping), hold, report)


def _why(left: Mapping[str, str]) -> str:
    return few([f"{name or 'the model'}: {reason}" for name, reason in left.items()]) or (
        "there is no linear layer and no convolution that only and exclude leave"
    )


def _bases(site: Site, method: Method, gram: Tensor | None, damping: float) -> dict[str, Basis]:
    try:
        return {kind: basis(kind, site.layer.weight, gram, damping=damping) for kind in kinds(site, method)}
    except SlivoError as error:
        raise SlivoError(f"{site.name}.weight: {error}") from error


def _ladders(
    model: nn.Module, sites: Mapping[str, Site], options: _Options, counted: Sequence[str], by: By
) -> list[Ladder]:
    """Measure what each layer could become, in the model as it is."""
    found = []
    sensitivity = Sensitivity(model, options.calls) if by == "sensitivity" else None
    for _, seen in walk(model, sites, options.calls, options.hold):
        for name, gram in seen.items():
            bases = _bases(sites[name], options.method_of(sites[name]), gram, options.damping)
            steps = ladder(sites[name], bases.values(), counted, options.round_to)
            found.append(steps if sensitivity is None else sensitivity.weigh(steps, sites[name], bases))
    return found


def _solved(
    model: nn.Module, sites: Mapping[str, Site], chosen: Mapping[str, Factors], options: _Options
) -> dict[str, list[Tensor]]:
    """Factorize a model's layers in place, one part after the other; returns the weights."""
    done: dict[str, list[Tensor]] = {}
    for part, seen in walk(model, sites, options.calls, options.hold):
        for name, gram in seen.items():
            site, factors = sites[name], chosen[name]
            if gram is None and options.calls:
                _log.warning("%s is factorized by its weight alone: no product with it was seen on the batches", name)
            found = pieces(basis(factors.kind, site.layer.weight, gram, damping=options.damping), factors.ranks)
            done[name] = [each.to(site.layer.weight.dtype) for each in found]
            Factorize({name: factors}).apply_(model)
            if name:
                fill_(model.get_submodule(name), done[name])
        if options.report is not None:
            kept = sum(each.numel() for name in seen for each in done[name])
            whole = sum(sites[name].layer.weight.numel() for name in seen)
            options.report(part, len(done), len(sites), {"kept": kept / whole})
    return done
