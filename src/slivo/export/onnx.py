"""ONNX: one file that ONNX Runtime, OpenVINO, TensorRT and others read."""

from __future__ import annotations

import inspect
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slivo import files
from slivo.edits.quantize import QuantizedLayer
from slivo.errors import SlivoError, require
from slivo.graph import ExampleInputs, as_args
from slivo.graph.capture import evaluating

OPSET = 20
"""Version of ONNX's operators; ONNX Runtime reads it since 1.17 (February 2024)."""

FLOAT_TOLERANCE = 1e-4
"""Greatest difference from the source model, in units of its greatest output: float32 summed in another order."""

QUANTIZED_TOLERANCE = 0.05
"""The same for quantized models, root mean square: where a value lies between two codes, runtimes may round it to
either, and later layers carry that on. It is far below what kernels that overflow do."""

Array = NDArray[Any]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


def export(model: nn.Module, path: str | os.PathLike[str], example_inputs: ExampleInputs) -> Path:
    """Write a model as one ONNX file with a free batch size, and check it against the model.

    Quantized layers become pairs of quantize and dequantize nodes around the float operators (QDQ) with the weights
    stored as int8, which runtimes turn into integer kernels. The file is run by ONNX Runtime on the example inputs and
    on a batch of another size before it is put into its place.

    Args:
        model: Exported as it is in evaluation mode; left as it was.
        path: The file to write; a file that is there is replaced.
        example_inputs: A tensor, a tuple of positional arguments or a mapping of keyword arguments; the first
            dimension of each tensor is the batch.

    Returns:
        The path.

    Raises:
        SlivoError: If the model cannot be exported, ONNX Runtime computes something else, the result is larger than
            the 2 GB that one file can hold, or the file cannot be written; no file is left then.
    """
    require("onnxscript", extra="export", why="export to ONNX")
    path, call = Path(path), as_args(example_inputs)
    _check_place(path)
    if _batch_size(call) == 1:  # a size of one would be taken for a constant
        call = _enlarged(call)
    with evaluating(model), torch.no_grad():
        content = _convert(model, call)
        for inputs in (call, _enlarged(call)):
            _check(model, content, inputs)
    files.write(path, content)
    return path


def runner(path: str | os.PathLike[str], *, threads: int = 1) -> Callable[..., list[Array]]:
    """Open an ONNX file with ONNX Runtime on the CPU.

    Args:
        path: The file.
        threads: Threads that one operator may use.

    Returns:
        A function of the inputs, as arrays in the file's order, that returns the list of outputs.

    Raises:
        SlivoError: If ONNX Runtime cannot read the file.
    """
    return _open(os.fspath(path), threads)


def _open(source: str | bytes, threads: int) -> Callable[..., list[Array]]:
    runtime = require("onnxruntime", extra="export", why="running ONNX files")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # its warnings are about its own optimizations
    try:
        session = runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        name = source if isinstance(source, str) else "the exported model"
        raise SlivoError(f"ONNX Runtime cannot read {name}: {_reason(error)}") from error
    names = [each.name for each in session.get_inputs()]

    def run(*inputs: Array) -> list[Array]:
        outputs: list[Array] = session.run(None, dict(zip(names, inputs, strict=True)))
        return outputs

    return run


def _convert(model: nn.Module, call: Inputs) -> bytes:
    """Return the model as the bytes of an ONNX file."""
    args, kwargs = call
    with _quiet():
        try:
            program = torch.export.export(model, args, kwargs, dynamic_shapes=_free_batch(model, call), strict=False)
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                external_data=False,
                custom_translation_table=_translations(),
            )
            assert converted is not None
            proto = converted.model_proto
        except Exception as error:
            raise SlivoError(
                f"{type(model).__name__} cannot be exported to ONNX with a free batch size: {_reason(error)}"
            ) from error
    return _serialize(proto)


