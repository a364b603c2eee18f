"""Two image tasks, two small models and one training loop, on which methods are compared: handwritten digits, scenes.

Nothing here needs a download: both tasks are made of scikit-learn's digits, always the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from fxrpg.demo import digits as handwritten
from fxrpg.demo.digits import Block

SPLIT = slice(1000), slice(1000, None)
"""Which of the 1,797 digits, in the fixed order, make training images, and which test images."""

SIDE = 32
"""Height and width of a scene, in pixels."""

Augment = Callable[[Tensor, Generator], Tensor]
Closure = Callable[[], Tensor]
Step = Callable[[Optimizer, Closure], None]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Images, float32 [n, channels, height, width] from -1 to 1, their classes, int64 [n], and how to augment.

    For a short training: `epochs` at a peak rate of 0.4, a ResNet's `stem`, a mixer's `patch`.
    """

    name: str
    train_images: Tensor = field(repr=False)
    train_labels: Tensor = field(repr=False)
    test_images: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    classes: int
    augment: Augment
    epochs: int
    stem: int
    patch: int

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]


def digits() -> Task:
    """1,000 training and 797 test images, 8x8 grey, paper -1 and ink 1, shifted by up to one pixel in training."""
    ink, labels = _digits()
    parts = [(2 * ink[part] - 1, labels[part]) for part in SPLIT]
    return _task("digits", parts, augment=shift_by(1, paper=-1.0), epochs=20, stem=1, patch=2)


def scenes(*, seed: int = 0, train: int = 10_000, test: int = 2_000) -> Task:
    """Images, 32x32 colour, each a warped digit in clutter; digits seen in training are in no test image.

    `seed` decides every pixel, on one machine; another may round some differently.
    """
    ink, labels = _digits()
    draw = Generator().manual_seed(seed)
    parts = []
    for part, count in zip(SPLIT, (train, test), strict=True):
        chosen = torch.randint(len(labels[part]), (count,), generator=draw)
        parts.append((draw_scenes(ink[part], chosen, draw), labels[part][chosen]))
    return _task("scenes", parts, augment=shift_by(2, paper=None), epochs=6, stem=2, patch=4)


def _task(name: str, parts: Sequence[tuple[Tensor, Tensor]], **rest: Any) -> Task:
    (train_images, train_labels), (test_images, test_labels) = parts
    return Task(
        name=name,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        classes=10,
        **rest,
    )


def _digits() -> tuple[Tensor, Tensor]:
    """Ink, float32 [1797, 1, 8, 8] from 0 to 1, and digits, int64 [1797]; always in one order."""
    images, labels = handwritten.digits()
    return (images + 1) / 2, labels


def shift_by(pixels: int, *, paper: float | None) -> Augment:
    """An augmentation: each image moved by up to `pixels` each way, over `paper` or, if None, its repeated edge."""

    def shift(images: Tensor, draw: Generator) -> Tensor:
        count, _, height, width = images.shape
        mode = {"mode": "replicate"} if paper is None else {"value": paper}
        padded = F.pad(images, (pixels,) * 4, **mode).permute(0, 2, 3, 1)
        top, left = torch.randint(2 * pixels + 1, (2, count, 1), generator=draw)
        rows, columns = torch.arange(height) + top, torch.arange(width) + left  # [n, height], [n, width]
        moved = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
        return moved.permute(0, 3, 1, 2).contiguous()

    return shift


def draw_scenes(ink: Tensor, chosen: Tensor, draw: Generator) -> Tensor:
    """Scenes [n, 3, SIDE, SIDE] from -1 to 1 of the digits ink[chosen]; the clutter too is made of `ink` alone."""
    count = len(chosen)
    ground = _uniform(draw, 0, 1, count, 3, 1, 1)
    texture = torch.randn(count, 3, 4, 4, generator=draw)
    scene = ground + 0.1 * F.interpolate(texture, (SIDE, SIDE), mode="bicubic", align_corners=False)
    for _ in range(2):
        piece = ink[torch.randint(len(ink), (count,), generator=draw)]
        half = _half_planes(count, draw)
        scene = _clutter(scene, ground, half * _warp(piece, draw, (0.3, 0.6), math.pi, 0.8), draw)
    for _ in range(2):
        scene = _clutter(scene, ground, _strokes(count, draw, 0.08), draw)
    far = (ground + _uniform(draw, 0.35, 0.65, count, 3, 1, 1)) % 1  # each channel differs by 0.35 or more
    scene = torch.lerp(scene, far, _warp(ink[chosen], draw, (0.6, 0.9), 0.4, 0.2))
    scene = _clutter(scene, ground, _strokes(count, draw, 0.04), draw)
    return (scene + 0.05 * torch.randn(scene.shape, generator=draw)).clamp_(0, 1) * 2 - 1


