"""The built-in program of a sweep: trains the demo's ResNet on handwritten digits once, and prints its accuracy.

`python -m fxrpg.sweep.digits --dof 1024 --seed 0`; without `--dof` it trains the dense model.
"""

from __future__ import annotations

import argparse
import ast
import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxrpg  # noqa: F401  (the methods register themselves)
from fxrpg.api import transform
from fxrpg.demo import digits as demo
from fxrpg.generator import Generator

TRAIN, BATCH = 1000, 125
"""Training images of the 1,797, the rest being test images, and images a step."""


def train_and_test(*, dof: int | float | None, seed: int, method: dict[str, Any], epochs: int) -> float:
    """The accuracy, a fraction of the test images, of one model trained with one seed.

    Args:
        dof: degrees of freedom; None trains the dense model.
        seed: of the initial weights, the generated ones and the order of the images.
        method: its name, as "method", and settings.
        epochs: passes over the training images.
    """
    images, answers = demo.digits()
    model: nn.Module = demo.resnet(seed)
    settings = dict(method)
    name = settings.pop("method")
    if dof is not None:
        model = transform(model, dof=dof, method=Generator.registry[name](**settings), seed=seed)
    optimizer, peak = _optimizer(model, "dense" if dof is None else name)
    _train(model, images[:TRAIN], answers[:TRAIN], optimizer, peak, seed, epochs)
    with torch.no_grad():
        found = model.eval()(images[TRAIN:]).argmax(1)
    return (found == answers[TRAIN:]).double().mean().item()


def _optimizer(model: nn.Module, name: str) -> tuple[torch.optim.Optimizer, float]:
    """The optimizer with its peak rate: what trains well on this task; a method of the user's own trains as a ring does."""
    if name == "pranc":
        return torch.optim.Adam(model.parameters()), 0.1
    if name == "pemn":
        return torch.optim.AdamW(model.parameters(), weight_decay=0.005), 0.05
    return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4), 0.4


def _train(
    model: nn.Module,
    images: Tensor,
    answers: Tensor,
    optimizer: torch.optim.Optimizer,
    peak: float,
    seed: int,
    epochs: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=epochs * (TRAIN // BATCH))
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(TRAIN, generator=draw).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(_shifted(images[batch], draw)), answers[batch]).backward()
            optimizer.step()
            cycle.step()


def _shifted(images: Tensor, draw: torch.Generator) -> Tensor:
    """Each image [n, 1, 8, 8] moved by up to one pixel in each direction, with paper where it came from."""
    windows = F.pad(images[:, 0], (1, 1, 1, 1), value=-1.0).unfold(1, 8, 1).unfold(2, 8, 1)  # [n, 3, 3, 8, 8]
    top, left = torch.randint(0, 3, (2, len(images)), generator=draw)
    return windows[torch.arange(len(images)), top, left][:, None]


def main() -> None:
    """One run of a sweep, by its protocol."""
    parser = argparse.ArgumentParser(description="Train the demo's ResNet on handwritten digits once.")
    parser.add_argument("--dof", type=ast.literal_eval, help="degrees of freedom; left out: the dense model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", type=json.loads, default={"method": "ring"}, help="name and settings, as JSON")
    parser.add_argument("--epochs", type=int, default=20)
    print(f"accuracy: {train_and_test(**vars(parser.parse_args()))!r}")


if __name__ == "__main__":
    main()
