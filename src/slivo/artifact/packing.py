"""Artifacts and models into one small file, and back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor, nn

from slivo.artifact.container import Packed, PackedFile, write_packed
from slivo.artifact.store import TENSORS, contents, describe, read, write_folder
from slivo.errors import ArtifactError


def pack(
    source: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    factory: str | None = None,
    args: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Packed:
    """Pack a model, or an artifact, into one file without loss: each tensor in the codec that makes it smallest.

    What there is to gain has been put there before: zeros, few different values, integer codes. `load` reads the file
    as it reads a folder.

    Args:
        source: The model, or the folder of an artifact.
        path: The file to write, ``.slivo`` by custom; one that is there is replaced.
        factory: For a model, as `save` takes it; a folder says it itself. So are ``args`` and ``meta``.
        args: Keyword arguments of the factory; JSON values.
        meta: Anything else worth keeping; JSON values.

    Returns:
        What is in the file: bytes, codec and bits for each tensor, and the size of the whole.

    Raises:
        ArtifactError: If the folder is no artifact, a tensor is of a kind that cannot be packed, or the file cannot be
            written.
        SlivoError: If what the extra ``pack`` brings is not installed.

    Source: Han, Mao, Dally 2016, "Deep Compression", arXiv:1510.00149 (prune, share, code).

    Example:
        >>> import tempfile
        >>> net = nn.Linear(1000, 100)
        >>> _ = net.weight.data[:, 10:].zero_()
        >>> file = Path(tempfile.mkdtemp()) / "net.slivo"
        >>> packed = pack(net, file, factory="torch.nn:Linear", args={"in_features": 1000, "out_features": 100})
        >>> packed.tensors[1].name, packed.tensors[1].codec, packed.ratio > 80
        ('weight', 'gaps', True)
    """
    path = Path(path)
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder; a packed artifact is a file: {path.name}.slivo, say")
    if isinstance(source, nn.Module):
        manifest, tensors = describe(source, factory=factory, args=args, meta=meta)
        write_packed(path, manifest, sorted(tensors.items()))
    else:
        source = Path(source)
        if source.is_file():
            raise ArtifactError(f"{source} is a file; give the folder of an artifact, or unpack it first")
        if any(each is not None for each in (factory, args, meta)):
            raise ArtifactError(f"{source} says itself how it is made; leave out factory, args and meta")
        manifest = read(source)
        del manifest["tensors_sha256"]
        write_packed(path, manifest, _stored(source / TENSORS))
    with PackedFile(path) as file:
        return file.packed


def unpack(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Unpack a file that `pack` wrote into the folder of an artifact, the same bit by bit.

    Args:
        path: The file.
        folder: The folder to write; an artifact that is there is replaced, any other folder is left alone.

    Returns:
        The folder.

    Raises:
        ArtifactError: If the file is damaged, is none that was packed, or needs a newer slivo; or if the folder exists
            and is no artifact, or cannot be written.

    Example:
        >>> import tempfile, torch
        >>> net, place = nn.Linear(3, 2), Path(tempfile.mkdtemp())
        >>> folder = unpack(pack(net, place / "net.slivo").path, place / "net")
        >>> from slivo.artifact import load
        >>> torch.equal(load(folder, factory=lambda: nn.Linear(3, 2)).weight, net.weight)
        True
    """
    path, folder = Path(path), Path(folder)
    if not path.is_file():
        raise ArtifactError(f"{path} is no file; give one that slivo pack wrote")
    write_folder(folder, *contents(path))
    return folder


def _stored(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safetensors.safe_open(file, framework="pt") as tensors:
        for name in sorted(tensors.keys()):
            yield name, tensors.get_tensor(name)