def _uniform(draw: Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.empty(shape).uniform_(low, high, generator=draw)


def _clutter(scene: Tensor, ground: Tensor, cover: Tensor, draw: Generator) -> Tensor:
    """The scene where `cover` [n, 1, SIDE, SIDE] is 0, elsewhere a colour halfway from `ground` to a random one."""
    return torch.lerp(scene, (ground + _uniform(draw, 0, 1, len(scene), 3, 1, 1)) / 2, cover)


def _warp(ink: Tensor, draw: Generator, scale: tuple[float, float], turn: float, shift: float) -> Tensor:
    """Cover [n, 1, SIDE, SIDE] of 8x8 digits turned by up to `turn` radians, sheared, scaled, shifted (1: half)."""
    count = len(ink)
    angle, shear = _uniform(draw, -turn, turn, count), _uniform(draw, -0.3, 0.3, count)
    size, stretch = _uniform(draw, *scale, count), _uniform(draw, 0.85, 1.15, count)
    cos, sin = angle.cos() / size, angle.sin() / size
    turned = torch.stack([cos, sin, -sin, cos], -1).view(count, 2, 2)
    sheared = torch.stack([stretch, shear, torch.zeros(count), 1 / stretch], -1).view(count, 2, 2)
    matrix = sheared @ turned  # from scene to digit coordinates
    place = _uniform(draw, -shift, shift, count, 2, 1)
    grid = F.affine_grid(torch.cat([matrix, -matrix @ place], -1), [count, 1, SIDE, SIDE], align_corners=False)
    warped = F.grid_sample(ink, grid, mode="bilinear", align_corners=False)
    return (2 * warped - 0.4).clamp_(0, 1)  # sharper than what 8x8 pixels give


def _half_planes(count: int, draw: Generator) -> Tensor:
    """1 on one side of a random line near the middle and 0 on the other, [n, 1, SIDE, SIDE]."""
    angle = _uniform(draw, 0, 2 * math.pi, count, 1, 1, 1)
    x, y = _pixels()
    return (x * angle.cos() + y * angle.sin() > _uniform(draw, -0.4, 0.4, count, 1, 1, 1)).float()


def _strokes(count: int, draw: Generator, width: float) -> Tensor:
    """Cover [n, 1, SIDE, SIDE] of one straight stroke an image, `width` to each side (1: half the scene)."""
    from_x, from_y, to_x, to_y = _uniform(draw, -1, 1, 4, count, 1, 1, 1)
    dx, dy = to_x - from_x, to_y - from_y
    x, y = _pixels()
    x, y = x - from_x, y - from_y
    along = ((x * dx + y * dy) / (dx * dx + dy * dy)).clamp_(0, 1)
    distance = torch.hypot(x - along * dx, y - along * dy)
    return ((width - distance) * (SIDE / 2) + 0.5).clamp_(0, 1)


def _pixels() -> tuple[Tensor, Tensor]:
    """Coordinates x [1, SIDE] and y [SIDE, 1] of the pixel centres, from -1 to 1."""
    centres = (torch.arange(SIDE) + 0.5) * (2 / SIDE) - 1
    return centres[None, :], centres[:, None]


class Residual(nn.Sequential):
    """Layers whose input is added to their output, [n, c, h, w] to the same."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def resnet(
    *, width: int = 16, blocks: Sequence[int] = (1, 2, 2), channels_in: int, classes: int, stem: int = 1, seed: int = 0
) -> nn.Sequential:
    """A ResNet, images to logits [n, classes]: a stem of stride `stem`, then stages of `width`, 2 * `width`, ..."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(channels_in, width, 3, stem, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
        for stage, count in enumerate(blocks):
            after = width << stage
            wide = [
                Block(before if place == 0 else after, after, 2 if stage and not place else 1) for place in range(count)
            ]
            layers.append(nn.Sequential(*wide))
            before = after
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def mixer(
    *, dim: int = 64, depth: int = 4, kernel: int = 3, patch: int = 1, channels_in: int, classes: int, seed: int = 0
) -> nn.Sequential:
    """A ConvMixer (Trockman and Kolter 2022) without biases, images to logits [n, classes]; `kernel` is odd."""

    def layer(conv: nn.Conv2d) -> list[nn.Module]:
        return [conv, nn.GELU(), nn.BatchNorm2d(dim)]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = layer(nn.Conv2d(channels_in, dim, patch, patch, bias=False))
        for _ in range(depth):
            spatial = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False)
            layers += [Residual(*layer(spatial)), *layer(nn.Conv2d(dim, dim, 1, bias=False))]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dim, classes, bias=False))


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """All parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def descend(optimizer: Optimizer, closure: Closure) -> None:
    """One step down the gradient of what `closure` returns."""
    optimizer.zero_grad()
    closure().backward()
    optimizer.step()


def train(
    model: nn.Module,
    task: Task,
    *,
    epochs: int,
    seed: int,
    batch: int = 125,
    lr: float = 0.4,
    optimizer: Literal["sgd", "adam"] = "sgd",
    weight_decay: float = 5e-4,
    step: Step = descend,
    parameters: Iterable[Tensor] | Iterable[dict[str, Any]] | None = None,
) -> None:
    """Train in place on whole batches of `batch` images by cross-entropy, `lr` being the peak of one cosine cycle.

    Args:
        seed: decides order and augmentation.
        optimizer: Nesterov's accelerated gradient, or Adam with decoupled weight decay.
        step: gets the optimizer and a closure that returns the loss on the batch, as often as it is called.
        parameters: tensors, or groups with their own `lr` and `weight_decay`; `parameters_of(model)` if None.
    """
    chosen = parameters_of(model) if parameters is None else parameters
    if optimizer == "sgd":
        optim: Optimizer = torch.optim.SGD(chosen, lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    else:
        optim = torch.optim.AdamW(chosen, lr, weight_decay=weight_decay)
    images, labels = task.train_images, task.train_labels
    steps = len(images) // batch
    peaks = [group["lr"] for group in optim.param_groups]
    cycle = torch.optim.lr_scheduler.OneCycleLR(optim, peaks, total_steps=epochs * steps)
    draw = Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=draw)[: steps * batch].split(batch):
            step(optim, partial(_loss, model, task.augment(images[rows], draw), labels[rows]))
            cycle.step()


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    """Percent of the test images given their class; the model is left in evaluation mode."""
    model.eval()
    found = torch.cat([model(images).argmax(1) for images in task.test_images.split(250)])
    return 100 * (found == task.test_labels).double().mean().item()
