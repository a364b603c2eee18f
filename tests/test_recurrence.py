"""unroll: a module that recurs, each time with its own view of one ring."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn

import fxrpg
from fxrpg.assemble import plan_of, weight_of

X = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(2))


class Cell(nn.Module):
    """A recurrent block, with all that steps may share: a bias, a norm, a raw parameter, a buffer."""

    def __init__(self, width=6):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.gain = nn.Parameter(torch.ones(width, 1, 1))
        self.register_buffer("shift", torch.zeros(width, 1, 1))

    def forward(self, x):
        return x + self.gain * self.conv2(self.norm(self.conv1(x)).relu()) + self.shift


class Net(nn.Module):
    def __init__(self, times, **options):
        super().__init__()
        self.stem = nn.Conv2d(6, 6, 1)
        self.core = fxrpg.unroll(Cell(), times, **options)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.core(self.stem(x)).mean((2, 3)))


STEP = 2 * 6 * 6 * 9
"""Generated weights of one step."""


def net(times=3, **options):
    torch.manual_seed(0)
    return Net(times, **options)


@pytest.fixture
def small():
    return fxrpg.transform(net(), dof=1 / 3, method=fxrpg.Ring(block=1))


def test_the_first_step_is_a_copy():
    cell = Cell()
    before = {name: tensor.clone() for name, tensor in cell.state_dict().items()}
    core = fxrpg.unroll(cell, 3)
    assert len(core) == 3
    assert all(type(step) is Cell and step is not cell for step in core)
    with torch.no_grad():
        for tensor in (*core.parameters(), *core.buffers()):
            tensor.zero_()
    torch.testing.assert_close(dict(cell.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("own_norm", [True, False])
def test_what_steps_share(own_norm):
    first, *others = fxrpg.unroll(Cell(), 3, own_norm=own_norm)
    for step in others:
        assert step.conv1.bias is first.conv1.bias
        assert step.gain is first.gain
        assert step.conv1.weight is not first.conv1.weight
        assert torch.equal(step.conv1.weight, first.conv1.weight)
        assert step.shift is not first.shift
        assert (step.norm is first.norm) == (not own_norm)
        assert (step.norm.weight is first.norm.weight) == (not own_norm)
        assert (step.norm.running_mean is first.norm.running_mean) == (not own_norm)


def test_norms_of_every_kind_are_each_steps_own():
    for norm in (
        nn.BatchNorm1d(4),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.RMSNorm(4),
        nn.InstanceNorm1d(4, affine=True),
    ):
        first, second = fxrpg.unroll(nn.Sequential(nn.Linear(4, 4), norm), 2)
        assert first[1].weight is not second[1].weight
        assert first[0].bias is second[0].bias
        shared, same = fxrpg.unroll(norm, 2, own_norm=False)
        assert shared is same


def test_own_norms_follow_what_their_step_sees(small):
    small(X)
    means = [step.norm.running_mean for step in small.core]
    for one, other in itertools.combinations(means, 2):
        assert not torch.equal(one, other)
    shared = fxrpg.transform(net(own_norm=False), dof=1 / 3)
    shared(X)
    assert int(shared.core[0].norm.num_batches_tracked) == 3


def test_the_ring_is_as_large_as_one_step(small):
    assert small.fxrpg_ring.numel() == STEP
    assert fxrpg.ledger(small).ratio == 3
    by_rule = fxrpg.transform(net(), plan=[fxrpg.Rule("core.*", dof=STEP), fxrpg.Rule("*", "dense")])
    assert by_rule.fxrpg_ring.numel() == STEP


def test_each_steps_weights_are_a_view_of_their_own(small):
    for part in ("conv1", "conv2"):
        names = [f"core.{i}.{part}.weight" for i in range(3)]
        assert {plan_of(small).state_of(name) for name in names} == {"fxrpg_ring"}
        for one, other in itertools.combinations([weight_of(small, name) for name in names], 2):
            assert torch.isclose(one, other).double().mean() < 0.02
            assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.25


def test_one_step_is_the_module_itself():
    model = net(1).eval()
    cell = copy.deepcopy(model.core[0])
    assert torch.equal(model.core(X), cell(X))


def test_gradients_are_summed_by_hand(small):
    """Of the ring, and of what steps share: the sums of the gradients of three steps written out with dense weights."""
    loss = small(X).square().mean()
    loss.backward()
    parameters = {name: p.detach().clone() for name, p in small.named_parameters(remove_duplicate=False)}
    weights = {name: weight_of(small, name).requires_grad_() for name in plan_of(small).views}
    conv = nn.functional.conv2d
    bias = [parameters["core.0.conv1.bias"].clone().requires_grad_() for _ in range(3)]
    gain = [parameters["core.0.gain"].clone().requires_grad_() for _ in range(3)]
    x = conv(X, parameters["stem.weight"], parameters["stem.bias"])
    for i in range(3):
        inner = conv(x, weights[f"core.{i}.conv1.weight"], bias[i], padding=1)
        norm = (parameters[f"core.{i}.norm.weight"], parameters[f"core.{i}.norm.bias"])
        inner = nn.functional.batch_norm(inner, None, None, *norm, training=True).relu()
        x = x + gain[i] * conv(inner, weights[f"core.{i}.conv2.weight"], padding=1)
    by_hand = nn.functional.linear(x.mean((2, 3)), parameters["head.weight"], parameters["head.bias"]).square().mean()
    torch.testing.assert_close(by_hand, loss)
    by_hand.backward()
    ring = sum(
        torch.ops.fxrpg.accumulate(weights[name].grad, small.fxrpg_ring, small.fxrpg_scale, view.text)
        for name, view in plan_of(small).views.items()
    )
    torch.testing.assert_close(small.fxrpg_ring.grad, ring, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(small.core[0].conv1.bias.grad, sum(b.grad for b in bias), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(small.core[0].gain.grad, sum(g.grad for g in gain), rtol=1e-4, atol=1e-6)


def test_a_loop_writes_any_recurrence():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = fxrpg.unroll(nn.Linear(4, 4), 3)

        def forward(self, x):
            for step in self.steps:
                x = x + step(x).tanh()
            return x

    torch.manual_seed(0)
    small = fxrpg.transform(Loop(), dof=16, plan=[fxrpg.Rule("*")])
    x = torch.randn(2, 4)
    expected = x
    for i in range(3):
        expected = (
            expected + nn.functional.linear(expected, weight_of(small, f"steps.{i}.weight"), small.steps[0].bias).tanh()
        )
    torch.testing.assert_close(small(x), expected)
    assert isinstance(small.steps[:2], nn.ModuleList)


def test_further_arguments_go_to_every_step():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Bilinear(4, 4, 4)

        def forward(self, x, memory, *, scale=1.0):
            return scale * self.mix(x, memory)

    steps = fxrpg.unroll(Attend(), 2)
    x, memory = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(steps(x, memory, scale=0.5), 0.5 * steps[1].mix(0.5 * steps[0].mix(x, memory), memory))


def test_files_and_copies(small, tmp_path):
    small(X).sum().backward()
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    small.eval()
    expected = small(X)
    fxrpg.save(small, tmp_path / "m.safetensors")
    for again in (
        fxrpg.load(net(), tmp_path / "m.safetensors"), copy.deepcopy(small), pickle.loads(pickle.dumps(small)),
    ):  # fmt: skip
        assert torch.equal(again.eval()(X), expected)
        assert again.core[2].conv1.bias is again.core[0].conv1.bias
    dense = fxrpg.materialize(small)
    assert dense.state_dict().keys() == net().state_dict().keys()
    torch.testing.assert_close(dense(X), expected)
    with pytest.raises(fxrpg.FxrpgError, match="the model must have the parameter 'core.2"):
        fxrpg.load(net(2), tmp_path / "m.safetensors")


def test_compiled(small):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo's own
        torch._dynamo.reset()
        compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
        small(X).sum().backward()
        expected, small.fxrpg_ring.grad = small.fxrpg_ring.grad, None
        compiled(X).sum().backward()
        torch._dynamo.reset()
    torch.testing.assert_close(small.fxrpg_ring.grad, expected, rtol=1e-4, atol=1e-5)


def test_parametrized_weights_recur_too():
    """A weight_norm keeps the weight under another name; each step still gets a view of its own."""
    cell = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh())
    first, second = fxrpg.unroll(cell, 2)
    weights = [step[0].parametrizations.weight for step in (first, second)]
    assert weights[0].original1 is not weights[1].original1
    assert weights[0].original0 is weights[1].original0  # the lengths, which stay dense
    small = fxrpg.transform(nn.Sequential(fxrpg.unroll(cell, 2)), dof=16, plan=[fxrpg.Rule("*")])
    assert len(plan_of(small).views) == 2
    assert small(torch.randn(3, 4)).shape == (3, 4)


def test_tied_weights_stay_tied_within_a_step():
    cell = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    cell[1].weight = cell[0].weight
    first, second = fxrpg.unroll(cell, 2)
    assert first[0].weight is first[1].weight
    assert second[0].weight is second[1].weight
    assert first[0].weight is not second[0].weight


# Refused


@pytest.mark.parametrize("times", [0, -1, True, 2.0, "3", None])
def test_bad_times(times):
    with pytest.raises(fxrpg.FxrpgError, match="unroll, times: must be an int of 1 or more, found"):
        fxrpg.unroll(Cell(), times)


def test_bad_modules(small):
    with pytest.raises(fxrpg.FxrpgError, match="unroll: needs a torch.nn.Module, found function"):
        fxrpg.unroll(lambda x: x, 2)
    for module in (small, small.core[0], nn.Sequential(small.core[0].conv1)):
        with pytest.raises(fxrpg.FxrpgError, match="must not be transformed yet"):
            fxrpg.unroll(module, 2)


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        lambda m: m.register_full_backward_hook(lambda *_: None),
        lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    ],
)
@pytest.mark.parametrize("part", ["", "norm"])
def test_hooks_are_refused(register, part):
    cell = Cell()
    before = {name: tensor.clone() for name, tensor in cell.state_dict().items()}
    handle = register(cell.get_submodule(part))
    with pytest.raises(fxrpg.FxrpgError, match=f"unroll, {part or 'Cell'}: must have no hooks.*Remove them, unroll"):
        fxrpg.unroll(cell, 2)
    torch.testing.assert_close(dict(cell.state_dict()), before, rtol=0, atol=0)
    handle.remove()
    assert len(fxrpg.unroll(cell, 2)) == 2
