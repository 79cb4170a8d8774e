"""Records on disk, one for each view of a sample: fixed in size, memory-mapped, and each whole or not there."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import uuid
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slivo import files
from slivo.errors import ArtifactError, ShapeError, SlivoError

_log = logging.getLogger("slivo")

DTYPES = {torch.float16: "<f2", torch.bfloat16: "<u2", torch.float32: "<f4", torch.float64: "<f8"}
"""Types that values may be kept in, and how NumPy holds them; bfloat16, which it does not know, as bits."""

# Fields of a record beside the values: a checksum of all that follows, whether it was written at all, the sample's.
_CHECK, _WRITTEN, _SAMPLE = "check", "written", "sample"
_CLASSES, _TAIL = "classes", "tail"

Rows = NDArray[Any]
"""Records, as a structured array."""


@dataclass(frozen=True)
class Form:
    """What a record holds, and how.

    Attributes:
        shapes: Of the values of one sample, by path of the module; "" is the output.
        dtype: What the output is kept in.
        feature_dtype: What all else is kept in.
        top_k: How many of the output's classes are kept; None for all.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    feature_dtype: torch.dtype
    top_k: int | None

    def record(self) -> np.dtype[Any]:
        """Return the type of a record; values are called "@" and the path."""
        fields: list[tuple[Any, ...]] = [(_CHECK, "<u4"), (_WRITTEN, "<u4"), (_SAMPLE, "<u4")]
        for path, shape in self.shapes.items():
            if path or self.top_k is None:
                fields.append((_field(path), DTYPES[self.kept(path)], shape))
            else:
                fields.append(("@", DTYPES[self.dtype], (*shape[:-1], self.top_k)))
                fields.append((_TAIL, DTYPES[self.dtype], (*shape[:-1], 1)))
                fields.append((_CLASSES, "<u2" if shape[-1] <= 2**16 else "<i4", (*shape[:-1], self.top_k)))
        return np.dtype(fields)

    def kept(self, path: str) -> torch.dtype:
        """Return what the values of a path are kept in."""
        return self.feature_dtype if path else self.dtype

    def encode(self, values: Mapping[str, Tensor], samples: NDArray[np.int64]) -> Rows:
        """Return records of a batch, not yet sealed.

        Args:
            values: By path, shape (samples, ...).
            samples: Checksums of the samples.

        Raises:
            ShapeError: If the values are not of the shapes that the records are for.
            SlivoError: If a value is no float, or too large for the type that it is to be kept in.
        """
        rows = np.zeros(len(samples), self.record())
        rows[_SAMPLE] = samples
        for path, shape in self.shapes.items():
            value = values[path].detach()
            if tuple(value.shape) != (len(samples), *shape):
                raise ShapeError(
                    f"{_place(path)} of the teacher has shape {tuple(value.shape)} for {len(samples)} samples; the "
                    f"cache keeps {shape} for each: make all inputs of one size"
                )
            if path or self.top_k is None:
                rows[_field(path)] = _narrow(value, self.kept(path), path)
            else:
                top, tail, classes = squeeze(value, self.top_k)
                rows["@"], rows[_TAIL] = _narrow(top, self.dtype, path), _narrow(tail, self.dtype, path)
                rows[_CLASSES] = classes.cpu().numpy()
        return rows

    def decode(self, rows: Rows, path: str, device: torch.device) -> Tensor:
        """Return the values of a path, shape (samples, ...), in float32 at least."""
        kept = self.kept(path)
        value = _widen(rows[_field(path)], kept, device)
        if path or self.top_k is None:
            return value
        classes = torch.from_numpy(rows[_CLASSES].astype(np.int64)).to(device)
        return spread(value, _widen(rows[_TAIL], kept, device), classes, self.shapes[""][-1])


