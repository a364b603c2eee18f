"""No generated weight, nor an alias of one, is alive between layers or saved for backward: on both ways, on every path."""

from __future__ import annotations

import pytest
import torch
import torch.fx as fx
from births import Birth, alive, births
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import fxrpg

WIDTH, DEPTH = 256, 12
WEIGHT_BYTES = 4 * WIDTH * WIDTH


class Linears(nn.Module):
    """Stock layers: staged."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return x


class Products(Linears):
    """Weights turned and multiplied in ways that no lowering covers, as well as in ways that one does: mixed."""

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            weight = layer.weight
            if i % 3 == 0:
                x = torch.einsum("bi,oi->bo", x, weight)
            elif i % 3 == 1:
                x = x @ weight.view(-1).unflatten(0, (WIDTH, -1)).t()[:, :WIDTH] if i > 6 else torch.mm(x, weight.t())
            elif i % 2:
                x = torch.inner(x, weight)
            else:
                x = torch.inner(x, nn.functional.dropout(weight, 0.5, training=False))
            x = torch.relu(x)
        return x


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(DEPTH)))

    def forward(self, x):
        return self.layers(x)


# by name, because in a graph the product model keeps no linear layers that would tell what its weights are
EVERYTHING = [*(fxrpg.Rule(f"layers.{i}.weight", "generate") for i in range(DEPTH))]
WAYS = {"module": lambda model: model, "graph": fx.symbolic_trace}
MODELS = {"linear": (Linears, (4, WIDTH)), "product": (Products, (4, WIDTH)), "conv": (Convs, (1, 64, 4, 4))}


def build(model: str, way: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[model]
    return fxrpg.transform(WAYS[way](make()), dof=512, plan=EVERYTHING), torch.randn(shape, requires_grad=True)


class CountAlive(TorchDispatchMode):
    """How many generated weights are alive when each op starts."""

    def __init__(self, born: list[Birth]) -> None:
        super().__init__()
        self.born, self.most = born, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.most = max(self.most, alive(self.born))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_no_generated_storage_outlives_its_layer(model, way, monkeypatch):
    small, x = build(model, way)
    with births(monkeypatch) as born:
        with CountAlive(born) as count:
            out = small(x)
        assert len(born) >= DEPTH  # an op that turns out to return its input is run to find that out
        assert alive(born) == 0, "saved for backward"
        # staged: none is alive when another op starts; materialized: the one that the op is about to consume
        assert count.most <= (1 if model == "product" else 0)
        with CountAlive(born) as count:
            out.square().sum().backward()
        assert len(born) >= 2 * DEPTH, "generated again in backward"
        assert alive(born) == 0
        assert count.most <= (1 if model == "product" else 0)
    assert small.fxrpg_ring.grad is not None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_saved_tensors_are_no_weights(model, way):
    """What an outer saved-tensor hook sees (checkpointing, offloading) holds no tensor of a weight's shape."""
    small, x = build(model, way)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        small(x).sum().backward()
    weight = next(iter(small._fxrpg_plan.views.values())).count
    assert sizes
    assert max(sizes) < weight


def peak_bytes(run) -> int:
    """Most bytes that torch's CPU allocator held at once during `run`, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        result = run()
    del result
    events = [e for e in measured.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ["linear", "product"])
def test_peak_memory_is_one_layer(model, way):
    small, x = build(model, way)
    small(x).sum().backward()  # warm: gradient buffers exist
    forward = peak_bytes(lambda: small(x))
    both = peak_bytes(lambda: small(x).square().sum().backward())
    dense = fxrpg.materialize(small)
    dense_both = peak_bytes(lambda: dense(x).square().sum().backward())
    # generation needs a weight, its index and sign tables and one copy for the layout; backward a weight's gradient too
    assert forward < 5 * WEIGHT_BYTES
    assert both < 7 * WEIGHT_BYTES
    assert dense_both > DEPTH * WEIGHT_BYTES > 1.5 * both


def test_the_proof_can_fail(monkeypatch):
    """The measuring tools see a model that does save its generated weights."""
    small, x = build("linear", "module")
    text = next(iter(small._fxrpg_plan.views.values())).text
    with births(monkeypatch) as born:
        weight = torch.ops.fxrpg.generate.default(small.fxrpg_ring, small.fxrpg_scale, text)
        out = torch.nn.functional.linear(x, weight)
        del weight
        assert alive(born) == 1
    del out
    assert alive(born) == 0
