"""Models of torchvision: classifiers, transformers, segmentation, video and detection."""

from __future__ import annotations

import functools
from typing import Any

import torch

from bench.zoo.catalogue import Build, Example, images
from bench.zoo.torchvision_cpu import make_importable

CLASSIFIERS = {
    "resnet18": 64, "densenet121": 64, "mobilenet_v3_small": 64, "efficientnet_b0": 64, "squeezenet1_1": 96,
    "googlenet": 96, "shufflenet_v2_x0_5": 64, "regnet_x_400mf": 64, "convnext_tiny": 64, "swin_t": 64,
}  # fmt: skip
"""Name -> side of its images."""


def models() -> Any:
    make_importable()
    import torchvision.models

    return torchvision.models


def classifier(name: str, side: int) -> Example:
    options = {"init_weights": False} if name == "googlenet" else {}  # its own initialiser takes a minute
    return models().get_model(name, weights=None, **options), (images(side),), {}


def vit() -> Example:
    return models().VisionTransformer(64, 32, 3, 3, 96, 192), (images(64),), {}


def maxvit() -> Example:
    sizes = {"block_channels": [16, 32], "block_layers": [1, 1], "head_dim": 8, "partition_size": 2}
    module = models().maxvit.MaxVit(input_size=(64, 64), stem_channels=16, stochastic_depth_prob=0.1, **sizes)
    return module, (images(64),), {}


def deeplabv3() -> Example:
    module = models().get_model("deeplabv3_mobilenet_v3_large", weights=None, weights_backbone=None)
    return module, (images(64),), {}


def mc3() -> Example:
    return models().get_model("mc3_18", weights=None), (torch.randn(2, 3, 4, 32, 32),), {}


def detector(name: str, **sizes: int) -> Example:
    boxes = [{"boxes": torch.tensor([[10.0, 10, 60, 60]]), "labels": torch.tensor([1])} for _ in range(2)]
    module = models().get_model(name, weights=None, weights_backbone=None, **sizes)
    return module, ([torch.rand(3, 96, 96) for _ in range(2)], boxes), {}


PROPOSALS = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20, "box_batch_size_per_image": 16}

BUILDS: dict[str, Build] = {
    **{f"tv.{name}": functools.partial(classifier, name, side) for name, side in CLASSIFIERS.items()},
    "tv.vit": vit,
    "tv.maxvit": maxvit,
    "tv.deeplabv3_mobilenet": deeplabv3,
    "tv.mc3_18": mc3,
    "tv.fasterrcnn_mobilenet": functools.partial(
        detector, "fasterrcnn_mobilenet_v3_large_320_fpn", **PROPOSALS, min_size=96, max_size=128
    ),
    "tv.ssdlite320": functools.partial(detector, "ssdlite320_mobilenet_v3_large"),
}

MODELS = {name: ("torchvision", build) for name, build in BUILDS.items()}
