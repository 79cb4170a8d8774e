"""Packed files: a whole artifact in one file, each tensor in the codec that makes it smallest."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slivo.artifact.choice import smallest
from slivo.artifact.codecs import POSITIONS, VALUES, Plan, Words, put_together
from slivo.artifact.streams import CODINGS, MalformedError, Stream, expand, squeeze
from slivo.errors import ArtifactError
from slivo.files import write

FORMAT = 1
"""Version of the format; a reader refuses a newer one."""

NEEDS = (0, 1, 0)
"""The first version of slivo that reads this format; in the file, so that an older one can name it."""

MAGIC = b"\x89SLV\r\n\x1a\n"
"""What a packed file begins with; damaged by whatever takes it for text."""

PRELUDE = struct.Struct("<8sB3BI8s")
"""Magic, format, version needed, bytes of the header, checksum of the rest of the prelude and of the header."""

_HEADER_LIMIT = 2**25
"""Bytes of a header's text; those of the largest models have some megabytes."""

_FREE, _GROWTH = 2**20, 2**12
"""A file has a byte for each so many bytes of tensors, but for the first so many. What is packed tighter is filled up,
so that a small file cannot ask for much memory."""

_MOST_DIMS, _MOST = 64, 2**60

_NAMES = (
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
    "float16", "bfloat16", "float32", "float64", "complex64",
)  # fmt: skip

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES if hasattr(torch, name)}
"""The dtypes that can be packed."""


@dataclass(frozen=True)
class PackedTensor:
    """A tensor of a packed file.

    Args:
        name: In the model.
        dtype: As PyTorch calls it.
        shape: Sizes.
        codec: What made it smallest.
        offset: Where it begins in the file.
        packed_bytes: What its streams take there.
        plan: How it was taken apart.
        streams: The coding, symbols and bytes of each of its streams.
        checksum: Of name, dtype, shape and contents.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: str
    offset: int
    packed_bytes: int
    plan: Plan
    streams: tuple[tuple[str, int, int], ...]
    checksum: str

    @property
    def count(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the tensor in memory."""
        return self.count * DTYPES[self.dtype].itemsize

    @property
    def bits(self) -> float:
        """Bits of the file for each entry."""
        return 8 * self.packed_bytes / self.count if self.count else 0.0


@dataclass(frozen=True)
class Packed:
    """What is in a packed file.

    Args:
        path: The file.
        tensors: In the order of the file.
        bytes: Size of the whole file.

    Attributes:
        header_bytes: What is not tensors: factory, edits, table of tensors, checksums.
        dense_bytes: Bytes of all tensors in memory.
        ratio: How many times smaller the whole file is than that.
        bits: Bits of the whole file for each entry of all tensors.
    """

    path: Path
    tensors: tuple[PackedTensor, ...]
    bytes: int

    @property
    def header_bytes(self) -> int:
        """What is not tensors."""
        return self.bytes - sum(each.packed_bytes for each in self.tensors)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all tensors in memory."""
        return sum(each.dense_bytes for each in self.tensors)

    @property
    def ratio(self) -> float:
        """How many times smaller the whole file is than the tensors in memory."""
        return self.dense_bytes / self.bytes

    @property
    def bits(self) -> float:
        """Bits of the whole file for each entry of all tensors."""
        return 8 * self.bytes / max(1, sum(each.count for each in self.tensors))


def write_packed(path: Path, manifest: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a packed file; the same input gives the same bytes.

    Args:
        path: The file; one that is there is replaced when the new one is complete.
        manifest: JSON values.
        tensors: Names and tensors, taken one by one.

    Raises:
        ArtifactError: If a tensor is of a kind that cannot be packed, or the file cannot be written.
    """
    rows: list[object] = []
    payloads: list[bytes] = []
    dense = 0
    for name, tensor in tensors:
        dtype, words = _words(name, tensor)
        shape = list(tensor.shape)
        plan, streams = smallest(words, shape, floating=tensor.is_floating_point())
        payloads += [each.data for each in streams]
        dense += words.nbytes
        table = [[each.coding, each.count, len(each.data)] for each in streams]
        how = [plan.positions, plan.values, plan.dim, *plan.sizes]
        rows.append([name, dtype, shape, how, table, _checksum(name, dtype, shape, words)])
    text = compact({**manifest, "tensors": rows}).encode()
    if len(text) > _HEADER_LIMIT:
        raise ArtifactError(f"{path}: edits, meta and names take {len(text)} bytes; a packed file has room for 32 MiB")
    header = squeeze(text)
    prelude = PRELUDE.pack(MAGIC, FORMAT, *NEEDS, len(header), b"")[:-8]
    content = b"".join([prelude, _digest(prelude, header), header, *payloads])
    write(path, content.ljust(_least(dense), b"\0"))


