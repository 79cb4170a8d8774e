"""The recipes that ship with the package."""

from __future__ import annotations

from importlib import resources


def shipped() -> dict[str, str]:
    """Return the recipes that ship with the package, as YAML, by name.

    Example:
        >>> "prune-then-distill" in shipped()
        True
    """
    folder = resources.files("slivo") / "recipes"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in files}
