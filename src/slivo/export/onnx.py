"""ONNX: one file that ONNX Runtime, OpenVINO, TensorRT and others read."""

from __future__ import annotations

import inspect
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

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
    path, args, kwargs = Path(path), *as_args(example_inputs)
    args, kwargs = _batch(args, kwargs, lambda x: torch.cat([x, x]) if len(x) == 1 else x)
    with evaluating(model), torch.no_grad():
        content = _convert(model, args, kwargs)
        _check(model, content, args, kwargs)
        _check(model, content, *_batch(args, kwargs, lambda x: torch.cat([x, x[:1]])))
    _write(path, content)
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
        raise SlivoError(f"ONNX Runtime cannot read {name}: {_first_line(error)}") from error
    names = [each.name for each in session.get_inputs()]

    def run(*inputs: Array) -> list[Array]:
        outputs: list[Array] = session.run(None, dict(zip(names, inputs, strict=True)))
        return outputs

    return run


def _convert(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Return the model as the bytes of an ONNX file."""
    with _quiet():
        try:
            program = torch.export.export(
                model, args, kwargs, dynamic_shapes=_free_batch(model, args, kwargs), strict=False
            )
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
                f"{type(model).__name__} cannot be exported to ONNX with a free batch size: {_first_line(error)}"
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

    ops = torch.ops.quantized_decomposed

    def quantize(x: Any, scale: Any, zero_point: Any, low: int, high: int, dtype: int) -> Any:
        del low, dtype
        top = 255
        clipped = x if high == top else opset18.Min(x, opset18.Mul(scale, float(high)))
        return opset18.QuantizeLinear(clipped, scale, zero_point)

    def dequantize(x: Any, scale: Any, zero_point: Any, low: int, high: int, dtype: int) -> Any:
        del low, high, dtype
        return opset18.DequantizeLinear(x, scale, zero_point)

    def dequantize_rows(x: Any, scale: Any, zero_point: None, axis: int, low: int, high: int, dtype: int) -> Any:
        del zero_point, low, high
        # Zeros, although they are the default: without them ONNX Runtime does not use its integer matrix products.
        zeros: Any = ir.tensor(np.zeros(tuple(scale.shape), ir.DataType(dtype).numpy()))
        return opset18.DequantizeLinear(x, scale, opset18.Constant(value=zeros), axis=axis)

    return {
        ops.quantize_per_tensor.tensor: quantize,
        ops.dequantize_per_tensor.tensor: dequantize,
        ops.dequantize_per_channel.default: dequantize_rows,
    }


def _batch(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change the batch size of all tensors among the arguments."""
    changed: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        Tensor, lambda x: change(x) if x.dim() else x, (args, kwargs)
    )
    return changed


def _free_batch(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Say for every argument that the first dimension of its tensors is free."""

    def free(value: Any) -> Any:
        return pytree.tree_map(
            lambda x: {0: torch.export.Dim.DYNAMIC} if isinstance(x, Tensor) and x.dim() else None, value
        )

    if not kwargs:
        return tuple(free(value) for value in args)
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {name: free(value) for name, value in bound.items()}


def _check(model: nn.Module, content: bytes, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compare what ONNX Runtime makes of the file with what the model does."""
    inputs = [x.cpu().numpy() for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    try:
        outputs = _open(content, threads=1)(*inputs)
    except SlivoError:
        raise
    except Exception as error:
        raise SlivoError(f"ONNX Runtime cannot run the exported model: {_first_line(error)}") from error
    expected = [x.cpu() for x in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor)]
    quantized = any(isinstance(module, QuantizedLayer) for module in model.modules())
    for index, (found, wanted) in enumerate(zip(outputs, expected, strict=True)):
        error_, limit = difference(found, wanted.numpy(), quantized=quantized)
        if not error_ <= limit:
            raise SlivoError(
                f"the exported model computes something else: output {index} differs by {error_:.2g} of its size, "
                f"{limit:g} is allowed" + (_OVERFLOW if quantized else "")
            )


_OVERFLOW = "; this processor's integer kernels overflow with eight-bit weights: quantize to weight_bits=7"


def difference(found: Array, wanted: Array, *, quantized: bool) -> tuple[float, float]:
    """Return by how much two outputs differ, relative to their size, and by how much they may.

    Args:
        found: What the runtime computed.
        wanted: What the source model computes, same shape.
        quantized: Whether the model rounds; then the root mean square is taken, else the greatest difference.
    """
    if found.shape != wanted.shape:
        return float("inf"), 0.0
    gap, size = found.astype(np.float64) - wanted, np.abs(wanted.astype(np.float64))
    if not gap.size:
        return 0.0, 0.0
    if quantized:
        return float(np.sqrt((gap**2).mean()) / max(np.sqrt((size**2).mean()), 1e-6)), QUANTIZED_TOLERANCE
    return float(np.abs(gap).max() / max(size.max(), 1e-6)), FLOAT_TOLERANCE


def _write(path: Path, content: bytes) -> None:
    """Write a file so that nobody ever sees half of it."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise SlivoError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings, which are about its own insides, from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
