"""The full weights never persist: of a ResNet-50 in training, at most one layer's weight is alive at any time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import pytest
import torch
from models import resnet50
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import fxrpg
from fxrpg import staging
from fxrpg.lowering import lowering_mode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Births:
    """The storage of every weight that an op has generated, how many were alive together, and the largest."""

    storages: list[StorageWeakRef] = field(default_factory=list)
    count: int = 0
    together: int = 0
    largest: int = 0

    def add(self, weight: Tensor) -> None:
        self.storages = [ref for ref in self.storages if not ref.expired()]
        self.storages.append(StorageWeakRef(weight.untyped_storage()))
        self.count += 1
        self.together = max(self.together, len(self.storages))
        self.largest = max(self.largest, weight.numel())

    @property
    def alive(self) -> int:
        return sum(not ref.expired() for ref in self.storages)


@contextlib.contextmanager
def births(monkeypatch) -> Iterator[Births]:
    """Of all weights that staged ops generate inside the block; fused ones have none."""
    found, generate = Births(), staging.generate_weight

    def watched(*args, **kwargs):
        weight = generate(*args, **kwargs)
        found.add(weight)
        return weight

    with monkeypatch.context() as patch:
        patch.setattr(staging, "generate_weight", watched)
        yield found


class BetweenLayers(TorchDispatchMode):
    """How many generated weights are alive when an op outside the layers starts."""

    def __init__(self, found: Births) -> None:
        super().__init__()
        self.found, self.most = found, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten" and func.overloadpacket in OUTSIDE:
            self.most = max(self.most, self.found.alive)
        return func(*args, **(kwargs or {}))


OUTSIDE = {
    getattr(torch.ops.aten, name)
    for name in ("relu_", "relu", "native_batch_norm", "native_batch_norm_backward", "threshold_backward", "add")
    if hasattr(torch.ops.aten, name)
}


def step(model: nn.Module, x: Tensor) -> None:
    """One step of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()


def biggest(model: nn.Module) -> int:
    return max(prod(row.shape) for row in fxrpg.explain(model).rows if row.status == "generated")


def test_training_a_resnet50_keeps_one_layers_weight(monkeypatch):
    torch.manual_seed(0)
    model = fxrpg.transform(resnet50().to(DEVICE), dof=0.1).train()
    x = torch.randn(2, 3, 64, 64, device=DEVICE)
    with births(monkeypatch) as found, BetweenLayers(found) as between, lowering_mode("staged"):
        step(model, x)
    layers = sum(row.status == "generated" for row in fxrpg.explain(model).rows)
    assert layers == 52
    assert found.count == 2 * layers  # once forward, once backward: the input of the first is generated too
    assert found.together == 1
    assert found.largest == biggest(model)
    assert between.most == 0
    assert found.alive == 0


@pytest.mark.kernels
def test_training_fused_makes_no_weight_at_all(monkeypatch):
    torch.manual_seed(0)
    wide = DEVICE == "cuda"  # the interpreter is slow
    model = resnet50(width=64 if wide else 2, blocks=(3, 4, 6, 3) if wide else (1, 1))
    model = fxrpg.transform(model.to(DEVICE), dof=0.1, plan=[fxrpg.Rule("0.weight", "dense")]).train()
    with births(monkeypatch) as found, lowering_mode("fused"):
        step(model, torch.randn(2, 3, 64 if wide else 16, 64 if wide else 16, device=DEVICE))
    assert found.count == 0
    assert fxrpg.explain(model).fraction("fused") == 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["fused", "staged"])
def test_peak_memory_of_a_resnet50_is_below_the_dense_models(mode):
    """What the states, their gradients and one layer take is less than all weights and their gradients."""
    peaks = {}
    for name, model in (("dense", resnet50()), ("small", fxrpg.transform(resnet50(), dof=0.1))):
        model = model.cuda().train()
        x = torch.randn(2, 3, 64, 64, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        with lowering_mode(mode):
            step(model, x)
        peaks[name] = torch.cuda.max_memory_allocated()
        del model, x
        torch.cuda.empty_cache()
    assert peaks["small"] < peaks["dense"]