def _serialize(proto: Any) -> bytes:
    """Serialize without the notes on where in the source each node came from, which can outweigh a small model."""
    for node in proto.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for holder in (proto, proto.graph):
        holder.ClearField("metadata_props")
    proto.graph.ClearField("value_info")
    try:
        content: bytes = proto.SerializeToString()
    except Exception as error:  # of protobuf's own kind
        raise SlivoError(f"the model is larger than the 2 GB that one ONNX file can hold: {error}") from error
    return content


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return how our operators are written in ONNX.

    PyTorch's own translations take scales and zero points as numbers only, and clip what needs no clipping.
    """
    from onnxscript import ir, opset18

    ops, opset = torch.ops.quantized_decomposed, opset18

    def constant(value: Any) -> Any:
        tensor: Any = ir.tensor(value)  # the stubs ask for another class, which is taken as well
        return opset.Constant(value=tensor)

    def quantize(x: Any, scale: Any, zero_point: Any, low: int, high: int, dtype: int) -> Any:
        del dtype
        codes = opset.QuantizeLinear(x, scale, zero_point)
        if (low, high) == (0, 255):
            return codes
        return opset.Clip(codes, constant(np.uint8(low)), constant(np.uint8(high)))

    def dequantize(x: Any, scale: Any, zero_point: Any, low: int, high: int, dtype: int) -> Any:
        del low, high, dtype
        return opset.DequantizeLinear(x, scale, zero_point)

    def dequantize_rows(x: Any, scale: Any, zero_point: None, axis: int, low: int, high: int, dtype: int) -> Any:
        del zero_point, low, high
        if ir.DataType(dtype) == ir.DataType.INT32:  # a bias
            return opset.DequantizeLinear(x, scale, axis=axis)
        # Zeros, although they are the default: without them ONNX Runtime does not use its integer matrix products.
        zeros = np.zeros(tuple(scale.shape), ir.DataType(dtype).numpy())
        return opset.DequantizeLinear(x, scale, constant(zeros), axis=axis)

    def dynamic_linear(x: Any, codes: Any, scale: Any, bias: Any = None) -> Any:
        rounded, step, zero = opset.DynamicQuantizeLinear(x)
        product = opset.MatMulInteger(rounded, opset.Transpose(codes, perm=[1, 0]), zero)
        product = opset.Mul(opset.Cast(product, to=ir.DataType.FLOAT.value), opset.Mul(step, scale))
        return product if bias is None else opset.Add(product, bias)

    return {
        torch.ops.slivo.dynamic_linear.default: dynamic_linear,
        ops.quantize_per_tensor.tensor: quantize,
        ops.dequantize_per_tensor.tensor: dequantize,
        ops.dequantize_per_channel.default: dequantize_rows,
    }


def _batch_size(call: Inputs) -> int:
    """Return the first dimension of the first tensor."""
    return next((len(x) for x in pytree.tree_leaves(call) if isinstance(x, Tensor) and x.dim()), 0)


def _is_batch(x: object, size: int) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0 and len(x) == size


def _enlarged(call: Inputs) -> Inputs:
    """Repeat the first sample at the end of the batch."""
    size = _batch_size(call)
    larger: Inputs = pytree.tree_map(lambda x: torch.cat([x, x[:1]]) if _is_batch(x, size) else x, call)
    return larger


def _free_batch(model: nn.Module, call: Inputs) -> Any:
    """Say for every argument whether the first dimension of its tensors is free."""
    size = _batch_size(call)
    args, kwargs = pytree.tree_map(lambda x: {0: torch.export.Dim.DYNAMIC} if _is_batch(x, size) else None, call)
    return inspect.signature(model.forward).bind(*args, **kwargs).arguments if kwargs else args


def _check(model: nn.Module, content: bytes, call: Inputs) -> None:
    """Compare what ONNX Runtime makes of the file with what the model does."""
    args, kwargs = call
    expected = [x.cpu().numpy() for x in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor)]
    inputs = [x.cpu().numpy() for x in pytree.tree_leaves(call) if isinstance(x, Tensor)]
    run = _open(content, threads=1)
    try:
        pairs = list(zip(run(*inputs), expected, strict=True))
    except Exception as error:
        raise SlivoError(
            f"ONNX Runtime cannot run the exported model on a batch of {_batch_size(call)}: {_reason(error)}"
        ) from error
    quantized = any(isinstance(module, QuantizedLayer) for module in model.modules())
    for index, (found, wanted) in enumerate(pairs):
        gap, limit = difference(found, wanted, quantized=quantized)
        if not gap <= limit:
            raise SlivoError(
                f"the exported model computes something else: output {index} differs by {gap:.2g} of its size, "
                f"{limit:g} is allowed" + (_OVERFLOW if quantized else "")
            )


_OVERFLOW = "; integer kernels of this processor may overflow with eight-bit weights: quantize to weight_bits=7"


def difference(found: Array, wanted: Array, *, quantized: bool) -> tuple[float, float]:
    """Return by how much two outputs differ, relative to their size, and by how much they may.

    Args:
        found: What the runtime computed.
        wanted: What the source model computes, same shape.
        quantized: Whether the model rounds; then the root mean square is taken, else the greatest difference.
    """
    if found.shape != wanted.shape:
        return float("inf"), 0.0
    # Where both are the same there is no gap; infinities too, such as masked scores.
    with np.errstate(invalid="ignore"):
        gap = np.where(found == wanted, 0.0, np.asarray(found, np.float64) - wanted)
    size = np.abs(wanted[np.isfinite(wanted)].astype(np.float64))
    if not size.size:
        return float(np.abs(gap).max(initial=0.0)), 0.0
    if quantized:
        return float(np.sqrt((gap**2).mean()) / max(np.sqrt((size**2).mean()), 1e-6)), QUANTIZED_TOLERANCE
    return float(np.abs(gap).max() / max(size.max(), 1e-6)), FLOAT_TOLERANCE


def _check_place(path: Path) -> None:
    """Say before the work is done that a file cannot be written where a folder is, or under a file."""
    if path.is_dir():
        raise SlivoError(f"{path} is a folder; give the path of a file, such as {path / 'model.onnx'}")
    above = next(each for each in path.absolute().parents if each.exists())
    if not above.is_dir():
        raise SlivoError(f"{path} cannot be written: {above} is a file, not a folder")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep PyTorch's warnings, logs and prints, which are about the exporter's own insides, from the user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        # Some failures print whole graphs.
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _reason(error: BaseException) -> str:
    """Return the first line of what an error goes back to; exporters wrap it in advice to their own authors."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
