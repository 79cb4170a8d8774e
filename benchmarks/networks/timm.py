"""The smallest member of every module of timm, with random weights, on images of its own size.

Which member is smallest is looked up in ``timm_smallest.json``. After an update of timm, make that file anew::

    PYTHONPATH=benchmarks python -m networks.timm
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

INSTALL = "pip install timm"

TABLE = Path(__file__).with_name("timm_smallest.json")


def networks() -> dict[str, Any]:
    library()
    return {name: partial(image, member) for name, member in sorted(json.loads(TABLE.read_text("utf-8")).items())}


def library() -> Any:
    from networks.torchvision import declare_operators

    declare_operators()  # timm imports torchvision
    import timm

    return timm


def image(member: str) -> tuple[nn.Module, Tensor]:
    model = library().create_model(member)
    return model, torch.randn(2, *model.default_cfg["input_size"])


def parameters(member: str) -> float:
    """Return how many parameters a model has; infinitely many if it cannot be made without numbers."""
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in library().create_model(member).parameters())
    except Exception:
        return float("inf")


def smallest() -> dict[str, str]:
    """Find the smallest member of every module; takes minutes."""
    members = {module: library().list_models(module=module) for module in library().list_modules()}
    return {module: min(names, key=parameters) for module, names in sorted(members.items()) if names}


if __name__ == "__main__":
    TABLE.write_text(json.dumps(smallest(), indent=0) + "\n", encoding="utf-8")
