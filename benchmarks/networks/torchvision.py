"""Every classification, segmentation and video model of torchvision; of detectors what computes before boxes do.

Convolutional networks take images of any size and get small ones, so that a run is short; those whose size is fixed,
and the two that a bar on time is about, get the usual one.
"""

# The forward methods of networks need no docstring each.
# ruff: noqa: D102

from __future__ import annotations

import importlib.util
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INSTALL = "pip install torchvision"

SIZES = {
    "alexnet": 224, "inception_v3": 299, "googlenet": 96, "maxvit_t": 224, "resnet50": 224, "densenet201": 224,
    "mvit_v1_b": 224, "mvit_v2_s": 224, "s3d": 224, "ssd300_vgg16": 300,
}  # fmt: skip


def networks() -> dict[str, Any]:
    declare_operators()
    from torchvision import models

    images = {name: partial(image, name) for name in models.list_models(module=models)}
    segmentation = {name: partial(image, name) for name in models.list_models(module=models.segmentation)}
    videos = {name: partial(video, name) for name in models.list_models(module=models.video)}
    detectors = {name: partial(detector, name) for name in models.list_models(module=models.detection)}
    return images | segmentation | videos | detectors


def declare_operators() -> None:
    """Make torchvision importable where its compiled operators do not load: beside a CPU build of PyTorch, say.

    torchvision registers fake kernels for its operators when it is imported, and fails if PyTorch has never heard of
    them. None of the networks here calls one, so that their names are enough.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("torchvision is not installed")
    text = (Path(spec.submodule_search_locations[0]) / "_meta_registrations.py").read_text(encoding="utf-8")
    operators = re.findall(r'register_meta\("(\w+)"|torch\.ops\.torchvision\.(\w+)|"torchvision::(\w+)"', text)
    library = torch.library.Library("torchvision", "FRAGMENT")
    _KEPT.append(library)  # what a library defines lives as long as it does
    for operator in sorted({name for found in operators for name in found if name}):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor x) -> Tensor")


_KEPT: list[torch.library.Library] = []


def image(name: str) -> tuple[nn.Module, Tensor]:
    from torchvision import models

    fixed = 256 if "swin_v2" in name else 224 if name.startswith(("vit", "swin")) else 64
    size = SIZES.get(name, fixed)
    options = {"weights_backbone": None} if name in models.list_models(module=models.segmentation) else {}
    return models.get_model(name, weights=None, **options), torch.randn(2, 3, size, size)


def video(name: str) -> tuple[nn.Module, Tensor]:
    from torchvision import models

    size = SIZES.get(name, 64)
    return models.get_model(name, weights=None), torch.randn(2, 3, 16, size, size)


def detector(name: str) -> tuple[nn.Module, Tensor]:
    from torchvision import models

    whole = models.get_model(name, weights=None, weights_backbone=None, num_classes=11)
    parts = RegionDetector if hasattr(whole, "roi_heads") else AnchorDetector
    size = SIZES.get(name, 128)
    return parts(whole), torch.randn(2, 3, size, size)


class AnchorDetector(nn.Module):
    """Backbone and head of a detector of one stage; anchors, boxes and their suppression hold no weights."""

    def __init__(self, whole: nn.Module):
        super().__init__()
        self.backbone, self.head = whole.backbone, whole.head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.backbone(x).values()))


class RegionDetector(nn.Module):
    """Backbone, proposal head and region heads of a detector of two stages.

    Which regions are looked at depends on values and cannot be captured; each map of features as a whole, pooled to the
    size that the region heads take, stands in for them.
    """

    def __init__(self, whole: nn.Module):
        super().__init__()
        self.backbone, self.proposals, self.heads = whole.backbone, whole.rpn.head, whole.roi_heads

    def forward(self, x: Tensor) -> list[Any]:
        features = list(self.backbone(x).values())
        regions = torch.cat([F.adaptive_avg_pool2d(each, 7) for each in features])
        found = [self.proposals(features), self.heads.box_predictor(self.heads.box_head(regions))]
        larger = torch.cat([F.adaptive_avg_pool2d(each, 14) for each in features])
        if self.heads.has_mask():
            found.append(self.heads.mask_predictor(self.heads.mask_head(larger)))
        if self.heads.has_keypoint():
            found.append(self.heads.keypoint_predictor(self.heads.keypoint_head(larger)))
        return found
