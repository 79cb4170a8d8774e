"""slivo: prune, then distil.

Turns a trained PyTorch network into a smaller, faster one that keeps its accuracy, by pruning and distillation
together, with quantization beside them. Everything a user needs is here; the subpackages hold the parts.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from slivo.errors import ArtifactError, CaptureError, OutputError, RecipeError, ShapeError, SlivoError, TargetError

if TYPE_CHECKING:
    from slivo import losses
    from slivo.artifact import load, pack, save, unpack
    from slivo.distill import distill
    from slivo.factorize import factorize
    from slivo.graph import trace
    from slivo.measure import inspect
    from slivo.prune import Budget, prune, sparsify
    from slivo.quantize import quantize
    from slivo.recipe import Target, compress
    from slivo.share import share

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "Budget",
    "CaptureError",
    "OutputError",
    "RecipeError",
    "ShapeError",
    "SlivoError",
    "Target",
    "TargetError",
    "compress",
    "distill",
    "factorize",
    "inspect",
    "load",
    "losses",
    "pack",
    "prune",
    "quantize",
    "save",
    "share",
    "sparsify",
    "trace",
    "unpack",
]

# Where each public name lives. They are imported when first used, so that `slivo --help` need not wait for PyTorch.
_HOMES = {
    "Budget": "slivo.prune",
    "Target": "slivo.recipe",
    "compress": "slivo.recipe",
    "distill": "slivo.distill",
    "factorize": "slivo.factorize",
    "inspect": "slivo.measure",
    "load": "slivo.artifact",
    "pack": "slivo.artifact",
    "prune": "slivo.prune",
    "quantize": "slivo.quantize",
    "save": "slivo.artifact",
    "share": "slivo.share",
    "sparsify": "slivo.prune",
    "trace": "slivo.graph",
    "unpack": "slivo.artifact",
}


class _Package(ModuleType):
    """This package; a public function wins over the subpackage of the same name, whichever is imported first."""

    def __setattr__(self, name: str, value: object) -> None:
        # The import system binds a subpackage to its parent when it has been imported: `slivo.prune` would turn from
        # the function into the module.
        if isinstance(value, ModuleType) and name in _HOMES:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "losses":
        return import_module("slivo.losses")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'slivo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
