"""The networks of the benchmarks, one module a source.

Each module says in ``INSTALL`` how to get its library and has a function ``networks()`` that returns for each name a
function that makes the model, with random weights, and example inputs for it. Libraries are imported inside
``networks()``, so that a source that is not installed does not stop the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from torch import nn

from networks import huggingface, keras, small, stress, timm, torchvision

Make = Callable[[], tuple[nn.Module, Any]]
"""Makes a model and example inputs for it."""

SOURCES: tuple[ModuleType, ...] = (torchvision, timm, huggingface, keras, small, stress)


def label(source: ModuleType) -> str:
    """Return the name of a source."""
    return source.__name__.rpartition(".")[2]


def names(sources: Iterable[ModuleType] = SOURCES) -> tuple[list[str], list[str]]:
    """List the networks of those sources that are installed.

    Returns:
        The names, each ``source/network``, and for each source that is missing a line that says how to get it.
    """
    found: list[str] = []
    missing: list[str] = []
    for source in sources:
        try:
            found += [f"{label(source)}/{name}" for name in source.networks()]
        except ImportError as error:
            missing.append(f"{label(source)}: left out, {error}; {source.INSTALL}")
    return found, missing


def make(name: str) -> tuple[nn.Module, Any]:
    """Return the model called ``source/network`` and its example inputs."""
    where, _, which = name.partition("/")
    source = next(each for each in SOURCES if label(each) == where)
    return source.networks()[which]()
