"""Saved models: safetensors and JSON edits, never a pickle; or all of it in one packed file."""

from slivo.artifact.container import Packed, PackedFile, PackedTensor
from slivo.artifact.packing import pack, unpack
from slivo.artifact.store import load, read, resolve, save, size_bytes, verify

__all__ = [
    "Packed", "PackedFile", "PackedTensor", "load", "pack", "read", "resolve", "save", "size_bytes", "unpack", "verify",
]  # fmt: skip