def compact(manifest: Mapping[str, Any]) -> str:
    """Return JSON without spaces, its keys in order."""
    try:
        return json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    except TypeError as error:
        raise ArtifactError(f"args and meta must be JSON values: {error}") from error


class PackedFile:
    """A packed file that is open; a context manager.

    Its header has been checked; a tensor is read, decoded and checked when it is asked for.

    Args:
        path: The file.

    Attributes:
        manifest: What the file says beside its tensors.
        packed: What is in it.

    Raises:
        ArtifactError: If it is no packed file, is damaged, or needs a newer slivo.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file: BinaryIO = self.path.open("rb")
        except OSError as error:
            raise ArtifactError(f"{self.path} cannot be read: {error.strerror or error}") from error
        try:
            self._open()
        except MalformedError as error:
            self._file.close()
            raise ArtifactError(f"{self.path} is damaged: {error}; restore it from a copy") from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def tensor(self, name: str) -> Tensor:
        """Read a tensor.

        Allocates a few times its bytes; all tensors together have at most 4096 times the file's, and 1 MiB.

        Args:
            name: One of those that iterating gives.

        Raises:
            ArtifactError: If there is none of this name, or it is damaged.
        """
        if name not in self._tensors:
            raise ArtifactError(f"{self.path} has no tensor {name!r}; it has {', '.join(list(self._tensors)[:8])} …")
        row = self._tensors[name]
        dtype = DTYPES[row.dtype]
        try:
            words = put_together(
                self._streams(row), row.shape, row.plan, width=dtype.itemsize, floating=dtype.is_floating_point
            )
            if _checksum(name, row.dtype, row.shape, words) != row.checksum:
                raise MalformedError("its checksum differs")
        except MalformedError as error:
            raise ArtifactError(f"{self.path}: {name} is damaged: {error}; restore the file from a copy") from error
        data = torch.from_numpy(words.view("u1") if words.flags.writeable else words.view("u1").copy())
        return data.view(dtype).reshape(row.shape)

    def _streams(self, row: PackedTensor) -> list[Stream]:
        self._file.seek(row.offset)
        payload = self._file.read(row.packed_bytes)
        if len(payload) != row.packed_bytes:
            raise MalformedError("the file has become shorter")
        streams, start = [], 0
        for coding, count, size in row.streams:
            streams.append(Stream(coding, count, payload[start : start + size]))
            start += size
        return streams

    def _open(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        prelude = self._file.read(PRELUDE.size)
        if prelude[: len(MAGIC)] != MAGIC:
            raise ArtifactError(f"{self.path} is no packed artifact: it does not begin as one")
        if len(prelude) < PRELUDE.size:
            raise MalformedError("it is cut off")
        _, version, *needs, length, checksum = PRELUDE.unpack(prelude)
        if version > FORMAT:
            raise ArtifactError(
                f"{self.path} has format {version}, which slivo {'.'.join(map(str, needs))} or later reads; this "
                f"version reads up to {FORMAT}: upgrade slivo to read it"
            )
        header = self._file.read(min(length, size))
        if len(header) != length:
            raise MalformedError("it is cut off")
        if _digest(prelude[:-8], header) != checksum:
            raise MalformedError("the checksum of its header differs")
        content = _json(expand(header, None, limit=min(_HEADER_LIMIT, _FREE + _GROWTH * length)))
        rows = content.pop("tensors", None)
        self.manifest: dict[str, Any] = _manifest(content)
        if not isinstance(rows, list):
            raise MalformedError("its table of tensors is none")
        offset = PRELUDE.size + length
        self._tensors: dict[str, PackedTensor] = {}
        for item in rows:
            row = _row(item, offset)
            if row.name in self._tensors:
                raise MalformedError(f"it has two tensors {row.name!r}")
            self._tensors[row.name] = row
            offset += row.packed_bytes
        self.packed = Packed(self.path, tuple(self._tensors.values()), size)
        if max(offset, _least(self.packed.dense_bytes)) != size:
            raise MalformedError(f"it has {size} bytes, which are not those that its header says")


def _words(name: str, tensor: Tensor) -> tuple[str, Words]:
    """Return a tensor's dtype by name, and its entries as unsigned numbers, in order."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES or tensor.layout != torch.strided or tensor.is_meta:
        raise ArtifactError(
            f"{name} is {dtype}, {tensor.layout}; what can be packed is dense and one of {list(DTYPES)}"
        )
    flat = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg().reshape(-1)
    return dtype, flat.view(torch.uint8).numpy().view(f"<u{tensor.dtype.itemsize}")


