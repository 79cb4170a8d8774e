"""The edit that stores weights as integer codes and rounds activations to what integer kernels compute with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Self, cast

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn
from torch.nn import functional as F

from slivo.edits import uniform
from slivo.edits.dynamic import dynamic_linear
from slivo.edits.swap import swap_, unfuse_
from slivo.edits.uniform import Coded, Grid
from slivo.errors import SlivoError

_ = torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed when it is imported

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

_OPERATIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: F.linear,
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}

_INT32 = 2**31 - 128
"""The greatest float32 that an int32 holds."""

QUANTIZABLE = tuple(_OPERATIONS)
"""The layers that `Quantize` can take; exactly these classes, because a subclass may compute something else."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""The layers that can be folded into the layer before them."""


@dataclass(frozen=True)
class ActivationSpec:
    """How a tensor of activations is rounded: to unsigned codes, one scale and zero point for the whole tensor.

    Args:
        bits: Width of the codes, 2-8.
        dynamic: Whether the range is that of each batch, in place of a calibrated one: for the inputs of linear
            layers, with 8 bits.
    """

    bits: int = 8
    dynamic: bool = False


@dataclass(frozen=True)
class QuantSpec:
    """How one layer is quantized.

    Args:
        weight_bits: Width of the weight's codes, 2-8.
        weight_axis: 0 for one scale an output channel, None for one scale a tensor.
        activation: How the layer's input is rounded; None leaves it in floating point.
        output: How the layer's output is rounded; None leaves it in floating point.
        group_size: How many consecutive weights of an output channel have a scale for themselves; None for all.
        symmetric: Whether codes are signed and zero is 0; otherwise they are unsigned, with zero points.
        packed: Whether codes are stored bit behind bit; otherwise one a byte, as integer kernels read them.
        divided: Whether inputs are divided, channel by channel, before they meet the weight, which is larger there.
    """

    weight_bits: int = 8
    weight_axis: int | None = 0
    activation: ActivationSpec | None = None
    output: ActivationSpec | None = None
    group_size: int | None = None
    symmetric: bool = True
    packed: bool = False
    divided: bool = False

    def __post_init__(self) -> None:
        if self.activation is not None and not self.plain:
            raise SlivoError(
                f"{self} makes no sense; integer kernels read plain codes, with a scale a channel or tensor"
            )

    @property
    def grid(self) -> Grid:
        """Which numbers the weight's codes say."""
        whole: Literal["channel", "tensor"] = "tensor" if self.weight_axis is None else "channel"
        return Grid(self.weight_bits, self.symmetric, self.group_size or whole)

    @property
    def plain(self) -> bool:
        """Whether the codes are what integer kernels read: one a byte, signed, with a scale a channel or a tensor."""
        return self.symmetric and not self.packed and self.group_size is None

    @property
    def calibrated(self) -> bool:
        """Whether the input is rounded to codes of a range that is fixed beforehand."""
        return self.activation is not None and not self.activation.dynamic


@dataclass(frozen=True)
class Ranges:
    """The ranges (least, greatest) that a layer's codes must cover; each includes zero."""

    activation: tuple[float, float] | None = None
    output: tuple[float, float] | None = None


