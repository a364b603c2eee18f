"""Whole models for the bench, written small: ResNets, ViT-B/16, ConvNeXt-T. All take images [n, 3, side, side]."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _norm_conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)


class Bottleneck(nn.Module):
    """Convolutions beside a shortcut: two of 3x3 ("basic"), or 1x1, 3x3 and 1x1."""

    def __init__(self, inputs: int, width: int, stride: int, basic: bool) -> None:
        super().__init__()
        outputs = width if basic else 4 * width
        if basic:
            layers = [*_norm_conv(inputs, width, 3, stride), nn.ReLU(), *_norm_conv(width, width, 3)]
        else:
            layers = [*_norm_conv(inputs, width, 1), nn.ReLU(), *_norm_conv(width, width, 3, stride), nn.ReLU()]
            layers += _norm_conv(width, outputs, 1)
        self.body = nn.Sequential(*layers)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*_norm_conv(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(blocks: Sequence[int], *, basic: bool, width: int = 64, classes: int = 1000) -> nn.Sequential:
    """A ResNet with the weights of torchvision's: 18 for blocks (2, 2, 2, 2), 50 for (3, 4, 6, 3) that are not basic."""
    layers: list[nn.Module] = [*_norm_conv(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = width
    for stage, count in enumerate(blocks):
        for place in range(count):
            stride = 2 if stage and not place else 1
            layers.append(Bottleneck(inputs, width << stage, stride, basic))
            inputs = (width << stage) * (1 if basic else 4)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class Attention(nn.Module):
    """Self-attention of [n, tokens, width] by one projection to queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


class Encoder(nn.Module):
    """A transformer block with norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """ViT-B/16 (arXiv:2010.11929)."""

    def __init__(
        self, width: int = 768, depth: int = 12, heads: int = 12, side: int = 224, classes: int = 1000
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, (side // 16) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Encoder(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


class ConvNextBlock(nn.Module):
    """A depthwise convolution and a perceptron of each position, beside a shortcut; [n, c, h, w] to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(F.gelu(self.widen(y)))
        return x + y.permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of [n, c, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext(
    depths: Sequence[int] = (3, 3, 9, 3), widths: Sequence[int] = (96, 192, 384, 768), classes: int = 1000
) -> nn.Sequential:
    """ConvNeXt-T (arXiv:2201.03545), without stochastic depth."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), ChannelNorm(widths[0], eps=1e-6)]
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        if stage:
            layers += [ChannelNorm(widths[stage - 1], eps=1e-6), nn.Conv2d(widths[stage - 1], width, 2, 2)]
        layers += [ConvNextBlock(width) for _ in range(depth)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(widths[-1], eps=1e-6), nn.Linear(widths[-1], classes)]
    return nn.Sequential(*layers, *head)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (functools.partial(resnet, (2, 2, 2, 2), basic=True), 224),
    "resnet50": (functools.partial(resnet, (3, 4, 6, 3), basic=False), 224),
    "vit": (VisionTransformer, 224),
    "convnext": (convnext, 224),
    "tiny": (functools.partial(resnet, (1, 1), basic=True, width=8, classes=10), 32),
}
"""Name -> (what builds it, side of its images)."""
