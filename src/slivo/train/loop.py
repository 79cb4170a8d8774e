"""The one training loop: any objective, any hooks, resumable to the bit."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.data import DataLoader

from slivo.errors import SlivoError
from slivo.train import resume
from slivo.train.hooks import Hook, TrainState
from slivo.train.inside import Inside, get_random, rest
from slivo.train.keeping import Keeping, NotFiniteError
from slivo.train.optim import OptimizerSpec, build
from slivo.train.precision import Precision, choose, layout

Batch = Any

Objective = Callable[[nn.Module, Batch], Mapping[str, Tensor]]
"""Named terms, already weighted; their sum is the loss."""

_SGD = OptimizerSpec()


def fit(
    model: nn.Module,
    batches: DataLoader[Any],
    objective: Objective,
    *,
    epochs: int,
    optimizer: OptimizerSpec = _SGD,
    hooks: Sequence[Hook] = (),
    validate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    seed: int = 0,
    precision: Precision = "auto",
    checkpoint: Path | None = None,
    on_epoch: Callable[[Mapping[str, Any]], None] | None = None,
    extra_parameters: Iterable[Parameter] = (),
    rollbacks: int = 0,
) -> list[dict[str, Any]]:
    """Train a model in place, where it is (move it to the GPU first to train there).

    A training is a function of its arguments: before each epoch all random generators are set from (seed, epoch),
    and those of the caller are put back afterwards. Hence a training that was broken off and is called again with
    the same checkpoint goes on from there and ends bit-identical to one that was not (on the same machine with the
    same number of threads): after the last whole epoch, or in its midst with the hook `Saves`. For the latter a
    sampler must draw the order of an epoch by itself, as PyTorch's do, not from what the training draws from.

    Args:
        model: The model; all of it that requires gradients is trained. It ends in evaluation mode.
        batches: Training data. A sampler with ``set_epoch`` is told the epoch, a generator of its own is set like
            the others. A last batch of one sample is left out if the model has batch norm, which cannot take it.
        objective: ``(model, batch)`` to named terms, already weighted, whose sum is the loss.
        epochs: Passes over the data.
        optimizer: Optimizer and schedule.
        hooks: Called in this order at each point.
        validate: Called after each epoch, in evaluation mode and without gradients; its figures enter the row.
        seed: Of everything random in the training.
        precision: ``fp32``, ``bf16`` (autocast; weights stay fp32) or ``auto``: bf16 for convolutional nets with
            enough work in a batch on devices that have it (`slivo.train.precision.choose`).
        checkpoint: A file that is written after each epoch, atomically, and resumed from if it is there. Beside it
            are the one before (``….previous``), which is used if it is damaged, and one in the midst of an epoch
            (``….inside``).
        on_epoch: Gets each row once its epoch is done and its checkpoint is on the disk. Rows of a training that
            was broken off are not repeated, but are in what is returned.
        extra_parameters: Parameters outside the model to train with it, such as adapters.
        rollbacks: How often a training whose loss or weights are no longer finite goes back to the end of its last
            good epoch, and on at half the learning rate. 0 raises at once: in a loop of your own you may know better.
            Runs of recipes allow 3. Without a checkpoint this keeps a second copy of all that is trained.

    Returns:
        One row an epoch: ``epoch`` (from 1), ``loss``, ``terms`` (means over samples), ``lr`` (of the last step),
        ``val``, ``seconds`` (validation excluded) and ``samples_per_second``; of one that was begun several times
        ``rolled_back``, a note for each: ``epoch``, ``step``, ``why``, and ``lr``, the peak rate from then on.

    Raises:
        SlivoError: If the loss is not finite (before the model is changed by it), after so many rollbacks, or there is
            nothing to train.
        Stopped: If the hook `Saves` was told to.
        ArtifactError: If the checkpoint is damaged or belongs to another training.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> net = nn.Linear(4, 1)
        >>> data = DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4)
        >>> rows = fit(net, data, lambda net, batch: {"square": net(batch[0]).square().mean()}, epochs=2)
        >>> [row["epoch"] for row in rows], list(rows[0]["terms"])
        ([1, 2], ['square'])
    """
    if epochs < 1:
        raise SlivoError(f"epochs is {epochs}; it must be 1 or more")
    if rollbacks < 0:
        raise SlivoError(f"rollbacks is {rollbacks}; 0 or more")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    plan = _Plan(
        batches=batches,
        objective=objective,
        hooks=tuple(hooks),
        extra=tuple(extra_parameters),
        epochs=epochs,
        steps=_steps(model, batches),
        seed=seed,
    )
    stored = resume.load(checkpoint) if checkpoint is not None else None
    with _own_randomness(device):
        chosen = _precision(precision, model, device, plan, stored)
        settings = {
            "epochs": epochs,
            "steps_per_epoch": plan.steps,
            "seed": seed,
            "precision": chosen,
            "optimizer": asdict(optimizer),
        }
        laid_out = layout(model, device, chosen, lambda: _sample(plan, model, device))
        with laid_out, _accelerator(device, chosen) as accelerator, ExitStack() as closing:
            made, scheduler = build(optimizer, [*model.parameters(), *plan.extra], epochs * plan.steps)
            state = TrainState(model, made, scheduler, epochs=epochs, total_steps=epochs * plan.steps)
            keeping = Keeping(checkpoint, settings, state, plan.hooks, plan.extra, rollbacks)
            inside = keeping.restore(stored)
            for hook in plan.hooks:
                closing.callback(hook.on_close, state)
                hook.on_fit_start(state)
            keeping.begin(stored)
            while inside is not None or state.epoch < epochs:
                try:
                    row = _epoch(state, plan, accelerator, keeping, inside)
                except NotFiniteError as error:
                    inside = None
                    keeping.retreat(error)
                    continue
                inside = None
                row["val"] = _validated(model, validate)
                state.history.append(row)
                for hook in plan.hooks:
                    hook.on_epoch_end(state)
                keeping.save()
                if on_epoch is not None:
                    on_epoch(row)
            for hook in plan.hooks:
                hook.on_fit_end(state)
            made.zero_grad(set_to_none=True)
    model.eval()
    return state.history


@dataclass(frozen=True)
class _Plan:
    """What stays the same throughout a training."""

    batches: DataLoader[Any]
    objective: Objective
    hooks: tuple[Hook, ...]
    extra: tuple[Parameter, ...]
    epochs: int
    steps: int
    seed: int


def _precision(
    precision: Precision, model: nn.Module, device: torch.device, plan: _Plan, stored: Mapping[str, Any] | None
) -> Literal["fp32", "bf16"]:
    if precision != "auto":
        return precision
    if stored is not None:
        chosen: Literal["fp32", "bf16"] = stored["training"]["precision"]
        return chosen
    return choose(model, device, lambda: _sample(plan, model, device))


def _sample(plan: _Plan, model: nn.Module, device: torch.device) -> Mapping[str, Tensor]:
    """Run one batch, to see what the model does; not the training's first, whose randomness is its own."""
    _seed(plan.seed, 0, plan.batches)
    return plan.objective(model, send_to_device(next(iter(plan.batches)), device))


