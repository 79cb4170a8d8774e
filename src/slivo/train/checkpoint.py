"""Checkpoints: one safetensors file, with all that is no tensor as JSON in its header; written all or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from slivo import files
from slivo.errors import ArtifactError

FORMAT = 1
"""Version of the format; a reader refuses any other."""

# Keys of the encoding; a dict of the user's that has one of them as a key is spelled as pairs.
_TENSOR, _TUPLE, _PAIRS = "$tensor", "$tuple", "$pairs"


def write(path: str | os.PathLike[str], tree: Mapping[str, Any]) -> None:
    """Write a tree of values to a file, atomically.

    The file is written beside its place, synced, and moved over the one that is there, which stays whole until then:
    whenever the process or the machine dies, there is the old checkpoint or the new one.

    Args:
        path: The file; its folder is made if need be.
        tree: Nested dicts, lists and tuples of numbers, strings, booleans, None and tensors. Keys of any such kind
            are kept, and so are tuples.

    Raises:
        ArtifactError: If the tree holds anything else, or the file cannot be written.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "state"
        >>> write(file, {"weight": torch.ones(2), 0: (1, 2.5)})
        >>> read(file)
        {'weight': tensor([1., 1.]), 0: (1, 2.5)}
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    document = json.dumps(_encode(tree, tensors, ""))
    header = {"format": str(FORMAT), "tree": document, "sha256": _digest(document, tensors)}
    files.write(path, save(tensors, header))


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `write` wrote; tensors come to the CPU.

    Args:
        path: The file.

    Returns:
        The tree.

    Raises:
        ArtifactError: If the file cannot be read, is damaged, or of another format; says what to do.
    """
    remedy = "remove it to train from the start, or put back a copy"
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except OSError as error:
        raise ArtifactError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ArtifactError(f"checkpoint {path} is damaged ({error}); {remedy}") from error
    if header.get("format") != str(FORMAT):
        raise ArtifactError(
            f"checkpoint {path} is of format {header.get('format')}, this version reads {FORMAT}; "
            "go on with the version that wrote it, or remove it to train from the start"
        )
    document = header.get("tree", "")
    if header.get("sha256") != _digest(document, tensors):
        raise ArtifactError(f"checkpoint {path} is damaged (its checksum does not match); {remedy}")
    tree: dict[str, Any] = _decode(json.loads(document), tensors)
    return tree


def _encode(value: Any, tensors: dict[str, Tensor], place: str) -> Any:
    if isinstance(value, Tensor):
        # A copy, since safetensors refuses tensors that share memory, and two of them may.
        copy = value.detach().to("cpu", copy=True)
        # The layout is kept: mixed layouts in one operation may round otherwise than those of the first time.
        order = sorted(range(copy.dim()), key=copy.stride, reverse=True) if not copy.is_contiguous() else []
        # Numbered, because places of different values may read the same (the keys 1 and "1").
        name = str(len(tensors))
        tensors[name] = (copy.permute(order) if order else copy).contiguous()
        return {_TENSOR: name, "order": order} if order else {_TENSOR: name}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(item, tensors, f"{place}/{key}") for key, item in value.items()}
        pairs = [[key, _encode(item, tensors, f"{place}/{key}")] for key, item in value.items()]
        return {_PAIRS: [[_encode(key, tensors, place), item] for key, item in pairs]}
    if isinstance(value, list | tuple):
        items = [_encode(item, tensors, f"{place}/{index}") for index, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ArtifactError(f"a checkpoint cannot hold {place or 'this'}: {type(value).__name__}; use numbers or tensors")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        tensor, order = tensors[value[_TENSOR]], value.get("order", [])
        return tensor.permute([order.index(dim) for dim in range(len(order))]) if order else tensor
    if _TUPLE in value:
        return tuple(_decode(item, tensors) for item in value[_TUPLE])
    if _PAIRS in value:
        return {_decode(key, tensors): _decode(item, tensors) for key, item in value[_PAIRS]}
    return {key: _decode(item, tensors) for key, item in value.items()}


def _digest(document: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(document.encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].dtype}{tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