def _least(dense_bytes: int) -> int:
    """Return the bytes that a file of tensors of so many bytes has at least."""
    return max(0, -(-(dense_bytes - _FREE) // _GROWTH))


def _checksum(name: str, dtype: str, shape: Iterable[int], words: Words) -> str:
    return _digest(json.dumps([name, dtype, list(shape)]).encode(), words.view("u1")).hex()


def _digest(*parts: bytes | NDArray[np.uint8]) -> bytes:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.data if isinstance(part, np.ndarray) else part)
    return digest.digest()


def _json(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedError("its header is not readable JSON") from error
    if not isinstance(found, dict):
        raise MalformedError("its header is no object")
    return found


def _manifest(content: dict[str, Any]) -> dict[str, Any]:
    kinds: dict[str, type | tuple[type, ...]] = {
        "format": int, "factory": (str, type(None)), "args": dict, "edits": list, "tied": dict, "meta": dict,
    }  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(content.get(key, ...), kind):
            raise MalformedError(f"{key} is missing from its header, or of the wrong kind")
    if not all(isinstance(each, dict) for each in content["edits"]):
        raise MalformedError("one of its edits is no object")
    if not all(isinstance(each, str) for each in content["tied"].values()):
        raise MalformedError("one of its tied tensors has no name")
    return content


def _row(item: Any, offset: int) -> PackedTensor:
    """Read a line of the table of tensors; what it declares is checked against what it takes in the file."""
    try:
        name, dtype, shape, how, table, checksum = item
        streams = tuple((str(coding), _size(count), _size(size)) for coding, count, size in table)
        sizes = tuple(_size(each) for each in shape)
        plan = Plan(str(how[0]), str(how[1]), _size(how[2]), tuple(_size(each) for each in how[3:]))
        name.encode(), checksum.encode()
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise MalformedError(f"a line of its table of tensors cannot be read: {str(item)[:60]!r}") from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise MalformedError(f"{name} has dtype {str(dtype)[:40]!r}, which is not known here")
    if plan.positions not in POSITIONS or plan.values not in VALUES or {each for each, _, _ in streams} - CODINGS:
        raise MalformedError(f"{name} has a codec that is not known here")
    if len(sizes) > _MOST_DIMS or prod(max(1, each) for each in sizes) >= _MOST:
        raise MalformedError(f"{name} has a shape that no tensor has")
    packed = sum(size for _, _, size in streams)
    return PackedTensor(name, dtype, sizes, plan.name, offset, packed, plan, streams, checksum)


def _size(value: object) -> int:
    """Return a number of a header if it can be a size."""
    if type(value) is not int or not 0 <= value < _MOST:
        raise MalformedError(f"{str(value)[:40]} is no size")
    return value
