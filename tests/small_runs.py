"""A run of a second: a small ring model with batch norm and dropout on noisy pictures, all of the trainer switched on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxrpg
from fxrpg.snapshots import PARTS
from fxrpg.trainer import Trainer, Training

STEPS = 18


class Noisy:
    """`count` pictures [3, 6, 6], each with new noise whenever it is read."""

    def __init__(self, count: int = 52, noise: float = 0.1) -> None:
        draw = torch.Generator().manual_seed(count)
        self.pictures = torch.randn(count, 3, 6, 6, generator=draw)
        self.labels = torch.randint(4, (count,), generator=draw)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pictures[index] + self.noise * torch.randn(3, 6, 6), self.labels[index]


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Dropout(0.2))
        return fxrpg.transform(nn.Sequential(*body, nn.Flatten(), nn.Linear(32, 4)), dof=100)


def small_run(
    folder: Path | None = None, *, examples: Any = None, model: nn.Module | None = None, **changes: Any
) -> Trainer:
    """3 epochs of 6 steps; `changes` are of `Training`, and `callbacks`, `ranks`, `test` of the trainer."""
    model = network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    others = {name: changes.pop(name) for name in ("callbacks", "ranks", "settings") if name in changes}
    test = changes.pop("test", Noisy(10, noise=0))
    settings = {"epochs": 3, "batch": 8, "accumulate": 2, "clip": 1.0, "ema": 0.8, "snapshot_every": 1} | changes
    training = Training(**settings)
    return Trainer(
        model, optimizer, training, examples or Noisy(), test, scheduler=scheduler, folder=folder, **others
    )  # fmt: skip


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What two snapshots do not have in common bit for bit; seconds do not count."""
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in found["rows"]] for found in (a, b)]
    odd = [name for name in ("settings", "epoch", "step", "loss") if a[name] != b[name]]
    odd += ["rows"] * (rows[0] != rows[1])
    leaves = [dict(_leaves({part: found[part] for part in PARTS}, "")) for found in (a, b)]
    odd += sorted(leaves[0].keys() ^ leaves[1].keys())
    return odd + [name for name in leaves[0].keys() & leaves[1].keys() if not _same(leaves[0][name], leaves[1][name])]


def _leaves(value: Any, name: str) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if items is None:
        yield name, value
        return
    for key, item in items:
        yield from _leaves(item, f"{name}.{key}")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same_kind = a.dtype == b.dtype and a.shape == b.shape
        return same_kind and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    return a == b
