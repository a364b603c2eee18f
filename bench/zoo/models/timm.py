"""Models of timm: its small test models, and kinds that they leave out (scaled weights, mixers, hybrids, an LSTM)."""

from __future__ import annotations

import functools

from bench.zoo.catalogue import Example, images
from bench.zoo.torchvision_cpu import make_importable

SIDES = {
    "test_resnet": 64, "test_efficientnet": 64, "test_vit": 160, "test_nfnet": 64, "test_byobnet": 64, "test_convnext": 64,
    "test_mambaout": 64, "test_coatnet": 160, "test_vit_relpos": 160, "resnetv2_18": 64, "mobileone_s0": 64,
    "xcit_nano_12_p8_224": 224, "efficientvit_m0": 224, "edgenext_xx_small": 64, "mobilevit_xxs": 64, "pvt_v2_b0": 64,
    "sequencer2d_s": 224,
}  # fmt: skip
"""Name -> side of its images."""


def create(name: str, side: int) -> Example:
    make_importable()
    import timm

    return timm.create_model(name, num_classes=10), (images(side),), {}


MODELS = {f"timm.{name}": ("timm", functools.partial(create, name, side)) for name, side in SIDES.items()}
