"""The one family of errors that slivo raises for mistakes a user can mend."""

from __future__ import annotations

import importlib
from types import ModuleType


class SlivoError(Exception):
    """A mistake the user can mend; the message names the place, what is wrong, what is allowed and what to do."""


class RecipeError(SlivoError):
    """A recipe, an option or a name in one is not valid."""


class ShapeError(SlivoError):
    """Tensors do not fit one another or the model."""


class CaptureError(SlivoError):
    """A model cannot be captured as a graph with the example inputs that were given."""


class ArtifactError(SlivoError):
    """A saved model is damaged, incomplete, too new, or cannot be written."""


class OutputError(SlivoError):
    """A folder for output is taken, or cannot be written to."""


class TargetError(SlivoError):
    """A target cannot be met; says what is the best that was found."""


def require(module: str, *, extra: str, why: str) -> ModuleType:
    """Import an optional dependency, or say how to install it.

    Args:
        module: Name to import, such as ``"onnxruntime"``.
        extra: The extra of this package that brings it, such as ``"export"``.
        why: What it is needed for; completes "needed for ...".

    Returns:
        The imported module.

    Raises:
        SlivoError: If the module is not installed.

    Example:
        >>> require("json", extra="demo", why="an example").dumps(1)
        '1'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise SlivoError(f"{module} is not installed and is needed for {why}: pip install 'slivo[{extra}]'") from error
