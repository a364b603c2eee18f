"""The user's pictures as data sets: CIFAR in memory, folders of images; with the random changes that are usual for each."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxrpg.batches import Examples
from fxrpg.errors import FxrpgError

SETS = ("cifar10", "cifar100", "imagefolder")
CIFAR = {
    "cifar10": ("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ("CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
"""Class in torchvision, mean and deviation of the training pixels for each colour, from 0 to 1."""
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pictures(NamedTuple):
    """Training and test pictures; `side` is their height and width in pixels."""

    train: Examples
    test: Examples
    classes: int
    side: int


class PictureTensor:
    """Pictures in memory, normalised as they are taken, and changed at random if `changed`.

    Args:
        pixels: uint8 [n, colours, side, side].
        labels: int64 [n].
        mean, std: one number a colour, on the scale from 0 to 1.
        changed: crop each at random from itself with 4 black pixels around it, and flip every second one.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float], *, changed: bool = False
    ) -> None:
        self.pixels, self.labels, self.changed = pixels, labels, changed
        self._mean, self._std = (torch.tensor(v)[:, None, None] for v in (mean, std))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pictures, labels = self.batch([index])
        return pictures[0], labels[0]

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """float32 [b, colours, side, side] and int64 [b]; random changes are drawn from torch's CPU generator."""
        chosen = torch.as_tensor(indices)
        pixels = self.pixels[chosen]
        pixels = flipped(cropped(pixels, 4)) if self.changed else pixels
        return (pixels.to(torch.float32) / 255 - self._mean) / self._std, self.labels[chosen]


def cropped(pictures: Tensor, padding: int) -> Tensor:
    """Each picture [n, colours, side, side] moved by up to `padding` pixels each way, with zeros where it came from."""
    count, _, height, width = pictures.shape
    padded = F.pad(pictures, (padding,) * 4)
    down, right = torch.randint(2 * padding + 1, (2, count, 1))
    rows, columns = torch.arange(height) + down, torch.arange(width) + right  # [n, height], [n, width]
    found = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return found.permute(0, 3, 1, 2)


def flipped(pictures: Tensor) -> Tensor:
    """Each picture, with probability 1/2 mirrored left to right."""
    mirrored = torch.rand(len(pictures)) < 0.5
    return torch.where(mirrored[:, None, None, None], pictures.flip(3), pictures)


def load_pictures(data: str, root: Path, *, side: int = 224, download: bool = False) -> Pictures:
    """The pictures that lie in the folder `root`, through torchvision.

    Args:
        data: "cifar10", "cifar100", or "imagefolder": folders train/CLASS and val/CLASS of images, as of ImageNet.
        side: of the pictures of an image folder: in training a random crop of 8 to 100% of the area, resized; in tests the
            middle of the picture resized to 8/7 of it.
        download: fetch CIFAR if it is not there.

    Raises:
        FxrpgError: torchvision is not installed; the data is not there, damaged or without classes.
        OSError: a file cannot be read.
    """
    if data not in SETS:
        raise FxrpgError("--data", f"must be one of {', '.join(SETS)}", repr(data), "Pass one of them.")
    if data == "imagefolder":
        if download:
            fix = "Leave --download out, and put the images under ROOT/train/CLASS and ROOT/val/CLASS."
            raise FxrpgError("--download", "is for CIFAR", "--data imagefolder", fix)
        return _folders(root, side)
    return _cifar(data, root, download)


def torchvision(name: str) -> Any:
    """A module of torchvision."""
    try:
        return importlib.import_module(f"torchvision.{name}")
    except (ImportError, RuntimeError) as e:  # the latter where it does not fit the torch that is installed
        fix = "Run: pip install 'fxrpg[vision]', from the index that your torch came from."
        found = " ".join(str(e).split())
        raise FxrpgError("--data", "torchvision must be importable", found, fix) from None


def _cifar(data: str, root: Path, download: bool) -> Pictures:
    name, mean, std = CIFAR[data]
    cls = getattr(torchvision("datasets"), name)
    root = root.parent if root.name == cls.base_folder else root
    parts = []
    for train in (True, False):
        try:
            found = cls(str(root), train=train, download=download)
        except RuntimeError as e:
            must = f"must hold {cls.base_folder} with its files"
            fix = "Pass the folder that it lies in, or --download."
            raise FxrpgError(f"--root {root}", must, str(e).partition(". You can")[0], fix) from None
        pixels = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        parts.append(PictureTensor(pixels, torch.tensor(found.targets), mean, std, changed=train))
    train_part, test_part = parts
    return Pictures(train_part, test_part, classes=len(found.classes), side=32)


def _folders(root: Path, side: int) -> Pictures:
    if side < 8:
        raise FxrpgError("--side", "must be 8 or more", str(side), "Pass such as 224.")
    transforms, datasets = torchvision("transforms"), torchvision("datasets")
    normal = [transforms.ToTensor(), transforms.Normalize(*IMAGENET)]
    changed = [transforms.RandomResizedCrop(side), transforms.RandomHorizontalFlip(), *normal]
    middle = [transforms.Resize(side * 8 // 7), transforms.CenterCrop(side), *normal]
    parts = []
    for folder, steps in (("train", changed), ("val", middle)):
        if not (root / folder).is_dir():
            fix = "Put the images under ROOT/train/CLASS and ROOT/val/CLASS."
            raise FxrpgError(f"--root {root}", "must hold the folders train and val", f"no {folder}", fix)
        parts.append(datasets.ImageFolder(str(root / folder), transforms.Compose(steps)))
    train, val = parts
    if train.classes != val.classes:
        odd = sorted({*train.classes} ^ {*val.classes})[:3]
        fix = "Make them alike."
        raise FxrpgError(f"--root {root}", "train and val must hold the same classes", f"only in one {odd}", fix)
    return Pictures(train, val, classes=len(train.classes), side=side)