def _epoch(
    state: TrainState, plan: _Plan, accelerator: Accelerator, keeping: Keeping, inside: Inside | None
) -> dict[str, Any]:
    """Run one epoch, or what is left of it, and return its row, without validation."""
    if inside is None:
        state.epoch, inside = state.epoch + 1, Inside()
    _seed(plan.seed, state.epoch, plan.batches)
    state.model.train()
    started = time.perf_counter() - inside.seconds
    batches = rest(plan.batches, inside, accelerator.device)
    for raw in islice(batches, plan.steps - inside.batches):
        batch = send_to_device(raw, accelerator.device, non_blocking=True)
        rate = float(state.scheduler.get_last_lr()[0])
        _step(state, plan, batch, accelerator)
        inside.add(state.terms, _size(batch), rate)
        if state.save:
            inside.seconds = time.perf_counter() - started
            inside.random = get_random(plan.batches, accelerator.device)
            keeping.save(inside)
    keeping.check()
    seconds = time.perf_counter() - started
    terms = {name: value / inside.samples for name, value in inside.sums.items()}
    back = [note for note in state.setbacks if note["epoch"] == state.epoch]
    return {
        "epoch": state.epoch,
        "loss": sum(terms.values()),
        "terms": terms,
        "lr": inside.rate,
        "val": {},
        "seconds": seconds,
        "samples_per_second": inside.samples / seconds,
        **({"rolled_back": back} if back else {}),
    }


