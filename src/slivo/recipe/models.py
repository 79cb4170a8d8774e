"""The networks that a recipe names: made by a factory, or read from an artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slivo import artifact, edits
from slivo.errors import ArtifactError, SlivoError
from slivo.graph.copies import duplicate


@dataclass(frozen=True)
class Origin:
    """How a network is made, for a run and for those who load what it leaves.

    Args:
        make: Makes the network: trained, if it is one that is trained already.
        factory: What its edits start from, as ``"package.module:callable"``; None if that has no name.
        args: Keyword arguments of the factory.
        base: Makes what its edits start from, where there is no factory's name; None if that cannot be made again.
    """

    make: Callable[[], nn.Module]
    factory: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    base: Callable[[], nn.Module] | None = None

    def save(self, model: nn.Module, path: Path, meta: Mapping[str, Any]) -> None:
        """Save a network that comes from here."""
        artifact.save(model, path, factory=self.factory, args=dict(self.args), meta=dict(meta))

    @property
    def loads(self) -> bool:
        """Whether what is saved can be loaded in this process."""
        return self.factory is not None or self.base is not None

    def load(self, path: Path) -> nn.Module:
        """Load what `save` wrote."""
        if self.factory is not None:
            return artifact.load(path)
        if self.base is None:
            raise SlivoError(
                f"{path} cannot be loaded: the model that was given carries edits, and what they started from is not "
                "known; run in one go, or save the model with its factory and name it in a recipe"
            )
        return artifact.load(path, factory=self.base)


def named(reference: str, args: Mapping[str, Any]) -> Origin:
    """Return the origin of a network that a recipe names.

    Args:
        reference: ``"package.module:callable"``, or an artifact: its folder or packed file.
        args: Keyword arguments of the callable.

    Raises:
        ArtifactError: If it does not import, or the folder is damaged or does not say how the network is made.
    """
    folder = Path(reference)
    if folder.exists():
        manifest = artifact.read(folder)
        if manifest["factory"] is None:
            raise ArtifactError(
                f"{folder} does not name a factory; save it with one (factory='package.module:callable')"
            )
        if args:
            raise ArtifactError(f"{folder} is an artifact and takes no args; it holds those it was made with")
        return Origin(lambda: artifact.load(folder), manifest["factory"], manifest["args"])
    if ":" not in reference:
        raise ArtifactError(f"{reference!r} is no artifact, and not of the form package.module:callable")
    factory = artifact.resolve(reference)

    def make() -> nn.Module:
        try:
            model = factory(**args)
        except Exception as error:  # it is others' code, and what it was given is the recipe's
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise ArtifactError(f"{reference} cannot be called with {dict(args)}: {said}") from error
        if not isinstance(model, nn.Module):
            raise ArtifactError(f"{reference} returned {type(model).__name__}, not a torch.nn.Module")
        return model

    return Origin(make, reference, dict(args))


def live(model: nn.Module) -> Origin:
    """Return the origin of a network that is at hand."""
    return Origin(lambda: duplicate(model), base=None if edits.record(model) else lambda: duplicate(model))


def made(origin: Origin, seed: int) -> nn.Module:
    """Make a network, its initial weights a function of the seed; the caller's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return origin.make()
