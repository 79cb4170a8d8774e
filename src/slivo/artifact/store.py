"""Save and load models as their factory, their edits and their tensors."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slivo import edits
from slivo.artifact.container import PackedFile, compact
from slivo.errors import ArtifactError
from slivo.files import sync
from slivo.graph.capture import canonical_names

FORMAT = 1
"""Version of the format; a reader refuses a newer one."""

MANIFEST = "slivo.json"
TENSORS = "model.safetensors"

Factory = Callable[..., nn.Module]


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    factory: str | None = None,
    args: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Path:
    """Save a model as its edits (JSON) and its tensors (safetensors).

    The folder is written beside its place and moved there when it is complete, so that a reader never sees half of
    it; an artifact that is there already is replaced, any other folder is left alone.

    Args:
        model: The model; the edits it carries are saved with it.
        path: The folder to write.
        factory: How to make the model that the edits start from, as ``"package.module:callable"``. Without it,
            `load` must be told.
        args: Keyword arguments of the factory; JSON values.
        meta: Anything else worth keeping; JSON values.

    Returns:
        The folder.

    Raises:
        ArtifactError: If the folder exists and is no artifact, or cannot be written.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "net"
        >>> net = nn.Linear(3, 2)
        >>> again = load(save(net, folder), factory=lambda: nn.Linear(3, 2))
        >>> torch.equal(net.weight, again.weight)
        True
    """
    path = Path(path)
    write_folder(path, *describe(model, factory=factory, args=args, meta=meta))
    return path


def describe(
    model: nn.Module, *, factory: str | None, args: Mapping[str, Any] | None, meta: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what an artifact of the model says, and its tensors, tied ones once; arguments as those of `save`."""
    names = canonical_names(model)
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in _named_tensors(model) if names[name] == name
    }
    manifest = {
        "format": FORMAT,
        "factory": factory,
        "args": dict(args or {}),
        "edits": edits.to_json(edits.record(model)),
        "tied": {name: first for name, first in names.items() if name != first},
        "meta": dict(meta or {}),
    }
    return manifest, tensors


def write_folder(path: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an artifact's folder, whole or not at all."""
    if path.exists() and not (path / MANIFEST).is_file():
        raise ArtifactError(f"{path} exists and is no slivo artifact; give another folder, or remove it first")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}") from error
    try:
        save_file(dict(tensors), temporary / TENSORS)
        seal = _sha256((temporary / TENSORS).read_bytes())
        (temporary / MANIFEST).write_text(_seal({**manifest, "tensors_sha256": seal}), encoding="utf-8")
        for file in (temporary / TENSORS, temporary / MANIFEST):
            sync(file)
        _replace(temporary, path)
    except safetensors.SafetensorError as error:  # which is what it calls a full disk
        raise ArtifactError(f"{path} cannot be written: {error}") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(path: str | os.PathLike[str], *, factory: Factory | None = None) -> nn.Module:
    """Load a model: make its base, replay its edits without allocating, and fill in the tensors.

    Args:
        path: A folder that `save` wrote, or a file that `pack` wrote.
        factory: Makes the model that the edits start from; called with the saved arguments. Default: the factory
            that the artifact names.

    Returns:
        The model, in evaluation mode, bit-identical to the saved one, with its edits on record.

    Raises:
        ArtifactError: If the folder is no artifact, is damaged or newer than this version, or does not fit the
            factory.

    Example:
        >>> import tempfile
        >>> folder = save(nn.Linear(3, 2), Path(tempfile.mkdtemp()) / "net", factory="torch.nn:Linear", args={
        ...     "in_features": 3, "out_features": 2,
        ... })
        >>> load(folder)
        Linear(in_features=3, out_features=2, bias=True)
    """
    path = Path(path)
    manifest, tensors = contents(path)
    if factory is None:
        if manifest["factory"] is None:
            raise ArtifactError(f"{path} does not name a factory; call load(path, factory=...) with one")
        factory = resolve(manifest["factory"])
    steps = edits.from_json(manifest["edits"])
    try:
        model = _skeleton(factory, manifest["args"])
        model = edits.replay(model, steps)
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"{path}: its edits do not fit the model that the factory makes: {error}") from error
    _fill(model, tensors, manifest["tied"], path)
    return model.eval()


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what an artifact says, and its tensors, all of it checked for damage; a folder or a packed file."""
    if path.is_file():
        with PackedFile(path) as packed:
            _understood(packed.manifest, path)
            return packed.manifest, {name: packed.tensor(name) for name in packed}
    return read(path), load_file(path / TENSORS)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return an artifact's manifest once the whole artifact has been checked for damage; a folder or a packed file.

    Raises:
        ArtifactError: Names the file that is missing, damaged or newer than this version.
    """
    path = Path(path)
    if path.is_file():
        return contents(path)[0]
    for name in (MANIFEST, TENSORS):
        if not (path / name).is_file():
            raise ArtifactError(f"{path} is no slivo artifact: it has no {name}")
    manifest = _unseal(path / MANIFEST)
    _understood(manifest, path)
    if _sha256((path / TENSORS).read_bytes()) != manifest["tensors_sha256"]:
        raise ArtifactError(f"{path / TENSORS} is damaged: its checksum differs; restore it from a copy")
    try:
        with safetensors.safe_open(path / TENSORS, framework="pt"):
            pass
    except safetensors.SafetensorError as error:
        raise ArtifactError(f"{path / TENSORS} is damaged: {error}; restore it from a copy") from error
    return manifest


