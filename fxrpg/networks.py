"""The networks that the RPG, PRANC and PEMN papers generate, with the parameter counts of the papers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a projected shortcut where the shape changes (arXiv:1512.03385, figure 5)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride != 1 or width_in != width:
            self.downsample = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + identity)


class ResNet(nn.Module):
    """ResNet-18 for blocks (2, 2, 2, 2), ResNet-34 for (3, 4, 6, 3); names and shapes as in torchvision.

    `small` is the usual form for pictures of 32 or 64 pixels: a stem of 3x3, and no pooling behind it.
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self, blocks: tuple[int, ...] = (2, 2, 2, 2), classes: int = 1000, *, small: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False) if small else nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool: nn.Module = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        width_in = 64
        for i, count in enumerate(blocks):
            width = 64 << i
            stage = [BasicBlock(width_in if j == 0 else width, width, 2 if i and j == 0 else 1) for j in range(count)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
            width_in = width
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(width_in, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(classes: int = 1000, *, small: bool = False) -> ResNet:
    """ResNet-18 (arXiv:1512.03385, table 1)."""
    return ResNet((2, 2, 2, 2), classes, small=small)


def resnet34(classes: int = 1000, *, small: bool = False) -> ResNet:
    """ResNet-34 (arXiv:1512.03385, table 1)."""
    return ResNet((3, 4, 6, 3), classes, small=small)


class PaddedShortcut(nn.Module):
    """Option A of He et al., arXiv:1512.03385, section 3.3: every second pixel, and zeros for the channels added."""

    def __init__(self, added: int) -> None:
        super().__init__()
        self.before = added // 2
        self.after = added - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (arXiv:1512.03385, section 4.2)."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        wider = width != width_in
        self.conv1 = nn.Conv2d(width_in, width, 3, 2 if wider else 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.shortcut = PaddedShortcut(width - width_in) if wider else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet of depth 6 n + 2 for n blocks per stage, widths 16, 32 and 64 (arXiv:1512.03385, section 4.2)."""

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module

    def __init__(self, blocks_per_stage: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        width_in = 16
        for i, width in enumerate((16, 32, 64)):
            stage = [CifarBlock(width_in if j == 0 else width, width) for j in range(blocks_per_stage)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
            width_in = width
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(width_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet20(classes: int = 10) -> CifarResNet:
    """ResNet-20 for CIFAR (arXiv:1512.03385, table 6)."""
    return CifarResNet(3, classes)


def resnet56(classes: int = 10) -> CifarResNet:
    """ResNet-56 for CIFAR (arXiv:1512.03385, table 6)."""
    return CifarResNet(9, classes)


def lenet(classes: int = 10) -> nn.Sequential:
    """LeNet-5 for 32x32 colour images with ReLU and max pooling, as in PRANC's released code."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16 * 5 * 5, 120), nn.ReLU()),
        *(nn.Linear(120, 84), nn.ReLU()),
        nn.Linear(84, classes),
    )


def response_norm() -> nn.LocalResponseNorm:
    """The normalisation over four neighbouring channels in the AlexNet of PRANC's released code."""
    return nn.LocalResponseNorm(4, alpha=0.001 / 9, beta=0.75, k=1)


def alexnet_cifar(classes: int = 10) -> nn.Sequential:
    """The small AlexNet of Dataset Distillation (arXiv:1811.10959) for 32x32 images, as in PRANC's released code."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1), response_norm()),
        *(nn.Conv2d(64, 64, 5, 1, 2), nn.ReLU(), response_norm(), nn.MaxPool2d(3, 2, 1)),
        *(nn.Flatten(), nn.Linear(64 * 8 * 8, 384), nn.ReLU()),
        *(nn.Linear(384, 192), nn.ReLU()),
        nn.Linear(192, classes),
    )


def convnet(channels: int = 128, depth: int = 3, classes: int = 100, side: int = 32) -> nn.Sequential:
    """The `depth`-`channels`-ConvNet of dataset condensation (arXiv:2006.05929) for images of `side` x `side` pixels.

    A group norm of one channel per group is the instance norm of that paper.
    """
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(channels if i else 3, channels, 3, 1, 1), nn.GroupNorm(channels, channels)]
        layers += [nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * (side >> depth) ** 2, classes))


class Residual(nn.Sequential):
    """Its layers in sequence, plus the input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


def convmixer(
    dim: int, depth: int, kernel_size: int = 5, patch_size: int = 2, *, classes: int = 10, bias: bool = False
) -> nn.Sequential:
    """ConvMixer (arXiv:2201.09792, section 2); the defaults are those of PEMN's released code for CIFAR-10."""

    def activated(conv: nn.Conv2d) -> tuple[nn.Module, ...]:
        return conv, nn.GELU(), nn.BatchNorm2d(dim)

    def block() -> nn.Sequential:
        depthwise = nn.Conv2d(dim, dim, kernel_size, padding="same", groups=dim, bias=bias)
        return nn.Sequential(Residual(*activated(depthwise)), *activated(nn.Conv2d(dim, dim, 1, bias=bias)))

    return nn.Sequential(
        *activated(nn.Conv2d(3, dim, patch_size, patch_size, bias=bias)),
        *(block() for _ in range(depth)),
        *(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()),
        nn.Linear(dim, classes, bias=bias),
    )


class VisionTransformer(nn.Module):
    """A small ViT (arXiv:2010.11929): patches, learned positions, encoder layers that norm first, the mean of the tokens."""

    def __init__(
        self, dim: int, depth: int, classes: int = 10, *, side: int = 32, patch: int = 4, heads: int = 8
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.positions = nn.Parameter(torch.empty(1, (side // patch) ** 2, dim).normal_(0, 0.02))
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.encoder(tokens).mean(1))


def _convnet(classes: int, side: int) -> nn.Module:
    return convnet(128, 4 if side >= 64 else 3, classes, side)


def _sized(dim: int, depth: int) -> dict[str, Callable[[int, int], nn.Module]]:
    """The mixer and the transformer of one hidden dimension and depth (PEMN, supplement A)."""
    return {
        f"convmixer-{dim}-{depth}": lambda classes, side: convmixer(dim, depth, classes=classes),
        f"vit-{dim}-{depth}": lambda classes, side: VisionTransformer(dim, depth, classes, side=side),
    }


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet18": lambda classes, side: resnet18(classes, small=side <= 64),
    "resnet34": lambda classes, side: resnet34(classes, small=side <= 64),
    "resnet20": lambda classes, side: resnet20(classes),
    "resnet56": lambda classes, side: resnet56(classes),
    "lenet": lambda classes, side: lenet(classes),
    "alexnet-cifar": lambda classes, side: alexnet_cifar(classes),
    "convnet": _convnet,
    **{name: build for dim in (256, 512) for depth in (6, 8) for name, build in _sized(dim, depth).items()},
}
"""name -> (classes, side of the pictures in pixels) -> network. "lenet" and "alexnet-cifar" take 32 pixels only."""