def squeeze(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest log-probabilities, the logarithm of all other classes' probability together, and which.

    Args:
        logits: Shape (..., classes).
        top_k: Classes that are kept; at least one must be left over.

    Returns:
        Shapes (..., top_k), (..., 1) and (..., top_k).

    Example:
        >>> top, tail, classes = squeeze(torch.tensor([0.1, 0.6, 0.3]).log(), 1)
        >>> round(float(top.exp()), 3), round(float(tail.exp()), 3), classes.tolist()
        (0.6, 0.4, [1])
    """
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    top, classes = probabilities.topk(top_k)
    return top, probabilities.scatter(-1, classes, -math.inf).logsumexp(-1, keepdim=True), classes


def spread(top: Tensor, tail: Tensor, classes: Tensor, count: int) -> Tensor:
    """Return log-probabilities of all classes, of which those that were not kept share the tail in equal parts.

    The divergence of the full distribution from this one is ``tail * (log(left) - H)``, where ``left`` is the number
    of classes that were not kept and H the entropy of the distribution among them: from 0 to ``tail * log(left)``.

    Args:
        top: Shape (..., k), as `squeeze` returns them.
        tail: Shape (..., 1).
        classes: Shape (..., k).
        count: Classes in all.

    Returns:
        Shape (..., count); the probabilities sum to 1.

    Example:
        >>> spread(*squeeze(torch.tensor([0.1, 0.6, 0.3]).log(), 1), 3).exp()
        tensor([0.2000, 0.6000, 0.2000])
    """
    share = tail - math.log(count - top.shape[-1])
    return share.expand(*top.shape[:-1], count).scatter(-1, classes, top).log_softmax(-1)


class Store:
    """Records in a file, by position.

    A record holds a checksum of itself, of the store and of its position, which is written together with it. One that
    a killed process left half written, that another process is writing, or that the disk has spoiled is not there for
    a reader, and is written again. Hence writers need no lock.
    """

    def __init__(self, folder: Path, name: str, form: Form) -> None:
        self.form = form
        self._name = name
        self._path = folder / f"{name}.npy"
        self._seeds = zlib.crc32(name.encode())
        try:
            self._rows: np.memmap[Any, np.dtype[Any]] = np.load(self._path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ArtifactError(f"cache {folder} is damaged ({_reason(error)}); remove it to fill it anew") from error
        if self._rows.dtype != form.record():
            raise ArtifactError(f"cache {folder} is damaged ({self._path.name} is of another form); remove it")

    def read(self, positions: NDArray[np.int64]) -> tuple[Rows, NDArray[np.bool_]]:
        """Return copies of records, and which of them are there."""
        rows = np.asarray(self._rows[positions])
        raw = _bytes(rows)
        there = np.zeros(len(rows), bool)
        for index in np.flatnonzero(rows[_WRITTEN]):
            there[index] = rows[_CHECK][index] == self._check(int(positions[index]), raw[index])
        spoiled = int(np.count_nonzero(rows[_WRITTEN]) - there.sum())
        if spoiled:
            _log.warning("cache %s: %d records are damaged or half written; they are made anew", self._path, spoiled)
        return rows, there

    def write(self, positions: NDArray[np.int64], rows: Rows) -> None:
        """Seal records, and write them.

        Raises:
            ArtifactError: If the disk is full or the file may not be written; what it holds stays good.
        """
        rows = rows.copy()
        rows[_WRITTEN] = 1
        raw = _bytes(rows)
        checks = [self._check(int(position), each) for position, each in zip(positions, raw, strict=True)]
        rows[_CHECK] = checks
        try:
            with FileIO(self._path, "r+") as file:
                for position, each in zip(positions, _bytes(rows), strict=True):
                    file.seek(self._rows.offset + int(position) * self._rows.itemsize)
                    # On a disk that is nearly full a part is written, and no error.
                    if file.write(each) != len(each):
                        raise OSError("no space left on the device")
        except OSError as error:
            raise ArtifactError(
                f"cache {self._path.parent} cannot be written: {_reason(error)}; make room or let it be written, and "
                "start again: what it holds so far stays good"
            ) from error

    def samples(self, rows: Rows) -> NDArray[np.int64]:
        """Return the checksums of the samples that records were made of."""
        return rows[_SAMPLE].astype(np.int64)

    def sync(self) -> None:
        """Wait until all is on the disk."""
        files.sync(self._path)

    def _check(self, position: int, raw: NDArray[np.uint8]) -> int:
        return zlib.crc32(raw[4:].data, zlib.crc32(position.to_bytes(8, "little"), self._seeds))


def identify(identity: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> str:
    """Return a name for records that are of one origin and shape.

    Example:
        >>> identify({"seed": 0}, {"": (10,)}) == identify({"seed": 0}, {"": [10]})
        True
    """
    return hashlib.sha256(json.dumps([identity, shapes], sort_keys=True).encode()).hexdigest()[:16]


def create(folder: Path, name: str, form: Form, count: int) -> None:
    """Make room for records; may happen any number of times and in several processes at once.

    All of them write the same bytes at the same place, and the size is the same, so that none undoes what others did.

    Raises:
        ArtifactError: If there is not enough space, or the folder cannot be written to.
    """
    header = BytesIO()
    descr = np.lib.format.dtype_to_descr(form.record())
    np.lib.format.write_array_header_2_0(header, {"descr": descr, "fortran_order": False, "shape": (count,)})
    size = len(header.getvalue()) + count * form.record().itemsize
    path = folder / f"{name}.npy"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free + (path.stat().st_size if path.exists() else 0)
        if size > free:
            raise ArtifactError(
                f"cache {folder} needs {size / 1e9:.2g} GB and there are {free / 1e9:.2g}: make room, or keep less "
                "(top_k, fewer taps or views, a narrower type)"
            )
        with path.open("ab"):
            pass
        with path.open("r+b") as file:
            file.write(header.getvalue())
            file.truncate(size)
        files.sync(path)
    except OSError as error:
        raise ArtifactError(f"cache {folder} cannot be written: {_reason(error)}") from error


def publish(path: Path, text: str) -> None:
    """Write a file as a whole while other processes may do the same; the last one stays."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.json")
    try:
        files.write(temporary, text)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ArtifactError(f"{path} cannot be written: {_reason(error)}") from error


