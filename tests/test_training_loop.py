"""What training loops do with a model, done with a generated one: accumulation, averages, clipping, optimizers of all kinds."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import fxrpg
from fxrpg import Rule
from fxrpg.assemble import states_in

METHODS = {"ring": 40, "pranc": 12, "pemn": 0.5}
WAYS = ("module", "region", "graph")
X = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(4, (24,), generator=torch.Generator().manual_seed(2))


def layers(norm: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        norm(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 4),
    )


GROUPS = functools.partial(nn.GroupNorm, 2)


def build(method: str = "ring", way: str = "module", norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return copy.deepcopy(_built(method, way, norm))


@functools.cache
def _built(method: str, way: str, norm: Callable[[int], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    net = layers(norm)
    examples = {"example_inputs": (X[:2],)} if way == "region" else {}
    net = fx.symbolic_trace(net) if way == "graph" else net
    return fxrpg.transform(net, dof=METHODS[method], method=method, plan=[Rule("*", "generate")], **examples)


def loss_of(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    return F.cross_entropy(model(X.to(next(model.parameters()).dtype)[rows]), Y[rows])


def states_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: model.get_parameter(name) for name in states_in(model)}


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


# Accumulation.


@settings(max_examples=15)
@given(
    method=st.sampled_from(sorted(METHODS)),
    way=st.sampled_from(WAYS),
    parts=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    reentrant=st.sampled_from([None, True, False]),
)
def test_micro_batches_add_up_to_the_batch(method, way, parts, reentrant):
    """Sums of the gradients of pieces, checkpointed or not, are those of the whole batch."""
    small = build(method, way, GROUPS).double()
    x, y = X.double()[: sum(parts)], Y[: sum(parts)]
    F.cross_entropy(small(x), y).backward()
    whole = {name: grad.clone() for name, grad in gradients(small).items()}
    small.zero_grad()
    for piece, answers in zip(x.split(parts), y.split(parts), strict=True):
        out = small(piece) if reentrant is None else checkpoint(small, piece.requires_grad_(), use_reentrant=reentrant)
        (F.cross_entropy(out, answers) * (len(piece) / len(x))).backward()
    torch.testing.assert_close(gradients(small), whole)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("way", ["region", "graph"])
def test_checkpoints_under_autocast(way, reentrant):
    """A region's or a graph's forward is repeated in backward in the type that it had."""
    small = build(way=way)
    found = []
    for call in (small, lambda x: checkpoint(small, x, use_reentrant=reentrant)):
        small.zero_grad()
        x = X.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(call(x), Y)
        loss.backward()
        found.append((loss.detach(), x.grad, {name: grad.clone() for name, grad in gradients(small).items()}))
    torch.testing.assert_close(*found)


# Averages.

AVERAGES = {
    "mean": {},
    "swa": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.5)},
    "ema with buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.5), "use_buffers": True},
    "by hand": {"avg_fn": lambda old, new, count: 0.5 * old + 0.5 * new},
}


def averaged(small: nn.Module, how: str, steps: int = 3) -> tuple[AveragedModel, list[dict[str, Tensor]]]:
    """An average over some steps of training, and what was averaged."""
    average, seen = AveragedModel(small, **AVERAGES[how]), []
    optimizer = torch.optim.SGD(small.parameters(), lr=0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(small).backward()
        optimizer.step()
        average.update_parameters(small)
        seen.append({name: value.detach().clone() for name, value in small.state_dict().items()})
    return average, seen


@pytest.mark.parametrize("how", AVERAGES)
@pytest.mark.parametrize(("method", "way"), [*(("ring", way) for way in WAYS), ("pranc", "module"), ("pemn", "module")])
def test_the_averaged_state_generates_the_averages_weights(method, way, how, tmp_path):
    small = build(method, way)
    average, seen = averaged(small, how)
    weights = [1 / 3] * 3 if how in ("mean", "swa") else [0.25, 0.25, 0.5]
    for name, state in states_of(small).items():
        expected = sum(w * values[name] for w, values in zip(weights, seen, strict=True))
        torch.testing.assert_close(average.module.get_parameter(name).detach(), expected)
        assert not torch.equal(state, expected)
    for name in ("fxrpg_scale", "fxrpg_digest"):
        assert torch.equal(average.module.get_buffer(name), small.get_buffer(name))
    # a model that is given the average's state is the average; so is what its file holds
    other = build(method, way)
    other.load_state_dict(average.module.state_dict())
    average.eval()
    x = X[:5]
    assert torch.equal(average(x), other.eval()(x))
    assert not torch.allclose(average(x), small.eval()(x))
    fxrpg.save(average.module, tmp_path / "average.safetensors")
    net = layers(nn.BatchNorm2d)
    again = fxrpg.load(fx.symbolic_trace(net) if way == "graph" else net, tmp_path / "average.safetensors")
    torch.testing.assert_close(again.eval()(x), average(x))


@pytest.mark.parametrize("way", WAYS)
def test_statistics_of_an_average(way):
    """update_bn runs the averaged model; its norms then fit what its own ring generates."""
    average, _ = averaged(build(way=way), "ema")
    dense = fxrpg.materialize(average.module)
    for model in (average, dense):
        update_bn([X[:12], X[12:]], model)
    torch.testing.assert_close(average.eval()(X), dense.eval()(X))
    norms = [m for m in average.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(m.num_batches_tracked == 2 for m in norms)


def test_an_average_in_bfloat16_keeps_scales_and_digest():
    small = build().to(torch.bfloat16)
    average, _ = averaged(small, "ema with buffers")
    for name in ("fxrpg_scale", "fxrpg_digest"):
        assert torch.equal(average.module.get_buffer(name), small.get_buffer(name))
    build().to(torch.bfloat16).load_state_dict(average.module.state_dict())


# Clipping.


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_clipped_norms(method, foreach):
    small = build(method)
    loss_of(small).backward()
    grads = [p.grad.clone() for p in small.parameters()]
    norm = torch.cat([g.flatten() for g in grads]).norm()
    found = nn.utils.clip_grad_norm_(small.parameters(), norm.item() / 4, foreach=foreach)
    torch.testing.assert_close(found, norm)
    torch.testing.assert_close([p.grad for p in small.parameters()], [g / 4 for g in grads])
    states = list(states_of(small).values())
    own = torch.cat([p.grad.flatten() for p in states]).norm()
    torch.testing.assert_close(nn.utils.clip_grad_norm_(states, own.item() / 2, foreach=foreach), own)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in states]).norm(), own / 2)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_clipped_values(method, foreach):
    small = build(method)
    loss_of(small).backward()
    grads = [p.grad.clone() for p in small.parameters()]
    bound = max(g.abs().max().item() for g in grads) / 3
    nn.utils.clip_grad_value_(small.parameters(), bound, foreach=foreach)
    torch.testing.assert_close([p.grad for p in small.parameters()], [g.clamp(-bound, bound) for g in grads])


# Optimizers.

OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.01},
    "Adamax": {"lr": 0.01},
    "Adagrad": {"lr": 0.01},
    "Adadelta": {"lr": 1.0},
    "RMSprop": {"lr": 0.01, "momentum": 0.5},
    "Rprop": {"lr": 0.01},
    "ASGD": {"lr": 0.01},
    "Adafactor": {"lr": 0.01},
}


def variants(name: str) -> list[dict[str, bool]]:
    known = inspect.signature(getattr(torch.optim, name)).parameters
    return [{"foreach": False}, {"foreach": True}, *([{"fused": True}] if "fused" in known else [])]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_form_of_an_optimizer_takes_the_same_steps(name, method):
    """They step on the state as on any parameter, and the loss goes down; a loop, foreach and fused agree."""
    start = build(method).double()
    ends, first = [], loss_of(start).item()
    for variant in variants(name):
        small = copy.deepcopy(start)
        decay = {} if name == "Rprop" else {"weight_decay": 0.01}
        optimizer = getattr(torch.optim, name)(small.parameters(), **OPTIMIZERS[name] | decay | variant)
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(small).backward()
            optimizer.step()
        assert loss_of(small).item() < first
        assert all(not torch.equal(p, start.get_parameter(key)) for key, p in states_of(small).items())
        ends.append(small.state_dict())
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0])


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("way", WAYS)
def test_lbfgs(way, search):
    """Its line search evaluates the model many times within a step, with states written in between."""
    small = build(way=way, norm=GROUPS).double()
    dense = fxrpg.materialize(small)
    optimizer = torch.optim.LBFGS(
        small.parameters(), lr=0.2 if search is None else 1, max_iter=10, line_search_fn=search
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(small)
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    torch.testing.assert_close(first, loss_of(dense).item())
    assert loss_of(small).item() < 0.8 * first


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("method", ["ring", "pranc"])
def test_decay_of_the_state_is_decay_of_its_weights(method, decoupled):
    """Where weights are linear in the state: without gradients one step scales every weight by 1 - lr * decay."""
    small = build(method)
    before = fxrpg.materialize(small)
    optimizer = (torch.optim.AdamW if decoupled else torch.optim.SGD)(small.parameters(), lr=0.1, weight_decay=0.5)
    for p in small.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = fxrpg.materialize(small)
    for name in small._fxrpg_plan.views:
        torch.testing.assert_close(after.get_parameter(name), 0.95 * before.get_parameter(name))
