"""Models of diffusers, vit-pytorch, x-transformers, segmentation-models-pytorch, monai and torch_geometric."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from bench.zoo.catalogue import Build, Example, images, tokens
from bench.zoo.torchvision_cpu import make_importable


def found(module: str, name: str) -> Any:
    """`module.name`, imported now."""
    make_importable()
    return getattr(importlib.import_module(module), name)


def unet2d() -> Example:
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    sizes = {"sample_size": 16, "block_out_channels": (16, 32), "norm_num_groups": 8, "attention_head_dim": 8}
    module = found("diffusers", "UNet2DConditionModel")(**blocks, **sizes, layers_per_block=1, cross_attention_dim=16)
    return module, (images(16, 4), torch.tensor([3, 7]), torch.randn(2, 5, 16)), {}


def autoencoder() -> Example:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return (
        found("diffusers", "AutoencoderKL")(**blocks, block_out_channels=(16, 32), norm_num_groups=8),
        (images(16),),
        {},
    )


VIT = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 64}
LEVIT = {"image_size": 64, "num_classes": 10, "stages": 2, "dim": (16, 32), "depth": 1, "heads": (2, 2), "mlp_mult": 2}
XCIT = VIT | {"cls_depth": 1, "local_patch_kernel_size": 3}


def vit_pytorch(module: str, name: str, options: dict[str, Any]) -> Example:
    return found(f"vit_pytorch.{module}", name)(**options), (images(options["image_size"]),), {}


def x_transformers(layers: str, **options: Any) -> Example:
    inner = found("x_transformers", layers)(dim=32, depth=2, heads=2, **options)
    return (
        found("x_transformers", "TransformerWrapper")(num_tokens=100, max_seq_len=32, attn_layers=inner),
        (tokens(),),
        {},
    )


def segmentation(name: str) -> Example:
    make = found("segmentation_models_pytorch", name)
    return make("resnet18", encoder_weights=None, classes=3), (images(64),), {}


def monai(name: str, *sizes: Any, **options: Any) -> Example:
    return found("monai.networks.nets", name)(*sizes, **options), (torch.randn(1, 1, 16, 16, 16),), {}


def graph_net(name: str, **options: Any) -> Example:
    return (
        found("torch_geometric.nn", name)(8, 16, 2, 3, **options),
        (torch.randn(10, 8), torch.randint(0, 10, (2, 30))),
        {},
    )


GROUPS: dict[str, dict[str, Build]] = {
    "diffusers": {"df.UNet2DConditionModel": unet2d, "df.AutoencoderKL": autoencoder},
    "vit-pytorch": {
        "vp.ViT": functools.partial(vit_pytorch, "vit", "ViT", VIT),
        "vp.LeViT": functools.partial(vit_pytorch, "levit", "LeViT", LEVIT),
        "vp.XCiT": functools.partial(vit_pytorch, "xcit", "XCiT", XCIT),
    },
    "x-transformers": {
        "xt.Decoder": functools.partial(x_transformers, "Decoder"),
        "xt.EncoderRotaryGLU": functools.partial(
            x_transformers, "Encoder", rotary_pos_emb=True, ff_glu=True, use_rmsnorm=True
        ),
    },
    "segmentation-models-pytorch": {
        f"smp.{name}": functools.partial(segmentation, name) for name in ("Unet", "DeepLabV3Plus")
    },
    "monai": {
        "mo.UNet": functools.partial(monai, "UNet", 3, 1, 2, (4, 8, 16), (2, 2), num_res_units=1),
        "mo.UNETR": functools.partial(
            monai, "UNETR", 1, 2, (16, 16, 16), feature_size=4, hidden_size=24, mlp_dim=48, num_heads=4
        ),
    },
    "torch_geometric": {
        "pyg.GCN": functools.partial(graph_net, "GCN"),
        "pyg.GAT": functools.partial(graph_net, "GAT", heads=2),
    },
}

MODELS = {name: (package, build) for package, group in GROUPS.items() for name, build in group.items()}
