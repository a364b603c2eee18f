"""Data sets of a few random pictures, in the formats in which torchvision finds the real ones."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np


def fake_cifar10(root: Path, cls: Any, *, each: int = 16) -> dict[str, list[list[str]]]:
    """Write a CIFAR-10 of 5 x `each` training and `each` test pictures; returns the file lists that `cls` must have."""
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def batch(name: str) -> list[str]:
        labels = [int(label) for label in rng.integers(0, 10, each)]
        # ten flat colours with noise, so that there is something to learn
        pixels = np.repeat(25 * np.array(labels)[:, None], 3072, 1) + rng.integers(0, 20, (each, 3072))
        return [name, _write(folder / name, {"data": pixels.astype(np.uint8), "labels": labels})]

    train = [batch(name) for name, _md5 in cls.train_list]
    test = [batch(name) for name, _md5 in cls.test_list]
    meta = _write(folder / cls.meta["filename"], {"label_names": [f"colour {i}" for i in range(10)]})
    return {"train_list": train, "test_list": test, "meta": dict(cls.meta) | {"md5": meta}}


def fake_image_folder(root: Path, *, each: int = 6, classes: int = 2, side: int = 40) -> None:
    """Write `each` PNG pictures of every class to ROOT/train and ROOT/val."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in range(classes):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(each):
                pixels = rng.integers(0, 60, (side, side + 8, 3)) + 150 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")


def _write(path: Path, content: dict[str, Any]) -> str:
    text = pickle.dumps(content)
    path.write_bytes(text)
    return hashlib.md5(text).hexdigest()
