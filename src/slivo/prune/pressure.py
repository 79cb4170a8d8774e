"""Pressure: what drives weights, or all that belongs to a position of an axis, towards zero while a network trains.

Each function returns a `Pressure`, a hook of `slivo.train.fit` that is as easily called from a loop of one's own. After
each step of the optimizer, weights make a proximal step of the same learning rate: it is stable at any strength, does
not mix with momenta and adaptive scales, and makes zeros that are exact. With momentum m, gradients move a weight
1/(1−m) times as far as the learning rate says, and so weigh that much more against a strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slivo.errors import SlivoError
from slivo.graph import Graph
from slivo.options import is_count, said
from slivo.prune.groups import Rows, add_, held, products, rows_of, scale_
from slivo.prune.invariance import counted
from slivo.prune.plans import Plan
from slivo.prune.watch import NORMS
from slivo.prune.width import select
from slivo.train import Hook, TrainState

Groups = Mapping[str, tuple[Rows, ...]]
"""For each axis, by name, where the positions lie that are under pressure."""


@dataclass(frozen=True)
class Step:
    """A step of the optimizer that a pressure follows.

    Args:
        lr: The learning rate.
        number: Which step, from 1.
        last: The step by which what is driven to zero is to be there; 0 if there is none.
        before: Weights as they were before the step, by name, for a pressure that asks for them.
    """

    lr: float
    number: int
    last: int = 0
    before: Mapping[str, Tensor] = field(default_factory=dict)


class Pressure(Hook):
    """Moves weights after each step of the optimizer.

    In `slivo.train.fit` it is one of the hooks. In a loop of your own::

        loss.backward()
        pressure.before_step(model)
        optimizer.step()
        pressure.after_step(model, lr=0.01)

    What belongs to a position is moved whether it is frozen or not. Not together with `slivo.train.EMA`, whose mean of
    weights still holds what they were before they became zero.

    Args:
        move: ``move(model, step)`` changes weights in place.
        steps: The step by which weights are to be zero: a share of the training (a float; in `fit` alone) or a number.
        groups: What ``move`` must know of as it was before the step.
    """

    def __init__(
        self, move: Callable[[nn.Module, Step], None], *, steps: float | int = 0, groups: Groups | None = None
    ) -> None:
        _check_steps(steps)
        self.move = move
        self.steps = steps
        self.groups = groups or {}
        self.done = 0
        self.lr = 0.0
        self.last = 0 if isinstance(steps, float) else int(steps)
        self.before: dict[str, Tensor] = {}

    def before_step(self, model: nn.Module) -> None:
        """Remember what the step will change, before the optimizer's step."""
        if self.done < self.last:
            self.before = {name: value.clone() for name, value in held(model, self.groups.values()).items()}

    def after_step(self, model: nn.Module, lr: float) -> None:
        """Move weights, after the optimizer's step.

        Args:
            model: The model in training.
            lr: The learning rate of the step.

        Raises:
            SlivoError: If the pressure is to last for a share of a training, of which only `fit` knows the length.
        """
        if not self.last and isinstance(self.steps, float):
            raise SlivoError(f"steps is {self.steps}, a share of a training whose length is not known; give a number")
        self.done += 1
        with torch.no_grad():
            self.move(model, Step(lr, self.done, self.last, self.before))
        self.before = {}

    def on_fit_start(self, state: TrainState) -> None:
        """Turn a share of the training into a number of steps."""
        if isinstance(self.steps, float):
            self.last = max(1, round(self.steps * state.total_steps))

    def on_gradients(self, state: TrainState) -> None:
        """Remember weights, and the learning rate of the step to come."""
        self.lr = float(state.optimizer.param_groups[0]["lr"])
        self.before_step(state.model)

    def on_step_end(self, state: TrainState) -> None:
        """Move weights."""
        self.after_step(state.model, self.lr)

    def state_dict(self) -> dict[str, Any]:
        """Return how many steps are done."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up how many steps are done."""
        self.done = state["done"]


def l1(strength: float) -> Pressure:
    """Drive single weights to zero; biases and scales of norms are left alone.

    Args:
        strength: λ of the penalty λ·Σ|w|. 1e-5 to 1e-3 is common.

    Returns:
        The hook: w ← sign(w)·max(0, |w| − lr·λ).

    Raises:
        SlivoError: If the strength is no positive number.

    Source: Tibshirani 1996, "Regression Shrinkage and Selection via the Lasso"; the step is the proximal operator,
    Parikh, Boyd 2014, "Proximal Algorithms", section 6.5.2.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> _ = net.weight.data.copy_(torch.tensor([[0.3, -1.0]]))
        >>> l1(5.0).after_step(net, lr=0.1)
        >>> net.weight.tolist()
        [[0.0, -0.5]]
    """
    _check(strength)

    def move(model: nn.Module, step: Step) -> None:
        for weight in _matrices(model):
            weight.copy_(F.softshrink(weight, step.lr * strength))

    return Pressure(move)


