"""Saved models: safetensors and JSON edits, never a pickle."""

from slivo.artifact.store import load, read, resolve, save, size_bytes, verify

__all__ = ["load", "read", "resolve", "save", "size_bytes", "verify"]