def _field(path: str) -> str:
    # NumPy's header takes no letters beyond Latin-1.
    return f"@{path}".encode("ascii", "backslashreplace").decode()


def _bytes(rows: Rows) -> NDArray[np.uint8]:
    return rows.view(np.uint8).reshape(len(rows), rows.itemsize)


def _narrow(value: Tensor, dtype: torch.dtype, path: str) -> NDArray[Any]:
    """Return values in the type that they are kept in, or say that they do not fit."""
    if not value.is_floating_point():
        raise SlivoError(f"{_place(path)} of the teacher is of {value.dtype}; only floats are kept: leave it out")
    narrow = value.to(dtype)
    if bool((narrow.isinf() & ~value.isinf()).any()):
        largest = float(value[value.isfinite()].abs().max())
        raise SlivoError(
            f"{_place(path)} of the teacher reaches {largest:.3g}, more than {dtype} holds; keep it in a wider type"
        )
    narrow = narrow.cpu().contiguous()
    array: NDArray[Any] = (narrow.view(torch.uint16) if dtype == torch.bfloat16 else narrow).numpy()
    return array


def _widen(values: NDArray[Any], kept: torch.dtype, device: torch.device) -> Tensor:
    # A field of a single record counts as contiguous, with strides that PyTorch refuses; a copy has others.
    tensor = torch.from_numpy(values.copy())
    if kept == torch.bfloat16:
        tensor = tensor.view(torch.bfloat16)
    return tensor.to(device).to(torch.promote_types(kept, torch.float32))


def _place(path: str) -> str:
    return f"module {path!r}" if path else "the output"


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).splitlines()[0]
