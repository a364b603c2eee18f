"""Pictures: random crops and flips of tensors, and what torchvision reads from disk."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from fake_pictures import fake_cifar10, fake_image_folder
from torch.utils.data import default_collate

from fxrpg import FxrpgError
from fxrpg.pictures import CIFAR, PictureTensor, cropped, flipped, load_pictures

sys.path.append(str(Path(__file__).parents[1]))


@pytest.fixture(scope="session")
def torchvision():
    from bench.zoo.torchvision_cpu import make_importable

    make_importable()
    return importlib.import_module("torchvision")


# Random changes.


def test_crops_are_the_picture_moved_within_its_border():
    pictures = torch.arange(1, 1 + 200 * 2 * 5 * 4, dtype=torch.int32).reshape(200, 2, 5, 4)
    moved = cropped(pictures, 2)
    assert moved.shape == pictures.shape
    seen = set()
    for before, after in zip(pictures, moved, strict=True):
        matches = []
        for down in range(-2, 3):
            for right in range(-2, 3):
                padded = torch.zeros(2, 9, 8, dtype=torch.int32)
                padded[:, 2:7, 2:6] = before
                if torch.equal(padded[:, 2 + down : 7 + down, 2 + right : 6 + right], after):
                    matches.append((down, right))
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 25  # each of the shifts, in 200 draws


def test_flips():
    pictures = torch.arange(400 * 3 * 2 * 2).reshape(400, 3, 2, 2)
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(flipped(pictures), pictures, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(flipped(pictures), pictures, strict=True)]
    assert 150 < sum(mirrored) < 250
    assert 150 < sum(kept) < 250


def test_pictures_are_normalised_and_changed_by_the_generator():
    pixels = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(6)
    mean, std = (0.5, 0.25, 0.0), (0.5, 1.0, 2.0)
    plain = PictureTensor(pixels, labels, mean, std)
    found, answers = plain.batch([4, 1])
    expected = (pixels[[4, 1]].float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(found, expected)
    assert answers.tolist() == [4, 1]
    picture, label = plain[4]
    assert torch.equal(picture, found[0])
    assert label == 4
    changed = PictureTensor(pixels, labels, mean, std, changed=True)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(changed.batch(range(6))[0])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# What is missing or wrong.


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None, reason="torchvision is there; `make test` has none"
)
@pytest.mark.parametrize("data", ["cifar10", "cifar100", "imagefolder"])
def test_without_torchvision(data, tmp_path):
    with pytest.raises(FxrpgError, match=r"torchvision must be importable.*pip install 'fxrpg\[vision\]'"):
        load_pictures(data, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_data(tmp_path):
    with pytest.raises(FxrpgError, match="--data: must be one of cifar10, cifar100, imagefolder, found 'mnist'"):
        load_pictures("mnist", tmp_path)


def test_folders_are_not_downloaded(tmp_path):
    with pytest.raises(FxrpgError, match="--download: is for CIFAR"):
        load_pictures("imagefolder", tmp_path, download=True)


# With torchvision.


@pytest.mark.zoo
@pytest.mark.parametrize("inner", [False, True])
def test_cifar10(torchvision, tmp_path, monkeypatch, inner):
    cls = torchvision.datasets.CIFAR10
    for name, value in fake_cifar10(tmp_path, cls).items():
        monkeypatch.setattr(cls, name, value)
    found = load_pictures("cifar10", tmp_path / cls.base_folder if inner else tmp_path)
    assert (len(found.train), len(found.test), found.classes, found.side) == (80, 16, 10, 32)
    normal = torchvision.transforms.Compose(
        [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize(*CIFAR["cifar10"][1:])]
    )
    theirs = default_collate([cls(str(tmp_path), train=False, transform=normal)[i] for i in (3, 0)])
    mine = found.test.batch([3, 0])
    torch.testing.assert_close(mine[0], theirs[0])
    assert torch.equal(mine[1], theirs[1])
    assert found.train.changed
    assert not found.test.changed


@pytest.mark.zoo
def test_cifar_that_is_not_there_or_damaged(torchvision, tmp_path, monkeypatch):
    with pytest.raises(FxrpgError, match="must hold cifar-100-python .* not found or corrupted. Pass"):
        load_pictures("cifar100", tmp_path)
    cls = torchvision.datasets.CIFAR10
    for name, value in fake_cifar10(tmp_path, cls).items():
        monkeypatch.setattr(cls, name, value)
    with open(tmp_path / cls.base_folder / "data_batch_2", "ab") as file:
        file.write(b"x")
    with pytest.raises(FxrpgError, match="must hold cifar-10-batches-py"):
        load_pictures("cifar10", tmp_path)


@pytest.mark.zoo
def test_image_folder(torchvision, tmp_path):
    fake_image_folder(tmp_path, each=4, classes=3)
    found = load_pictures("imagefolder", tmp_path, side=28)
    assert (len(found.train), len(found.test), found.classes, found.side) == (12, 12, 3, 28)
    picture, label = found.test[9]
    assert picture.shape == (3, 28, 28)
    assert label == 2
    torch.manual_seed(0)
    once = found.train[0][0]
    assert not torch.equal(once, found.train[0][0])
    torch.manual_seed(0)
    assert torch.equal(once, found.train[0][0])


@pytest.mark.zoo
def test_image_folders_that_are_not_right(torchvision, tmp_path):
    with pytest.raises(FxrpgError, match="must hold the folders train and val, found no train"):
        load_pictures("imagefolder", tmp_path)
    fake_image_folder(tmp_path, each=1)
    with pytest.raises(FxrpgError, match="--side: must be 8 or more"):
        load_pictures("imagefolder", tmp_path, side=4)
    os.rename(tmp_path / "val" / "class1", tmp_path / "val" / "other")
    with pytest.raises(FxrpgError, match="the same classes, found only in one"):
        load_pictures("imagefolder", tmp_path)
