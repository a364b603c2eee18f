"""What is generated while a test runs, whoever generates it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fxrpg import weights
from fxrpg.view import View


class Birth(NamedTuple):
    """A generated weight: its view, and its storage, which expires with it."""

    view: View
    storage: StorageWeakRef


@contextlib.contextmanager
def births(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Birth]]:
    """Every weight, bias or part of one that is generated inside the block."""
    born: list[Birth] = []
    made = weights.made

    def watched(view: View, *args: object) -> Tensor:
        values = made(view, *args)
        born.append(Birth(view, StorageWeakRef(values.untyped_storage())))
        return values

    with monkeypatch.context() as patch:
        patch.setattr(weights, "made", watched)
        yield born


def alive(born: list[Birth], dimensions: int = 1) -> int:
    """How many of those with so many dimensions are still in memory."""
    return sum(not birth.storage.expired() for birth in born if len(birth.view.shape) >= dimensions)
