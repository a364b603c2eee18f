"""What `bench/cpu.py` times on a CPU: models as they are, transformed, and written the authors' way; and generation alone."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxrpg
from bench.measure import Call
from fxrpg.assemble import plan_of
from fxrpg.view import View
from fxrpg.weights import decode_scales

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from models import resnet18
from paper_models import convmixer, resnet20

RING = 2_359_296
"""Cells of the ResNet-18's ring: a fifth of its 11,157,504 generated weights."""

Contestants = dict[str, Call]
"""By name, the first the baseline."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is timed together.

    Args:
        name: of the case.
        bars: contestant -> the ratio to the baseline that it must not pass.
        build: makes the contestants; with one name, only that one, for its memory.
    """

    name: str
    bars: dict[str, float]
    build: Callable[..., Contestants]
    memory: bool = False


def encoder() -> nn.Module:
    """Six layers of BERT's base size (arXiv:1810.04805), without dropout."""
    layer = nn.TransformerEncoderLayer(768, 12, 3072, dropout=0.0, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)


class AuthorsWeight(nn.Module):
    """A ring as its authors read it: an int64 index and a float sign for every weight, both stored."""

    def __init__(self, view: View, scale: float) -> None:
        super().__init__()
        # A ring of the numbers 1 .. N tells which cell each entry reads, and with which sign.
        cells = torch.arange(1, view.size + 1, dtype=torch.float64)
        read = view.generator.materialize(cells, view, torch.float64)
        self.index: Tensor
        self.sign: Tensor
        self.register_buffer("index", read.abs().long() - 1)
        self.register_buffer("sign", read.sign().float())
        self.scale = scale

    def forward(self, ring: Tensor) -> Tensor:
        return ring[self.index] * self.sign * self.scale


def authors_weights(small: nn.Module) -> dict[str, AuthorsWeight]:
    """The generated weights of a ring model, by name, written the authors' way."""
    scales = decode_scales(small.get_buffer("fxrpg_scale")).tolist()
    return {name: AuthorsWeight(view, scales[view.tensor]) for name, view in plan_of(small).views.items()}


def authors_model(small: nn.Module) -> nn.Module:
    """A ring model whose weights are gathered the authors' way at each use, with autograd through it."""
    model, weights = fxrpg.materialize(small), authors_weights(small)
    ring = nn.Parameter(small.get_parameter("fxrpg_ring").detach().clone())
    for name, weight in weights.items():
        owner_name, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        delattr(owner, attribute)
        members = {attribute: property(lambda self, w=weight: w(ring))}
        owner.__class__ = type(type(owner).__name__, (type(owner),), members)
    model.register_parameter("ring", ring)
    return model


def models(build: Callable[[], nn.Module], authors: bool, **settings: Any) -> Callable[[str], nn.Module]:
    """name -> the model of a contestant: "dense", "fxrpg" and, of rings, "authors"."""

    def made(name: str) -> nn.Module:
        torch.manual_seed(0)
        dense = build()
        if name == "dense":
            return dense
        small = fxrpg.transform(dense, **settings)
        return authors_model(small) if name == "authors" else small

    made.names = ("dense", "fxrpg", *["authors"] * authors)  # type: ignore[attr-defined]
    return made


def forward(model: nn.Module, x: Tensor) -> Call:
    """Inference."""
    model.eval()
    return torch.no_grad()(lambda: model(x))


def step(model: nn.Module, x: Tensor, classes: int) -> Call:
    """A step of SGD with momentum; without classes, on the mean square of the output."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    labels = torch.randint(classes, (len(x),)) if classes else None

    def run() -> None:
        optimizer.zero_grad()
        out = model(x)
        loss = out.square().mean() if labels is None else F.cross_entropy(out, labels)
        loss.backward()
        optimizer.step()

    return run


def of_models(made: Any, call: Callable[[nn.Module], Call]) -> Callable[..., Contestants]:
    """The contestants that `call` makes of each model; of the one named, if one is."""
    return lambda only="": {name: call(made(name)) for name in made.names if only in ("", name)}


def generation(backward: bool) -> Callable[..., Contestants]:
    """All 11,157,504 weights of a ResNet-18, one after the other, and the ring's gradient from theirs."""

    def build(only: str = "") -> Contestants:
        small = fxrpg.transform(resnet18(), dof=RING)
        ring, scale = small.get_parameter("fxrpg_ring"), small.get_buffer("fxrpg_scale")
        views, written = [view.text for view in plan_of(small).views.values()], list(authors_weights(small).values())
        gradients = [torch.randn(View.parse(view).shape) for view in views]

        def timed(weights: Callable[[], Iterator[Tensor]]) -> Call:
            def run() -> None:
                with torch.set_grad_enabled(backward):
                    ring.grad = None
                    found = [weight for weight in weights() if backward]
                if backward:
                    torch.autograd.backward(found, gradients)

            return run

        found = {
            "authors": timed(lambda: (weight(ring) for weight in written)),
            "fxrpg": timed(lambda: (torch.ops.fxrpg.generate(ring, scale, view) for view in views)),
        }
        return {name: call for name, call in found.items() if only in ("", name)}

    return build


