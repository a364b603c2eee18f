"""How the three papers train: optimizers, learning rates and lengths, as one table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LambdaLR

from fxrpg.errors import FxrpgError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One recipe. In a run of other length than `epochs`, everything happens at the same share of it.

    Args:
        lr: the highest learning rate.
        shape: "drops" multiplies the rate by `gamma` after each of the epochs `drops`; "cosine" falls to 0; "triangular" rises
            over the first 2/5, falls to 1/20 until 4/5, then to 0.
        active: how many coefficients of a PRANC basis move in an epoch, others in the next; None moves all.
    """

    optimizer: Literal["sgd", "adam", "adamw"]
    lr: float
    epochs: int
    batch: int
    shape: Literal["drops", "cosine", "triangular"]
    drops: tuple[int, ...] = ()
    gamma: float = 0.1
    weight_decay: float = 0.0
    active: int | None = None

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate of step number `step` (from 0) of `steps` is multiplied by."""
        if self.shape == "drops":
            return self.gamma ** sum(step * self.epochs >= drop * steps for drop in self.drops)
        if self.shape == "cosine":
            return 0.5 * (1 + math.cos(math.pi * step / steps))
        t = 5 * (step + 1) / steps  # in fifths of the run
        return t / 2 if t < 2 else 1 - 0.95 * (t - 2) / 2 if t < 4 else 0.05 * (5 - t)

    def build(self, groups: list[dict[str, Any]], lr: float, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """The optimizer of parameter groups, and its scheduler, which is to be stepped once a step.

        Raises:
            FxrpgError: `lr` is no number above 0.
        """
        if not 0 < lr < math.inf:
            raise FxrpgError("lr", "must be a number above 0", repr(lr), "Pass such as 0.1.")
        steps = max(steps, 1)
        optimizer: torch.optim.Optimizer
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=self.weight_decay)
        elif self.optimizer == "adam":
            optimizer = torch.optim.Adam(groups, lr, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.AdamW(groups, lr, weight_decay=self.weight_decay)
        return optimizer, LambdaLR(optimizer, lambda step: self.factor(min(step, steps - 1), steps))


SCHEDULES = {
    "rpg-cifar": Schedule(
        optimizer="sgd", lr=0.1, epochs=200, batch=128, shape="drops", drops=(60, 120, 160), weight_decay=5e-4
    ),
    "rpg-imagenet": Schedule(
        optimizer="sgd", lr=0.3, epochs=225, batch=256, shape="drops", drops=(75, 150), weight_decay=3e-5
    ),
    "pranc": Schedule(optimizer="adam", lr=1e-3, epochs=2000, batch=256, shape="drops", drops=(1600,), active=500),
    "pranc-code": Schedule(
        optimizer="adam", lr=1e-3, epochs=400, batch=256, shape="drops", drops=tuple(range(50, 400, 50)), gamma=0.5
    ),
    "pemn-convmixer": Schedule(
        optimizer="adamw", lr=0.05, epochs=100, batch=512, shape="triangular", weight_decay=0.005
    ),
    "pemn-vit": Schedule(optimizer="adam", lr=1e-4, epochs=200, batch=256, shape="cosine"),
    "pemn-resnet": Schedule(optimizer="sgd", lr=0.1, epochs=100, batch=256, shape="cosine", weight_decay=5e-4),
}
"""RPG: arXiv:2107.07110v1, section 5.1 (CIFAR) and 5.2 (ImageNet); it names no number of epochs: 200 is the custom with these
drops, 225 three times its 75. PRANC: "Implementation details" of section 4; "pranc-code", which moves all coefficients, and the
batch of 256 are those of the configurations in the released code. PEMN: supplement, section A; the triangle is that of the
released code. Momentum 0.9 is named in PEMN's supplement, and RPG's code has it."""


def schedule_for(method: str, data: str, model: str) -> str:
    """The name of the recipe that the papers have for a method ("dense" too), a data set and a model."""
    family = "convmixer" if "mixer" in model else "vit" if "vit" in model else "resnet"
    if method == "pranc":
        return "pranc"
    if method == "pemn" or (method == "dense" and family != "resnet"):
        return f"pemn-{family}"
    return "rpg-imagenet" if data == "imagefolder" else "rpg-cifar"


def known(name: str) -> Schedule:
    """The recipe of that name. Raises FxrpgError for any other."""
    if name not in SCHEDULES:
        raise FxrpgError("--recipe", f"must be one of {', '.join(SCHEDULES)}", repr(name), "Pass one of them.")
    return SCHEDULES[name]