def l2(strength: float) -> Pressure:
    """Shrink single weights; biases and scales of norms are left alone. Nothing becomes zero.

    Args:
        strength: λ of the penalty λ/2·Σw². 1e-4 to 1e-2 is common.

    Returns:
        The hook: w ← w / (1 + lr·λ).

    Raises:
        SlivoError: If the strength is no positive number.

    Source: Hoerl, Kennard 1970, "Ridge Regression"; apart from the gradient's step as in Loshchilov, Hutter 2017,
    arXiv:1711.05101.
    """
    _check(strength)

    def move(model: nn.Module, step: Step) -> None:
        for weight in _matrices(model):
            weight.div_(1 + step.lr * strength)

    return Pressure(move)


def slimming(strength: float) -> Pressure:
    """Drive scales of batch norms to zero: network slimming. Then cut by the criterion ``bn_scale``.

    Args:
        strength: λ of the penalty λ·Σ|γ|. The paper has 1e-4 and 1e-5.

    Returns:
        The hook: γ ← sign(γ)·max(0, |γ| − lr·λ).

    Raises:
        SlivoError: If the strength is no positive number, or, at the first step, if there is no batch norm with scales.

    Source: Liu, Li, Shen, Huang, Yan, Zhang 2017, "Learning Efficient Convolutional Networks through Network
    Slimming", arXiv:1708.06519, eq. 1; it takes a subgradient, which makes no exact zeros.
    """
    _check(strength)

    def move(model: nn.Module, step: Step) -> None:
        scales = [each.weight for each in model.modules() if isinstance(each, NORMS) and each.weight is not None]
        if not scales:
            raise SlivoError("the model has no batch norm with scales for slimming; use group_lasso, which needs none")
        for scale in scales:
            scale.copy_(F.softshrink(scale, step.lr * strength))

    return Pressure(move)


def group_lasso(graph: Graph, strength: float, *, only: Sequence[str] = (), exclude: Sequence[str] = ()) -> Pressure:
    """Drive whole positions of axes to zero: all that would go with a channel, head or unit is one group.

    A weight lies in the group of what it writes and in that of what it reads; the axes' proximal steps are made one
    after the other.

    Args:
        graph: The traced model.
        strength: λ of the penalty λ·Σ √n·‖w‖ over groups of n numbers. 1e-5 to 1e-3 is common.
        only: Globs over axis names and module paths, as for `prune`.
        exclude: Likewise.

    Returns:
        The hook: w ← w·max(0, 1 − lr·λ·√n/‖w‖) for each group.

    Raises:
        SlivoError: If the strength is no positive number, or no axis is left.

    Source: Yuan, Lin 2006, "Model selection and estimation in regression with grouped variables"; over channels, Wen,
    Wu, Wang, Chen, Li 2016, arXiv:1608.03665; over all that depends on one another, Fang et al. 2023, arXiv:2301.12900.
    """
    _check(strength)
    groups = {axis.name: rows_of(graph, axis) for axis in select(graph, only=only, exclude=exclude)}

    def move(model: nn.Module, step: Step) -> None:
        tensors = held(model, groups.values())
        for rows in groups.values():
            norms = products(rows, tensors, tensors).sqrt()
            threshold = step.lr * strength * math.sqrt(sum(each.numbers for each in rows))
            scale_(rows, tensors, (1 - threshold / norms).clamp(min=0).nan_to_num(0))

    return Pressure(move)


def greg(graph: Graph, plan: Plan, *, ceiling: float = 1.0, steps: float | int = 0.5) -> Pressure:
    """Shrink the positions that a plan lets go, by a penalty that grows until they are negligible (GReg-1).

    What stays takes over their work meanwhile. `left` says how much there still is of them.

    Args:
        graph: The traced model.
        plan: What stays; from `slivo.prune.plan`, so that the budget is met.
        ceiling: λ at the end. 1, the paper's, lets little more of a weight than its gradient.
        steps: Over which λ grows: a share of the training (a float; in `fit` alone) or a number. The paper's are tens
            of thousands.

    Returns:
        The hook: w ← w / (1 + lr·λ) with λ = ceiling · min(1, t / steps) at step t.

    Raises:
        SlivoError: If an argument is out of range.
        ShapeError: If the plan is none of this graph.

    Source: Wang, Qin, Zhang, Fu 2021, "Neural Pruning via Growing Regularization", arXiv:2012.09243, section 3.2.
    """
    _check(ceiling, "ceiling")
    groups = _going(graph, plan)

    def move(model: nn.Module, step: Step) -> None:
        tensors = held(model, groups.values())
        factor = 1 / (1 + step.lr * ceiling * min(1.0, step.number / max(1, step.last)))
        for rows in groups.values():
            scale_(rows, tensors, torch.full((len(rows[0].index),), factor))

    return Pressure(move, steps=steps)