def _step(state: TrainState, plan: _Plan, batch: Batch, accelerator: Accelerator) -> None:
    for hook in plan.hooks:
        hook.on_step_start(state)
    state.optimizer.zero_grad(set_to_none=True)
    with accelerator.autocast():
        terms = plan.objective(state.model, batch)
    state.terms = {name: float(term.detach()) for name, term in terms.items()}
    if not math.isfinite(sum(state.terms.values())):
        shown = ", ".join(f"{name} = {value:g}" for name, value in state.terms.items())
        rate = f"{state.scheduler.get_last_lr()[0]:g}"
        raise NotFiniteError(f"the loss is not finite at epoch {state.epoch}, step {state.step + 1} ({shown})", rate)
    accelerator.backward(torch.stack([term.float() for term in terms.values()]).sum())
    for hook in plan.hooks:
        hook.on_gradients(state)
    state.optimizer.step()
    state.scheduler.step()
    state.step += 1
    for hook in plan.hooks:
        hook.on_step_end(state)


def _validated(model: nn.Module, validate: Callable[[nn.Module], Mapping[str, float]] | None) -> dict[str, float]:
    model.eval()
    if validate is None:
        return {}
    with torch.no_grad():
        return {name: float(value) for name, value in validate(model).items()}


def _steps(model: nn.Module, batches: DataLoader[Any]) -> int:
    """Return the number of batches to use of each epoch."""
    try:
        count = len(batches)
    except TypeError as error:
        raise SlivoError("the loader has no length, which the schedule needs; give its data set a __len__") from error
    if count == 0:
        raise SlivoError("there are no batches to train on; the data is empty, or smaller than one whole batch")
    if count == 1 or batches.batch_size in (None, 1) or batches.drop_last:
        return count
    size = len(batches.sampler)  # type: ignore[arg-type]
    lone = size % batches.batch_size == 1
    has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    return count - 1 if lone and has_batch_norm else count


def _size(batch: Batch) -> int:
    """Return the number of samples in a batch: the leading dimension of its first tensor, or 1 without any."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return next((_size(item) for item in items if isinstance(item, Tensor | Mapping | tuple | list)), 1)


def _seed(seed: int, epoch: int, batches: DataLoader[Any]) -> None:
    """Make everything random in an epoch a function of (seed, epoch)."""
    word = int(np.random.SeedSequence([seed % 2**63, epoch]).generate_state(1, np.uint32)[0])
    random.seed(word)
    np.random.seed(word)
    torch.manual_seed(word)
    for owner in (batches, batches.sampler, batches.batch_sampler):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(word)
        set_epoch = getattr(owner, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Give the caller's random generators and cuDNN setting back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    deterministic = torch.backends.cudnn.deterministic
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            torch.backends.cudnn.deterministic = True
            yield
        finally:
            torch.backends.cudnn.deterministic = deterministic
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _accelerator(device: torch.device, precision: Literal["fp32", "bf16"]) -> Iterator[Accelerator]:
    """Give an Accelerator on a device, whatever Accelerate was set to before, and put that back afterwards."""
    shared = [kind._shared_state for kind in (AcceleratorState, PartialState, GradientState)]
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if precision == "bf16" else "no")
        if accelerator.num_processes > 1:
            raise SlivoError("fit trains in one process; start it without a distributed launcher")
        # Accelerate takes the first GPU; the model may be on another.
        accelerator.state.device = device
        yield accelerator
    finally:
        for state, values in zip(shared, before, strict=True):
            state.clear()
            state.update(values)