@dataclass(frozen=True)
class Quantize:
    """Fold batch norms into the layers before them, then put quantized layers in place of layers.

    Args:
        modules: For each layer (qualified name) how it is quantized.
        folded: For each batch norm (qualified name) the layer that takes it in.
        ranges: Calibrated ranges of the layers' activations. Needed once; they end up in the model's tensors and are
            not part of the edit's JSON.
        codes: The weights as codes, of layers whose codes are not the nearest ones. Needed once, as the ranges.

    Example:
        >>> edit = Quantize({"0": QuantSpec(weight_bits=8)})
        >>> edit.apply_(nn.Sequential(nn.Linear(3, 2)))[0].weight_codes.dtype
        torch.int8
        >>> Quantize.from_json(edit.to_json()) == edit
        True
    """

    kind: ClassVar[str] = "quantize"

    modules: Mapping[str, QuantSpec]
    folded: Mapping[str, str] = field(default_factory=dict)
    ranges: Mapping[str, Ranges] = field(default_factory=dict, compare=False, repr=False)
    codes: Mapping[str, Coded] = field(default_factory=dict, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {"modules": {name: asdict(spec) for name, spec in self.modules.items()}, "folded": dict(self.folded)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild the edit from `to_json`'s data."""
        modules = {}
        for name, spec in data["modules"].items():
            newer: dict[str, Any] = {
                key: spec[key] for key in ("group_size", "symmetric", "packed", "divided") if key in spec
            }
            activation, output = (_activation(spec.get(role)) for role in ("activation", "output"))
            modules[name] = QuantSpec(spec["weight_bits"], spec["weight_axis"], activation, output, **newer)
        return cls(modules, dict(data.get("folded", {})))

    def apply_(self, model: nn.Module) -> nn.Module:
        """Quantize the layers in place; return the model, or the layer that takes its place if it is one itself."""
        for norm, name in self.folded.items():
            old = model.get_submodule(norm)
            _fold_(_layer(model, name), old)
            swap_(model, old, nn.Identity())
        for name, spec in self.modules.items():
            layer = _layer(model, name)
            new = QuantizedLayer(layer, spec, self.ranges.get(name, Ranges()), self.codes.get(name))
            new.train(layer.training)
            if layer is model:
                return new
            swap_(model, layer, new)
        unfuse_(model)
        return model


class QuantizedLayer(nn.Module):
    """A linear layer or a convolution with integer codes for a weight.

    Its arithmetic is that of integer kernels, written with ``quantized_decomposed`` operators, which exporters turn
    into their runtime's quantize and dequantize nodes. It cannot be trained: rounding has no gradient.

    Args:
        layer: The layer to replace; an instance of one of `QUANTIZABLE`.
        spec: How.
        ranges: The ranges of its activations, where ``spec`` rounds them.
        coded: Its weight as codes; None for the nearest ones.

    Attributes:
        weight_codes: As they are stored: of the weight's shape, or packed (`slivo.edits.uniform.pack`).
        weight_scale: Shape (outputs,) or (1,); of groups (outputs, groups), bfloat16.
        weight_zero_point: Where codes are not symmetric, as many as scales; packed as the codes are.
        input_divisor: Where inputs are divided, shape (input channels,), bfloat16.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    input_divisor: Tensor
    bias: Tensor | None
    input_scale: Tensor
    input_zero_point: Tensor
    output_scale: Tensor
    output_zero_point: Tensor

    def __init__(self, layer: Layer, spec: QuantSpec, ranges: Ranges, coded: Coded | None = None) -> None:
        super().__init__()
        self.spec, self.weight_shape = spec, layer.weight.shape
        self.operation = _OPERATIONS[type(layer)]
        for name in layer.__constants__:  # sizes, strides and the like, which other modules may read
            setattr(self, name, getattr(layer, name))
        weight = layer.weight.detach().float()
        bias = None if layer.bias is None else layer.bias.detach().float()
        for role, rounded, span in (
            ("input", spec.activation, ranges.activation),
            ("output", spec.output, ranges.output),
        ):
            if rounded is not None and not rounded.dynamic:
                step, zero_point = affine(span or (0.0, 1.0), rounded.bits)
                device = weight.device
                self.register_buffer(f"{role}_scale", torch.tensor(step, device=device))
                self.register_buffer(f"{role}_zero_point", torch.tensor(zero_point, dtype=torch.uint8, device=device))
        if coded is None:
            floor = None
            if spec.calibrated and bias is not None:
                floor = (bias.abs() / self.input_scale / _INT32)[:, None]
                floor = floor if spec.weight_axis is not None else floor.amax().reshape(1, 1)
            coded = uniform.encode(weight, spec.grid, floor=floor)
        self._store(coded, layer)
        self.register_buffer("bias", None if bias is None else self._encode_bias(bias))

    def _store(self, coded: Coded, layer: Layer) -> None:
        """Keep codes in the form that the spec says."""
        spec, codes = self.spec, coded.codes
        if spec.packed:
            codes = uniform.pack(codes.short() - spec.grid.lowest, spec.weight_bits)
        self.register_buffer("weight_codes", codes)
        groups = spec.group_size is not None
        self.register_buffer("weight_scale", coded.scale.bfloat16() if groups else coded.scale.flatten().float())
        if not spec.symmetric:
            assert coded.zero_point is not None
            zero_point = coded.zero_point
            self.register_buffer(
                "weight_zero_point", uniform.pack(zero_point, spec.weight_bits) if spec.packed else zero_point
            )
        if spec.divided:
            size = layer.weight.shape[1] * getattr(layer, "groups", 1)
            ones = torch.ones(size, dtype=torch.bfloat16, device=codes.device)
            self.register_buffer("input_divisor", ones if coded.divisor is None else coded.divisor.bfloat16())

    @property
    def weight(self) -> Tensor:
        """The weight in floating point, as the codes say it."""
        if self.spec.plain:
            return _decode(self.weight_codes, self.weight_scale)
        spec, grid, shape, codes = self.spec, self.spec.grid, self.weight_shape, self.weight_codes
        scale = self.weight_scale if spec.group_size is not None else self.weight_scale[:, None]
        zero_point = None if spec.symmetric else self.weight_zero_point
        if spec.packed:
            codes = uniform.unpack(codes, spec.weight_bits, shape.numel()).reshape(shape).float()
            codes = codes + grid.lowest if spec.symmetric else codes
            if zero_point is not None:
                zero_point = uniform.unpack(zero_point, spec.weight_bits, scale.numel()).reshape(scale.shape)
        return uniform.from_codes(codes, grid, scale, zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to a tensor of any floating-point type; it computes in float32."""
        if self.training and torch.is_grad_enabled():
            raise SlivoError(
                "a quantized layer cannot be trained: rounding has no gradient. Train first and quantize last, "
                "or call model.eval()"
            )
        dtype = x.dtype
        x = self.sums(x.float())
        if self.spec.output is not None:
            x = round_to_codes(x, self.output_scale, self.output_zero_point, self.spec.output.bits)
        return x.to(dtype)

    def sums(self, x: Tensor) -> Tensor:
        """Return what the layer gives out in float32, before that is rounded."""
        bias, rounded = self.bias, self.spec.activation
        if self.spec.divided:
            x = x / self.input_divisor.float().reshape(-1, *[1] * (len(self.weight_shape) - 2))
        if rounded is not None and rounded.dynamic:
            product: Tensor = dynamic_linear(x, self.weight_codes, self.weight_scale, bias)
            return product
        if rounded is not None:
            x = round_to_codes(x, self.input_scale, self.input_zero_point, rounded.bits)
            bias = None if bias is None else _decode(bias, self._bias_scale())
        return self._operate(x, self.weight, bias)

    def shift_(self, amount: Tensor) -> None:
        """Add to the bias, shape (outputs,); only for a layer that has one."""
        assert self.bias is not None
        bias = _decode(self.bias, self._bias_scale()) if self.spec.calibrated else self.bias
        self.bias.copy_(self._encode_bias(bias + amount))

    def extra_repr(self) -> str:
        """Return shape and widths, for printing."""
        widths = [f"weight={self.spec.weight_bits} bits"]
        if self.spec.group_size is not None:
            widths.append(f"group_size={self.spec.group_size}")
        for role, rounded in (("activation", self.spec.activation), ("output", self.spec.output)):
            if rounded is not None:
                widths.append(f"{role}={rounded.bits} bits{', dynamic' * rounded.dynamic}")
        return f"{list(self.weight_shape)}, {', '.join(widths)}"

    def _operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.operation is F.linear:
            return F.linear(x, weight, bias)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            sides = _both_sides(padding, self.kernel_size, self.dilation)
            x, padding = F.pad(x, sides, mode=str(self.padding_mode)), 0
        return self.operation(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _encode_bias(self, bias: Tensor) -> Tensor:
        """Round the bias to the grid on which integer kernels sum; in floating point if the input is not rounded."""
        if not self.spec.calibrated:
            return bias
        codes = torch.round(bias.double() / self._bias_scale().double())
        return codes.clamp(-_INT32, _INT32).to(torch.int32)

    def _bias_scale(self) -> Tensor:
        return (self.input_scale * self.weight_scale).expand(self.weight_shape[0])


def affine(span: tuple[float, float], bits: int) -> tuple[float, int]:
    """Return scale and zero point of the unsigned codes that cover a range.

    Args:
        span: Least and greatest value; widened to include zero, so that zero has a code of its own.
        bits: Width of the codes, 2-8.

    Example:
        >>> affine((0.0, 51.0), 8)
        (0.2, 0)
    """
    levels = 2 ** uniform.width(bits) - 1
    low, high = min(0.0, span[0]), max(0.0, span[1])
    scale = max((high - low) / levels, uniform.LEAST) if high > low else 1.0
    return scale, min(levels, max(0, round(-low / scale)))


def round_to_codes(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return a tensor as unsigned codes of a scale and zero point say it."""
    ops, top = torch.ops.quantized_decomposed, 2**bits - 1
    codes = ops.quantize_per_tensor.tensor(x, scale, zero_point, 0, top, torch.uint8)
    rounded: Tensor = ops.dequantize_per_tensor.tensor(codes, scale, zero_point, 0, top, torch.uint8)
    return rounded


def _decode(codes: Tensor, scale: Tensor) -> Tensor:
    bounds = torch.iinfo(codes.dtype)
    scale, zero_point = scale.expand(codes.shape[0]), None
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        # Inductor (PyTorch 2.13) takes the operator only with zero points; exporters would write them into the file.
        zero_point = torch.zeros_like(scale, dtype=torch.int64)
    decoded: Tensor = torch.ops.quantized_decomposed.dequantize_per_channel(
        codes, scale, zero_point, 0, bounds.min, bounds.max, codes.dtype
    )
    return decoded


def _both_sides(padding: Any, kernel: Any, dilation: Any) -> list[int]:
    """Return what `F.pad` takes for a convolution's padding: last dimension first, each side."""
    sides: list[int] = []
    for dim in reversed(range(len(kernel))):
        if isinstance(padding, str):
            total = dilation[dim] * (kernel[dim] - 1) if padding == "same" else 0
            sides += [total // 2, total - total // 2]
        else:
            sides += [padding[dim], padding[dim]]
    return sides


def _layer(model: nn.Module, name: str) -> Layer:
    found = model.get_submodule(name)
    if type(found) not in _OPERATIONS:
        allowed = ", ".join(each.__name__ for each in QUANTIZABLE)
        raise SlivoError(f"{name or 'the model'} is a {type(found).__name__}; only {allowed} can be quantized")
    return cast(Layer, found)


def _fold_(layer: Layer, norm: nn.Module) -> None:
    """Scale and shift a layer's channels as the batch norm behind it does in evaluation mode."""
    if not isinstance(norm, NORMS) or norm.running_mean is None or norm.running_var is None:
        raise SlivoError(f"a {type(norm).__name__} cannot be folded into the layer before it")
    weight, bias = layer.weight, layer.bias
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        gain = gain * norm.weight.detach().double()
    shift = -norm.running_mean.double() * gain
    if norm.affine:
        shift = shift + norm.bias.detach().double()
    if bias is not None:
        shift = shift + bias.detach().double() * gain
    channels = (-1, *[1] * (weight.dim() - 1))
    layer.weight = nn.Parameter((weight.detach().double() * gain.view(channels)).to(weight.dtype))
    layer.bias = nn.Parameter(shift.to(weight.dtype))


def _activation(data: Mapping[str, Any] | None) -> ActivationSpec | None:
    return None if data is None else ActivationSpec(**data)
