"""The layers of networks that the bench times, as data: their shapes, and how often each network has them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution, or a linear layer if `image` is 0.

    Args:
        network: that has it.
        name: of the layer, or of the kind of layer where several have this shape.
        shape: of the weight.
        image: side of the square images that come in.
        positions: rows of a linear layer's input for each sample.
        times: how many layers of the network have this shape.
    """

    network: str
    name: str
    shape: tuple[int, ...]
    image: int = 0
    positions: int = 1
    stride: int = 1
    padding: int = 0
    groups: int = 1
    times: int = 1

    @property
    def op(self) -> str:
        """Its name in `torch.ops.fxrpg`."""
        return "conv" if self.image else "linear"

    @property
    def count(self) -> int:
        """Weights."""
        return math.prod(self.shape)

    @property
    def order(self) -> tuple[int, ...]:
        """Axes of the weight in logical order."""
        return (0, *range(2, len(self.shape)), 1)

    @property
    def config(self) -> tuple[Any, ...]:
        """The op's arguments after its tensors."""
        if not self.image:
            return (False,)
        return [self.stride] * 2, [self.padding] * 2, [1, 1], False, [0, 0], self.groups

    @property
    def side(self) -> int:
        """Side of the images that go out."""
        return (self.image + 2 * self.padding - self.shape[-1]) // self.stride + 1

    def sizes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of input and output for so many samples (of a linear layer with one position each, rows)."""
        if not self.image:
            return (batch * self.positions, self.shape[1]), (batch * self.positions, self.shape[0])
        channels = self.shape[1] * self.groups
        return (batch, channels, self.image, self.image), (batch, self.shape[0], self.side, self.side)

    def flops(self, batch: int) -> int:
        """Multiplications and additions of one direction."""
        return 2 * batch * (self.side**2 if self.image else self.positions) * self.count


def _conv(
    network: str, name: str, inputs: int, outputs: int, kernel: int, image: int, *,
    stride: int = 1, groups: int = 1, padding: int | None = None, times: int = 1,
) -> Layer:  # fmt: skip
    padding = kernel // 2 if padding is None else padding
    shape = (outputs, inputs // groups, kernel, kernel)
    where = {"image": image, "stride": stride, "padding": padding, "groups": groups}
    return Layer(network=network, name=name, shape=shape, **where, times=times)


def _linear(network: str, name: str, inputs: int, outputs: int, *, positions: int = 1, times: int = 1) -> Layer:
    return Layer(network=network, name=name, shape=(outputs, inputs), positions=positions, times=times)


RESNET18 = (
    _conv("resnet18", "stem", 3, 64, 7, 224, stride=2),
    _conv("resnet18", "layer1.conv", 64, 64, 3, 56, times=4),
    _conv("resnet18", "layer2.first", 64, 128, 3, 56, stride=2),
    _conv("resnet18", "layer2.downsample", 64, 128, 1, 56, stride=2),
    _conv("resnet18", "layer2.conv", 128, 128, 3, 28, times=3),
    _conv("resnet18", "layer3.first", 128, 256, 3, 28, stride=2),
    _conv("resnet18", "layer3.downsample", 128, 256, 1, 28, stride=2),
    _conv("resnet18", "layer3.conv", 256, 256, 3, 14, times=3),
    _conv("resnet18", "layer4.first", 256, 512, 3, 14, stride=2),
    _conv("resnet18", "layer4.downsample", 256, 512, 1, 14, stride=2),
    _conv("resnet18", "layer4.conv", 512, 512, 3, 7, times=3),
    _linear("resnet18", "fc", 512, 1000),
)

RESNET20 = (
    _conv("resnet20", "stem", 3, 16, 3, 32),
    _conv("resnet20", "stage1.conv", 16, 16, 3, 32, times=6),
    _conv("resnet20", "stage2.first", 16, 32, 3, 32, stride=2),
    _conv("resnet20", "stage2.conv", 32, 32, 3, 16, times=5),
    _conv("resnet20", "stage3.first", 32, 64, 3, 16, stride=2),
    _conv("resnet20", "stage3.conv", 64, 64, 3, 8, times=5),
    _linear("resnet20", "fc", 64, 10),
)
"""For CIFAR, with shortcuts that have no weights."""

RESNET50 = (
    _conv("resnet50", "stem", 3, 64, 7, 224, stride=2),
    _conv("resnet50", "layer1.reduce0", 64, 64, 1, 56),
    _conv("resnet50", "layer1.conv", 64, 64, 3, 56, times=3),
    _conv("resnet50", "layer1.expand", 64, 256, 1, 56, times=4),  # the shortcut's too
    _conv("resnet50", "layer1.reduce", 256, 64, 1, 56, times=2),
    _conv("resnet50", "layer2.reduce0", 256, 128, 1, 56),
    _conv("resnet50", "layer2.first", 128, 128, 3, 56, stride=2),
    _conv("resnet50", "layer2.downsample", 256, 512, 1, 56, stride=2),
    _conv("resnet50", "layer2.expand", 128, 512, 1, 28, times=4),
    _conv("resnet50", "layer2.reduce", 512, 128, 1, 28, times=3),
    _conv("resnet50", "layer2.conv", 128, 128, 3, 28, times=3),
    _conv("resnet50", "layer3.reduce0", 512, 256, 1, 28),
    _conv("resnet50", "layer3.first", 256, 256, 3, 28, stride=2),
    _conv("resnet50", "layer3.downsample", 512, 1024, 1, 28, stride=2),
    _conv("resnet50", "layer3.expand", 256, 1024, 1, 14, times=6),
    _conv("resnet50", "layer3.reduce", 1024, 256, 1, 14, times=5),
    _conv("resnet50", "layer3.conv", 256, 256, 3, 14, times=5),
    _conv("resnet50", "layer4.reduce0", 1024, 512, 1, 14),
    _conv("resnet50", "layer4.first", 512, 512, 3, 14, stride=2),
    _conv("resnet50", "layer4.downsample", 1024, 2048, 1, 14, stride=2),
    _conv("resnet50", "layer4.expand", 512, 2048, 1, 7, times=3),
    _conv("resnet50", "layer4.reduce", 2048, 512, 1, 7, times=2),
    _conv("resnet50", "layer4.conv", 512, 512, 3, 7, times=2),
    _linear("resnet50", "fc", 2048, 1000),
)

CONVNEXT = (
    _conv("convnext", "stem", 3, 96, 4, 224, stride=4, padding=0),
    _conv("convnext", "stage1.depthwise", 96, 96, 7, 56, groups=96, times=3),
    _linear("convnext", "stage1.widen", 96, 384, positions=56 * 56, times=3),
    _linear("convnext", "stage1.narrow", 384, 96, positions=56 * 56, times=3),
    _conv("convnext", "stage2.downsample", 96, 192, 2, 56, stride=2, padding=0),
    _conv("convnext", "stage2.depthwise", 192, 192, 7, 28, groups=192, times=3),
    _linear("convnext", "stage2.widen", 192, 768, positions=28 * 28, times=3),
    _linear("convnext", "stage2.narrow", 768, 192, positions=28 * 28, times=3),
    _conv("convnext", "stage3.downsample", 192, 384, 2, 28, stride=2, padding=0),
    _conv("convnext", "stage3.depthwise", 384, 384, 7, 14, groups=384, times=9),
    _linear("convnext", "stage3.widen", 384, 1536, positions=14 * 14, times=9),
    _linear("convnext", "stage3.narrow", 1536, 384, positions=14 * 14, times=9),
    _conv("convnext", "stage4.downsample", 384, 768, 2, 14, stride=2, padding=0),
    _conv("convnext", "stage4.depthwise", 768, 768, 7, 7, groups=768, times=3),
    _linear("convnext", "stage4.widen", 768, 3072, positions=7 * 7, times=3),
    _linear("convnext", "stage4.narrow", 3072, 768, positions=7 * 7, times=3),
    _linear("convnext", "head", 768, 1000),
)
"""ConvNeXt-T."""

VIT = (
    _conv("vit", "patches", 3, 768, 16, 224, stride=16, padding=0),
    _linear("vit", "qkv", 768, 2304, positions=197, times=12),
    _linear("vit", "proj", 768, 768, positions=197, times=12),
    _linear("vit", "fc1", 768, 3072, positions=197, times=12),
    _linear("vit", "fc2", 3072, 768, positions=197, times=12),
    _linear("vit", "head", 768, 1000),
)
"""ViT-B/16 for images of 224 x 224 pixels."""

LLAMA = (
    _linear("llama", "qo", 4096, 4096, times=64),
    _linear("llama", "kv", 4096, 1024, times=64),
    _linear("llama", "gate_up", 4096, 14336, times=64),
    _linear("llama", "down", 14336, 4096, times=32),
)
"""The blocks of Llama-3-8B; a sample is one token."""

TINY = (
    _conv("tiny", "conv", 32, 32, 3, 8, times=2),
    _conv("tiny", "strided", 32, 64, 1, 8, stride=2),
    _conv("tiny", "depthwise", 32, 32, 3, 8, groups=32),
    _linear("tiny", "linear", 64, 96),
)
"""Of no network: for a machine without a GPU, and for tests."""

NETWORKS = {layers[0].network: layers for layers in (RESNET18, RESNET20, RESNET50, CONVNEXT, VIT, LLAMA, TINY)}
