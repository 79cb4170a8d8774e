"""Streams: arrays of small unsigned numbers, each coded in the way that takes the fewest bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from math import log2
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slivo.artifact import frequencies
from slivo.errors import require

Symbols = NDArray[Any]
"""One dimension, of numbers of one byte (uint8) or two (uint16)."""

_DENSE = {1: "u1", 2: "<u2"}

_PACKABLE = (1, 2, 4)
"""Bits of which a byte holds a whole number."""

_SMALL = 2**12


CODINGS = frozenset(
    {"raw", "same", *(f"bits{bits}" for bits in range(1, 8)), "zstd", "ans"}
    | {f"zstd{bits}" for bits in (1, 2, 4, *range(9, 16))}
)
"""Names of codings."""


class MalformedError(ValueError):
    """Coded data that cannot be what was written; the reader of the file says where it is."""


@dataclass(frozen=True)
class Stream:
    """A coded stream.

    Args:
        coding: How; one of `CODINGS`.
        count: The number of symbols.
        data: The bytes.
    """

    coding: str
    count: int
    data: bytes


def encode(symbols: Symbols, *, ans: bool = True) -> Stream:
    r"""Code symbols in the way that takes the fewest bytes; of equal ones the simplest.

    - ``raw``: as they are, little-endian.
    - ``same``: one symbol for all.
    - ``bits``: each in as many bits as the greatest needs, most significant first.
    - ``zstd``: a Zstandard frame of the bytes: Huffman codes and repeats. Behind ``zstd`` the bits of a symbol if a
      byte holds several (1, 2 or 4), or if it takes two (9-15; the upper eight are a byte, as what is above the
      rest differs most). Of numbers of two bytes all low ones come first.
    - ``ans``: asymmetric numeral systems with the symbols' own frequencies (`frequencies`), which come first.

    Args:
        symbols: Any number of them.
        ans: Whether ``ans`` may be used, which is decoded by 35-55 million symbols a second, and the others by ten
            times as many.

    Sources: Duda 2013, "Asymmetric numeral systems", arXiv:1311.2540; Collet, Kucherawy 2021, "Zstandard Compression
    and the application/zstd Media Type", RFC 8878.

    Example:
        >>> encode(np.array([3, 3, 3], "u1"))
        Stream(coding='same', count=3, data=b'\x03')
        >>> decode(encode(np.array([1, 0, 2, 3] * 9, "u1")), 1).tolist() == [1, 0, 2, 3] * 9
        True
    """
    count, width = len(symbols), symbols.dtype.itemsize
    plain = symbols.astype(_DENSE[width], copy=False).tobytes()
    if count == 0:
        return Stream("raw", 0, b"")
    top = int(symbols.max())
    if int(symbols.min()) == top:
        return Stream("same", count, plain[:width])
    found = [Stream("raw", count, plain)]
    bits = top.bit_length()
    if width == 1 and bits < 8:
        found.append(Stream(f"bits{bits}", count, _pack(symbols, bits)))
    if width == 2 and 8 < bits < 16:
        found.append(Stream(f"zstd{bits}", count, squeeze(_planes(symbols << np.uint16(16 - bits)))))
    else:
        found.append(Stream("zstd", count, squeeze(_planes(symbols))))
    if width == 1 and bits in _PACKABLE:
        found.append(Stream(f"zstd{bits}", count, squeeze(_pack(symbols, bits))))
    if ans:
        found.append(Stream("ans", count, _to_ans(symbols)))
    return min(found, key=lambda stream: len(stream.data))


def decode(stream: Stream, width: int) -> Symbols:
    """Return the symbols of a stream.

    Allocates a few times ``stream.count`` bytes, so the count must have been checked.

    Args:
        stream: What `encode` returned, or what a file says.
        width: Bytes of a symbol, 1 or 2.

    Returns:
        Symbols, uint8 or uint16, perhaps read-only.

    Raises:
        MalformedError: If the data is no such stream.
    """
    coding, count, data = stream.coding, stream.count, stream.data
    kind, bits = coding.rstrip("0123456789"), int(coding.lstrip("abcdefghijklmnopqrstuvwxyz") or 0)
    if kind == "raw":
        _expect(len(data), count * width)
        return np.frombuffer(data, _DENSE[width])
    if kind == "same":
        _expect(len(data), width)
        return np.repeat(np.frombuffer(data, _DENSE[width]), count)
    if kind == "bits" and width == 1 and bits:
        _expect(len(data), -(-count * bits // 8))
        return _unpack(data, bits, count)
    if kind == "zstd" and not bits:
        return _joined(expand(data, count * width), width)
    if kind == "zstd" and width == 1 and bits in _PACKABLE:
        return _unpack(expand(data, -(-count * bits // 8)), bits, count)
    if kind == "zstd" and width == 2 and 8 < bits < 16:
        symbols = _joined(expand(data, count * width), width)
        symbols >>= np.uint16(16 - bits)
        return symbols
    if coding == "ans":
        return _from_ans(data, width, count)
    raise MalformedError(f"its coding {coding!r} is not known for numbers of {width} bytes")


def estimate(counts: NDArray[Any]) -> float:
    """Return about how many bytes symbols of these counts take: their entropy, and what says their frequencies."""
    present = int(np.count_nonzero(counts))
    if present < 2:
        return 2.0
    return min(_entropy(counts) + present / 2 + 12, float(counts.sum()) * max(1.0, log2(len(counts)) / 8))


def _entropy(counts: NDArray[Any]) -> float:
    """Return the bytes that independent symbols of these counts take at least."""
    present = counts[counts > 0].astype(np.float64)
    return float((present * np.log2(present.sum() / present)).sum()) / 8


def _expect(found: int, wanted: int) -> None:
    if found != wanted:
        raise MalformedError(f"a stream has {found} bytes where {wanted} are needed")


def _planes(symbols: Symbols) -> bytes:
    """Return the bytes of symbols, all low bytes first."""
    width = symbols.dtype.itemsize
    return symbols.astype(_DENSE[width], copy=False).view("u1").reshape(-1, width).T.tobytes()


def _joined(data: bytes, width: int) -> Symbols:
    planes: Symbols = np.frombuffer(data, "u1").reshape(width, -1)
    if width == 1:
        return planes.reshape(-1)
    symbols: Symbols = np.left_shift(planes[1], 8, dtype=np.uint16)
    symbols |= planes[0]
    return symbols


def _pack(symbols: Symbols, bits: int) -> bytes:
    """Put symbols of some bits each one behind the other; eight of them are so many bytes."""
    padded = np.zeros(-(-len(symbols) // 8) * 8, np.uint64)
    padded[: len(symbols)] = symbols
    eights, number = padded.reshape(-1, 8), np.zeros(len(padded) // 8, np.uint64)
    for place in range(8):
        number = number << np.uint64(bits) | eights[:, place]
    packed = number.astype(">u8").view("u1").reshape(-1, 8)[:, 8 - bits :]
    return packed.tobytes()[: -(-len(symbols) * bits // 8)]


def _unpack(data: bytes, bits: int, count: int) -> Symbols:
    if bits in _PACKABLE:
        each = 8 // bits
        shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
        table = (np.arange(256, dtype=np.uint8)[:, None] >> shifts) & np.uint8(2**bits - 1)
        return table[np.frombuffer(data, "u1")].reshape(-1)[:count] if each > 1 else np.frombuffer(data, "u1")
    groups = -(-count // 8)
    padded = np.frombuffer(data.ljust(groups * bits, b"\0"), "u1").reshape(groups, bits)
    number = np.zeros(groups, np.uint64)
    for place in range(bits):
        number = number << np.uint64(8) | padded[:, place]
    symbols = np.empty((groups, 8), np.uint8)
    for place in range(8):
        symbols[:, place] = (number >> np.uint64(bits * (7 - place))) & np.uint64(2**bits - 1)
    return symbols.reshape(-1)[:count]


@cache
def _zstandard() -> ModuleType:
    return require("zstandard", extra="pack", why="packed files")


def squeeze(data: bytes) -> bytes:
    """Return a Zstandard frame of bytes that says how many they are."""
    zstd = _zstandard()
    # Matches of fewer than seven bytes are chance here, and cost more than the Huffman codes of what they replace.
    settings = zstd.ZstdCompressionParameters(strategy=zstd.STRATEGY_FAST, min_match=7, hash_log=6, window_log=17)
    found: list[bytes] = [zstd.ZstdCompressor(compression_params=settings).compress(data)]
    # The thorough search for repeats takes a microsecond a byte: where there is little, or where there are many.
    if len(data) <= _SMALL or len(found[0]) < 0.7 * _entropy(np.bincount(np.frombuffer(data, "u1"))):
        found.append(zstd.ZstdCompressor(level=19).compress(data))
    return min(found, key=len)


def expand(data: bytes, size: int | None, *, limit: int = 2**62) -> bytes:
    """Return what a frame holds; it must say how many bytes these are before they are allocated.

    Args:
        data: A Zstandard frame, and nothing behind it.
        size: The bytes that are needed; None for any number up to the limit.
        limit: See there.

    Raises:
        MalformedError: If it is none, or holds another number.
    """
    zstd = _zstandard()
    try:
        said: int = zstd.frame_content_size(data)
        if not 0 <= said <= limit or size not in (None, said):
            raise MalformedError(f"a compressed stream says that it holds {said} bytes")
        found: bytes = zstd.ZstdDecompressor().decompress(data, allow_extra_data=False) if said else b""
    except zstd.ZstdError as error:
        raise MalformedError(f"a compressed stream cannot be read ({error})") from error
    _expect(len(found), said)
    return found


def _to_ans(symbols: Symbols) -> bytes:
    low = int(symbols.min())
    shifted = (symbols - low).astype(np.int32)
    table = frequencies.measure(np.bincount(shifted))
    coder = _constriction().stream.stack.AnsCoder()
    coder.encode_reverse(shifted, _model(table))
    words: NDArray[np.uint32] = coder.get_compressed()
    head = struct.pack("<BB" if symbols.dtype.itemsize == 1 else "<HH", low, len(table) - 1)
    return head + frequencies.pack(table) + words.astype("<u4").tobytes()


def _from_ans(data: bytes, width: int, count: int) -> Symbols:
    try:
        low, last = struct.unpack_from("<BB" if width == 1 else "<HH", data)
        table, used = frequencies.unpack(data[2 * width :], last + 1)
    except (struct.error, IndexError) as error:
        raise MalformedError("the frequencies of a stream are cut off") from error
    words = data[2 * width + used :]
    if len(words) % 4 or low + last >= 256**width or sum(each is not None for each in table) < 2:
        raise MalformedError("a stream's frequencies are none")
    try:
        coder = _constriction().stream.stack.AnsCoder(np.frombuffer(words, "<u4").astype(np.uint32))
    except ValueError as error:
        raise MalformedError(f"a stream ends as none does ({error})") from error
    symbols: NDArray[Any] = coder.decode(_model(table), count)
    if not coder.is_empty():
        raise MalformedError("a stream holds more than its symbols")
    symbols = symbols + low
    return symbols.astype(_DENSE[width])


@cache
def _constriction() -> ModuleType:
    return require("constriction", extra="pack", why="packed files")


def _model(table: frequencies.Table) -> Any:
    return _constriction().stream.model.Categorical(frequencies.weights(table), perfect=False)
