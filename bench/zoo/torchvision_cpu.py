"""Make torchvision importable where its compiled ops cannot be loaded: PyPI's wheel beside a CPU-only torch."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch
from torch import Tensor

_libraries: list[torch.library.Library] = []
"""What is defined here lasts as long as this list does."""


def make_importable() -> None:
    """Define the ops that importing torchvision asks for. Does nothing where it is absent or imports by itself."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as e:
        if "torchvision::nms" not in str(e):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # half imported
        _stand_in()


def _stand_in() -> None:
    library = torch.library.Library("torchvision", "DEF")
    _libraries.append(library)
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", nms, "CPU")
    boxes = importlib.import_module("torchvision.ops.boxes")
    boxes._assert_has_ops = lambda: None  # type: ignore[attr-defined]
    align = importlib.import_module("torchvision.ops.roi_align")
    # without compiled ops torchvision has RoIAlign in plain torch, wrapped for torch.compile: eager here
    align._roi_align = getattr(align._roi_align, "__wrapped__", align._roi_align)  # type: ignore[attr-defined]


def nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes [n, 4] that no kept box of a higher score overlaps by more than the threshold, best first."""
    order = scores.sort(stable=True, descending=True)[1]
    boxes = dets[order]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    dropped = torch.zeros(len(boxes), dtype=torch.bool)
    keep = []
    for i in range(len(boxes)):
        if dropped[i]:
            continue
        keep.append(i)
        corner, end = torch.maximum(boxes[i, :2], boxes[i + 1 :, :2]), torch.minimum(boxes[i, 2:], boxes[i + 1 :, 2:])
        shared = (end - corner).clamp(min=0).prod(1)
        dropped[i + 1 :] |= shared / (area[i] + area[i + 1 :] - shared) > iou_threshold
    return order[torch.tensor(keep, dtype=torch.long)]
