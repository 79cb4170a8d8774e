"""Quantization-aware training: the network trains as it will compute, and learns to live with the rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slivo.edits.quantize import Ranges, affine, round_to_codes
from slivo.edits.uniform import Grid, encode
from slivo.errors import SlivoError
from slivo.options import calls_of, is_count, is_number, listed, said
from slivo.quantize.plan import Plan, planned
from slivo.quantize.post import int8_static
from slivo.train.hooks import Hook, TrainState

_BITS = 8
"""Of activations."""

Span = tuple[float, float]


class Rounding(nn.Module):
    """How one tensor of activations is rounded in a training: to unsigned codes of a range that can be learned.

    Args:
        span: The range to begin with; it includes zero.

    Attributes:
        stretch: By how much, as natural logarithms, both ends are further from zero than at the beginning.

    Source: Jain, Gural, Wu, Dick 2019, "Trained Quantization Thresholds", arXiv:1903.08066 (logarithms, so that one
    learning rate suits all ranges); gradients as in Esser, McKinstry, Bablani, Appuswamy, Modha 2019, "Learned Step
    Size Quantization", arXiv:1902.08153, eq. 3.
    """

    start: Tensor

    def __init__(self, span: Span) -> None:
        super().__init__()
        self.register_buffer("start", torch.tensor(span))
        self.stretch = nn.Parameter(torch.zeros(2))

    @property
    def span(self) -> Span:
        """The range as it is now."""
        low, high = (self.start.double() * self.stretch.detach().double().exp()).tolist()
        return low, high

    def forward(self, x: Tensor) -> Tensor:
        """Round a tensor; gradients pass what is within the range, and move its ends."""
        ends = self.start * self.stretch.exp()
        rounded: Tensor = _Round.apply(x.float(), ends, self.span)  # type: ignore[no-untyped-call]
        return rounded.to(x.dtype)


class _Round(torch.autograd.Function):
    """Rounding with the gradient of clipping, and of the steps that the ends of the range make."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, span: Span) -> Tensor:
        step, zero = affine(span, _BITS)
        scale = torch.tensor(step, device=x.device)
        rounded = round_to_codes(x, scale, torch.tensor(zero, dtype=torch.uint8, device=x.device), _BITS)
        low, high = -zero * step, (2**_BITS - 1 - zero) * step
        ctx.save_for_backward(x < low, x > high, (rounded - x) / (2**_BITS - 1) / scale)
        ctx.learned = ends.requires_grad
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (gradient,) = gradients
        below, above, slack = ctx.saved_tensors
        inside = torch.where(below | above, 0, gradient)
        if not ctx.learned:
            return inside, None, None
        within = (inside * slack).sum()
        low = torch.where(below, gradient, 0).sum() - within
        high = torch.where(above, gradient, 0).sum() + within
        return inside, torch.stack([low, high]), None