def verify(path: str | os.PathLike[str]) -> None:
    """Check that an artifact is complete and undamaged.

    Raises:
        ArtifactError: If it is not.
    """
    read(path)


def size_bytes(path: str | os.PathLike[str]) -> int:
    """Return the bytes of all files of an artifact, or of a packed file."""
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def resolve(reference: str) -> Factory:
    """Import a factory by name.

    Args:
        reference: ``"package.module:callable"``; the callable may be an attribute path.

    Raises:
        ArtifactError: If the module cannot be imported, has no such attribute, or it cannot be called.

    Example:
        >>> resolve("torch.nn:Linear") is nn.Linear
        True
    """
    module, colon, name = reference.partition(":")
    if not colon or not module or not name:
        raise ArtifactError(f"model {reference!r} is not of the form package.module:callable")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        raise ArtifactError(f"model {reference!r}: module {module!r} cannot be imported: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            public = ", ".join(sorted(each for each in dir(found) if not each.startswith("_"))[:8])
            raise ArtifactError(f"model {reference!r}: {module} has no {part!r}; it has {public} …")
        found = getattr(found, part)
    if not callable(found):
        raise ArtifactError(f"model {reference!r}: it is a {type(found).__name__}, not a callable")
    factory: Factory = found
    return factory


def _understood(manifest: Mapping[str, Any], path: Path) -> None:
    if not isinstance(manifest["format"], int) or manifest["format"] > FORMAT:
        raise ArtifactError(
            f"{path} has format {manifest['format']}; this version reads up to {FORMAT}: upgrade slivo to read it"
        )


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _skeleton(factory: Factory, args: Mapping[str, Any]) -> nn.Module:
    """Make the base model on the meta device; on the CPU where its constructor needs numbers."""
    try:
        with torch.device("meta"):
            model = factory(**args)
        if not any(_holds_meta(module) for module in model.modules()):
            return model
    except (NotImplementedError, RuntimeError):
        pass
    return factory(**args)


def _holds_meta(module: nn.Module) -> bool:
    """Tell whether a module keeps a tensor outside its parameters and buffers, which no file would fill."""
    return any(isinstance(value, Tensor) and value.is_meta for value in vars(module).values())


def _fill(model: nn.Module, tensors: dict[str, Tensor], tied: Mapping[str, str], path: Path) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    new: dict[str, Tensor] = {}
    for name, old in _named_tensors(model):
        source = tied.get(name, name)
        if source not in tensors:
            raise ArtifactError(f"{path} has no tensor {name!r}, which the factory's model has")
        value = tensors[source]
        owner, _, attribute = name.rpartition(".")
        cache = attribute in modules[owner]._non_persistent_buffers_set  # a run may have left any shape there
        if (value.shape != old.shape or value.dtype != old.dtype) and not cache:
            raise ArtifactError(
                f"{path}: {name} is {value.dtype} {list(value.shape)}; the factory's model has {old.dtype} "
                f"{list(old.shape)}"
            )
        if source not in new:
            # A copy, because tensors mapped from a file are not aligned as PyTorch's are, and matrix products round
            # differently there: outputs would not be bit-identical.
            value = value.clone()
            new[source] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
        kind = "_parameters" if isinstance(old, nn.Parameter) else "_buffers"
        getattr(modules[owner], kind)[attribute] = new[source]
    extra = set(tensors) - set(new)
    if extra:
        raise ArtifactError(f"{path} has a tensor {min(extra)!r} that the factory's model lacks")


def _seal(manifest: Mapping[str, Any]) -> str:
    """Write a manifest with the checksum of its own contents."""
    body = compact(manifest)
    return json.dumps({"sha256": _sha256(body.encode()), "slivo": json.loads(body)}, separators=(",", ":"))


def _unseal(file: Path) -> dict[str, Any]:
    try:
        sealed = json.loads(file.read_text(encoding="utf-8"))
        body = compact(sealed["slivo"])
        intact = sealed["sha256"] == _sha256(body.encode())
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} is damaged: it is not readable JSON; restore it from a copy") from error
    if not intact:
        raise ArtifactError(f"{file} is damaged: its checksum differs; restore it from a copy")
    manifest: dict[str, Any] = sealed["slivo"]
    return manifest


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _replace(temporary: Path, path: Path) -> None:
    """Move a complete folder to its place; a folder that was there goes last."""
    old = None
    if path.exists():
        old = path.with_name(f".{path.name}-old-{os.getpid()}")
        path.rename(old)
    temporary.chmod(0o755)
    temporary.rename(path)
    sync(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