def hspg(graph: Graph, plan: Plan, *, steps: float | int = 0.5, epsilon: float = 0.0) -> Pressure:
    """Drive the positions that a plan lets go to exactly zero, so that the cut changes nothing (zero-invariant groups).

    A group is all of a position: what writes it (weights, biases, scales and shifts of norms), and what reads it. Where
    every function on the way keeps zero at zero (ReLU, GELU, SiLU, tanh) the former would be enough. At each step a
    group is pulled back by as much as the optimizer has made it longer, and by its share of the way to zero. It is set
    to zero once it leaves the half-space of its last value, at the last step in any case, and stays zero.

    Args:
        graph: The traced model.
        plan: What stays; from `slivo.prune.plan`, so that the budget is met.
        steps: By when all are zero: a share of the training (a float; in `fit` alone) or a number. The rest of the
            training makes up for it.
        epsilon: From 0 up to 1; a group is zeroed once less than this share of it is left after a step.

    Returns:
        The hook. With w the group before the optimizer's step, w̃ after it and r steps to go:
        w̃ ← w̃ − max(0, ⟨w̃, w⟩/‖w‖² − 1 + 1/r)·w; then zero if ⟨w̃, w⟩ < ε‖w‖².

    Raises:
        SlivoError: If an argument is out of range, or zero positions of an axis that the plan cuts would count all the
            same (`slivo.prune.invariance.counted`).
        ShapeError: If the plan is none of this graph.

    Source: Chen et al. 2021, "Only Train Once", arXiv:2107.07467, algorithm 2 (half-space projection); the groups to go
    chosen beforehand, and for each a pull that outweighs the gradient, Chen et al. 2023, "OTOv2", arXiv:2303.06862.
    That the pull brings them to zero in a given number of steps is ours.
    """
    if isinstance(epsilon, bool) or not isinstance(epsilon, Real) or not 0 <= float(epsilon) < 1:
        raise SlivoError(f"epsilon is {said(epsilon)}; from 0 up to, not including, 1")
    groups = _going(graph, plan)
    bad = {name: why for name, why in counted(graph).items() if name in groups}
    if bad:
        name, why = next(iter(bad.items()))
        raise SlivoError(
            f"zero positions of axis {name!r} count in {why}, so that no cut goes without a trace; leave it out: "
            "plan(…, exclude=[glob.escape(name) for name in counted(graph)])"
        )

    def move(model: nn.Module, step: Step) -> None:
        tensors = held(model, groups.values())
        togo = step.last - step.number + 1
        for rows in groups.values():
            if togo <= 1:
                scale_(rows, tensors, torch.zeros(len(rows[0].index)))
                continue
            before = products(rows, step.before, step.before)
            along = (products(rows, tensors, step.before) / before).nan_to_num(0)
            pull = (along - 1 + 1 / togo).clamp(min=0)
            add_(rows, tensors, step.before, -pull)
            scale_(rows, tensors, ((along - pull >= epsilon) & (before > 0)).to(before.dtype))

    return Pressure(move, steps=steps, groups=groups)


def left(model: nn.Module, graph: Graph, plan: Plan) -> float:
    """Return how much is left of what a plan lets go: 0 if nothing is.

    Args:
        model: The model in training.
        graph: What `slivo.trace` said of it.
        plan: What stays.

    Returns:
        The largest norm of a position that goes, over the mean norm of those of its axis that stay; the worst axis's.
    """
    worst = 0.0
    for name, rows in _going(graph, plan).items():
        stays = rows_of(graph, graph[name], plan.keep[name])
        tensors = held(model, (rows, stays))
        gone, kept = (products(each, tensors, tensors).sqrt() for each in (rows, stays))
        worst = max(worst, float(gone.max() / kept.mean()) if bool(gone.any()) else 0.0)
    return worst


def _going(graph: Graph, plan: Plan) -> Groups:
    """Return where the positions lie that a plan lets go."""
    if not isinstance(plan, Plan):
        raise SlivoError(f"the plan is of type {type(plan).__name__}; give what slivo.prune.plan(…) returned")
    found = {}
    for name, kept in plan.fit(graph).items():
        axis, stays = graph[name], {*kept}
        found[name] = rows_of(graph, axis, [each for each in range(axis.size) if each not in stays])
    return found


def _matrices(model: nn.Module) -> list[Tensor]:
    """Return the weights that are trained, without biases and scales of norms."""
    return [each for each in model.parameters() if each.requires_grad and each.dim() > 1 and each.is_floating_point()]


def _check_steps(steps: object) -> None:
    share = isinstance(steps, float) and 0 < steps <= 1
    if not share and not is_count(steps):
        raise SlivoError(f"steps is {said(steps)}; a share of the training (0.5), or a number of steps, an int")


def _check(strength: object, what: str = "strength") -> None:
    if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 < float(strength) < math.inf:
        raise SlivoError(f"{what} is {said(strength)}; a positive number")