def threshold(only: str = "") -> Contestants:
    """The masks of a ConvMixer-256/8: a full sort a layer, as in the authors' code, and the weights that masks give."""
    small = fxrpg.transform(convmixer(256, 8), dof=1.0, method="pemn")
    scale, views = small.get_buffer("fxrpg_scale"), plan_of(small).views
    scores = {name: small.get_parameter(f"{name}_score").detach() for name in views}

    def sort() -> None:
        for score in scores.values():
            order = score.abs().flatten().sort().indices
            mask = torch.empty(score.numel())
            mask[order[: score.numel() // 2]] = 0
            mask[order[score.numel() // 2 :]] = 1

    def select() -> None:
        for name, view in views.items():
            torch.ops.fxrpg.generate(scores[name], scale, view.text)

    return {name: call for name, call in (("sort", sort), ("fxrpg", select)) if only in ("", name)}


def materialized(only: str = "") -> Contestants:
    """A deep copy of a dense ResNet-18, and `fxrpg.materialize` of the transformed one."""
    dense = resnet18()
    small = fxrpg.transform(dense, dof=RING)
    return {"copy": lambda: copy.deepcopy(dense), "fxrpg": lambda: fxrpg.materialize(small)}


_R18 = models(resnet18, True, dof=RING)
_R20 = models(resnet20, True, dof=0.1)
_BERT = models(encoder, True, dof=0.1)
_MIXER = models(lambda: convmixer(256, 8), False, dof=1.0, method="pemn")
_KHATRI_RAO = models(resnet20, False, dof=10_000, method=fxrpg.Pranc(law="khatri_rao"))
_RADEMACHER = models(resnet20, False, dof=10_000, method=fxrpg.Pranc(law="rademacher"))

CASES = [
    Case(
        name="ResNet-18, inference, batch 1",
        bars={"fxrpg": 2.0},
        build=of_models(_R18, lambda model: forward(model, torch.randn(1, 3, 224, 224))),
        memory=True,
    ),
    Case(
        name="ResNet-18, inference, batch 8",
        bars={"fxrpg": 1.25},
        build=of_models(_R18, lambda model: forward(model, torch.randn(8, 3, 224, 224))),
        memory=True,
    ),
    Case(
        name="ResNet-18, training step, batch 32",
        bars={"fxrpg": 1.10},
        build=of_models(_R18, lambda model: step(model, torch.randn(32, 3, 224, 224), 1000)),
        memory=True,
    ),
    Case(
        name="ResNet-20, training step, batch 128",
        bars={"fxrpg": 1.15},
        build=of_models(_R20, lambda model: step(model, torch.randn(128, 3, 32, 32), 10)),
        memory=True,
    ),
    Case(
        name="encoder of 6 layers, training step, batch 8 x 128",
        bars={"fxrpg": 1.15},
        build=of_models(_BERT, lambda model: step(model, torch.randn(8, 128, 768), 0)),
        memory=True,
    ),
    Case(
        name="ConvMixer-256/8, PEMN, training step, batch 32",
        bars={"fxrpg": 1.25},
        build=of_models(_MIXER, lambda model: step(model, torch.randn(32, 3, 32, 32), 10)),
        memory=True,
    ),
    Case(name="ConvMixer-256/8, masks", bars={"fxrpg": 1 / 3}, build=threshold),
    Case(
        name="ResNet-20, PRANC 10,000, Khatri-Rao, training step, batch 128",
        bars={"fxrpg": 3.0},
        build=of_models(_KHATRI_RAO, lambda model: step(model, torch.randn(128, 3, 32, 32), 10)),
        memory=True,
    ),
    Case(
        name="ResNet-20, PRANC 10,000, Rademacher, training step, batch 128",
        bars={},
        build=of_models(_RADEMACHER, lambda model: step(model, torch.randn(128, 3, 32, 32), 10)),
        memory=True,
    ),
    Case(name="ResNet-18, its weights, forward", bars={"fxrpg": 0.25}, build=generation(False)),
    Case(name="ResNet-18, its weights, forward and backward", bars={"fxrpg": 0.15}, build=generation(True)),
    Case(name="ResNet-18, materialize", bars={}, build=materialized),
]