class _Straight(torch.autograd.Function):
    """A weight as its codes say it, whose gradient is handed on as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int) -> Tensor:
        del ctx
        return rounded_weight(weight, bits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        del ctx
        return gradients[0], None


def rounded_weight(weight: Tensor, bits: int) -> Tensor:
    """Return a weight as its codes say it, one scale an output channel.

    A batch norm behind the layer multiplies each channel by a number, and its scale with it: the codes are those of the
    folded weight.
    """
    coded = encode(weight.detach().float(), Grid(bits))
    scale = coded.scale.reshape(-1, *[1] * (weight.dim() - 1)).float()
    return (coded.codes * scale).to(weight.dtype)


class Rehearsal(nn.Module):
    """What a model is given to train as it will be quantized.

    Attributes:
        roundings: What rounds activations: inputs of layers, and outputs where kernels round them, too.
        weight_bits: Width of the weights' codes.
    """

    def __init__(self, model: nn.Module, found: Plan, spans: Mapping[str, Ranges], weight_bits: int) -> None:
        super().__init__()
        self.found, self.weight_bits = found, weight_bits
        self.behind = {layer: norm for norm, layer in found.folded.items()}
        self.roundings = nn.ModuleDict()
        device = next(iter(model.parameters())).device
        for name in found.layers:
            for role in ("activation", "output"):
                span = getattr(spans[name], role)
                if span is not None:
                    self.roundings[_key(name, role)] = Rounding(span).to(device)

    @property
    def ranges(self) -> dict[str, Ranges]:
        """The ranges of each layer, as `slivo.quantize` takes them."""

        def span(name: str, role: str) -> Span | None:
            rounding = dict(self.roundings.items()).get(_key(name, role))
            return rounding.span if isinstance(rounding, Rounding) else None

        return {name: Ranges(span(name, "activation"), span(name, "output")) for name in self.found.layers}

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Have a model compute with rounded weights and activations within a block; its parameters keep their names."""
        modules = dict(model.named_modules())
        with ExitStack() as stack:
            for name in self.found.layers:
                layer = modules[name]
                incoming = self.roundings[_key(name, "activation")]
                stack.callback(layer.register_forward_pre_hook(self._before(incoming), with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(_restore, always_call=True).remove)
                if _key(name, "output") in self.roundings:
                    outgoing = self.roundings[_key(name, "output")]
                    last = modules[self.behind.get(name, name)]
                    stack.callback(last.register_forward_hook(_after(outgoing)).remove)
            yield

    def _before(self, rounding: nn.Module) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        bits = self.weight_bits

        def before(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            # Seen before the parameter of that name, which stays what the optimizer and checkpoints know.
            module.__dict__["weight"] = _Straight.apply(module.weight, bits)  # type: ignore[no-untyped-call]
            if args:
                return (rounding(args[0]), *args[1:]), kwargs
            first = next(iter(kwargs))
            return args, {**kwargs, first: rounding(kwargs[first])}

        return before

    @torch.no_grad()
    def settle_(self, model: nn.Module) -> None:
        """Set the weights of a model to what their codes say."""
        modules = dict(model.named_modules())
        for name in self.found.layers:
            weight: Any = modules[name].weight
            weight.copy_(rounded_weight(weight, self.weight_bits))


def _restore(module: nn.Module, *_: Any) -> None:
    module.__dict__.pop("weight", None)


def _after(rounding: nn.Module) -> Callable[..., Tensor]:
    return lambda _module, _args, output: rounding(output)


def _key(name: str, role: str) -> str:
    return f"{name} {role}".replace(".", "/")


def rehearse(
    model: nn.Module, batches: Iterable[Any], *, weight_bits: int = 7, exclude: Sequence[str] = ()
) -> Rehearsal:
    """Look what a model's quantization will be, and calibrate the ranges to begin with.

    Raises:
        SlivoError: If there are no batches, there is nothing to quantize, or an option is wrong.
    """
    if not is_count(weight_bits, least=2) or weight_bits > 8:
        raise SlivoError(f"weight_bits is {said(weight_bits)}; a whole number from 2 to 8")
    calls = calls_of(batches)
    found = planned(model, calls[0], listed(exclude, "exclude"))
    if not found.layers:
        raise SlivoError(f"{type(model).__name__} has nothing to quantize: no linear layer or convolution is called")
    return Rehearsal(model, found, int8_static(model, found, calls, weight_bits).ranges, weight_bits)


@contextmanager
def aware(
    model: nn.Module, batches: Iterable[Any], *, weight_bits: int = 7, exclude: Sequence[str] = ()
) -> Iterator[Rehearsal]:
    """Have code of one's own train a model as it will be quantized; for `slivo.train.fit` there is `QuantizationAware`.

    Within the block each layer that `slivo.quantize` would take computes with rounded weights and rounded inputs.
    Gradients pass the rounding as if it were not there, but not what a range cuts off. Parameters are the same all
    along and keep their names. After the block the weights are what their codes say, and `slivo.quantize` with the
    ranges gives a model that computes the same.

    Args:
        model: It is changed.
        batches: Real inputs, from which the ranges come.
        weight_bits: As in `slivo.quantize`, and to be given to it again.
        exclude: As in `slivo.quantize`, and to be given to it again.

    Yields:
        What rounds: give its ``parameters()`` to the optimizer, too, with a learning rate of 0.001 to 0.01, to learn
        the ranges; its ``ranges`` are for `slivo.quantize`.

    Raises:
        SlivoError: If there are no batches, or there is nothing to quantize.

    Source: Jacob et al. 2017, arXiv:1712.05877, section 3; Bengio, Léonard, Courville 2013, arXiv:1308.3432.

    Example:
        >>> import slivo
        >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
        >>> adam = torch.optim.Adam(net.parameters(), lr=0.01)
        >>> with aware(net, [x]) as rehearsal:
        ...     net(x).square().mean().backward()
        ...     adam.step()
        ...     trained = net(x)
        >>> small = slivo.quantize(net, batches=[x], ranges=rehearsal.ranges)
        >>> torch.allclose(small(x), trained, atol=1e-4)
        True
    """
    rehearsal = rehearse(model, batches, weight_bits=weight_bits, exclude=exclude)
    with rehearsal.on(model):
        yield rehearsal
    rehearsal.settle_(model)


class QuantizationAware(Hook):
    """Train a model as `slivo.quantize` will make it compute, so that it learns to live with the rounding.

    A teacher guides it where the objective is a distillation. Weights are rounded in each forward pass, activations to
    ranges that begin calibrated and are learned. In the last part of the training batch norms compute with their
    running statistics, as they will, and ranges rest. In the end the weights are what their codes say:

    ``slivo.quantize(model, batches=batches, ranges=hook.ranges, weight_bits=hook.weight_bits)``

    then computes what the trained model did. Validation within the training is of the rounded model. Give it after
    hooks that set weights (`EMA`, `HoldMasks`).

    Args:
        batches: Real inputs, some tens to hundreds of samples, from which the ranges come.
        weight_bits: Width of the weights' codes, 2-8; 7 for the reason that `slivo.quantize` gives.
        exclude: Globs over module paths; what they match stays in floating point.
        range_rate: The greatest step of a range's end, as a share of it; it follows the schedule of the learning rate.
            0 keeps ranges as calibrated.
        rest: The share of the steps, at the end, in which batch norms and ranges rest. A fifth is enough for
            the weights to follow.

    Raises:
        SlivoError: If an option is out of range; when the training starts, if there is nothing to quantize.

    Source: Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko 2017, "Quantization and Training of Neural
    Networks for Efficient Integer-Arithmetic-Only Inference", arXiv:1712.05877, section 3. Bengio, Léonard, Courville
    2013, arXiv:1308.3432 (straight-through gradients). Krishnamoorthi 2018, arXiv:1806.08342, section 3.2.2 (norms).

    Example:
        >>> import slivo
        >>> from slivo.train import fit
        >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
        >>> hook = QuantizationAware([x])
        >>> data = torch.utils.data.DataLoader(x, batch_size=8)
        >>> rows = fit(net, data, lambda net, x: {"loss": net(x).square().mean()}, epochs=2, hooks=[hook])
        >>> small = slivo.quantize(net, batches=[x], ranges=hook.ranges, weight_bits=hook.weight_bits)
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        weight_bits: int = 7,
        exclude: Sequence[str] = (),
        range_rate: float = 1e-3,
        rest: float = 0.2,
    ) -> None:
        if not is_number(range_rate) or not 0 <= range_rate < 1:
            raise SlivoError(f"QuantizationAware range_rate is {said(range_rate)}; a number from 0 to below 1")
        if not is_number(rest) or not 0 <= rest <= 1:
            raise SlivoError(f"QuantizationAware rest is {said(rest)}; a share from 0 to 1")
        self.batches, self.weight_bits, self.exclude = calls_of(batches), weight_bits, exclude
        self.range_rate, self.rest = range_rate, rest
        self.ranges: dict[str, Ranges] = {}
        self._stack = ExitStack()
        self._kept: dict[str, Any] = {}

    def on_fit_start(self, state: TrainState) -> None:
        """Calibrate, or take up what was learned; from here on the model rounds."""
        self._stack.close()  # of a training that was broken off
        model = state.model
        self._rehearsal = rehearse(model, self.batches, weight_bits=self.weight_bits, exclude=self.exclude)
        self._adam = torch.optim.Adam(self._rehearsal.parameters(), lr=self.range_rate)
        if self._kept:
            self._rehearsal.load_state_dict(self._kept["ranges"])
            self._adam.load_state_dict(self._kept["adam"])
        self._rehearsal.requires_grad_(self.range_rate > 0)
        self._top = max(float(group["initial_lr"]) for group in state.optimizer.param_groups)
        self._stack.enter_context(self._rehearsal.on(model))

    def on_step_start(self, state: TrainState) -> None:
        """Have batch norms and ranges rest towards the end."""
        if state.step >= (1 - self.rest) * state.total_steps:
            for module in state.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
            self._rehearsal.requires_grad_(False)

    def on_step_end(self, state: TrainState) -> None:
        """Move the ranges."""
        for group in self._adam.param_groups:
            group["lr"] = self.range_rate * state.optimizer.param_groups[0]["lr"] / self._top
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    def on_fit_end(self, state: TrainState) -> None:
        """Leave the model as it was but for its weights, which are what their codes say."""
        self._stack.close()
        self._rehearsal.settle_(state.model)
        self.ranges = self._rehearsal.ranges

    def on_close(self, state: TrainState) -> None:
        """Take the rounding off a model whose training was broken off."""
        del state
        self._stack.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned of the ranges."""
        return {"ranges": dict(self._rehearsal.state_dict()), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what was learned of the ranges."""
        self._kept = state
