"""Ops with an epilogue: they equal the op, the affine and the activation one after the other; graphs are rewritten to them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from conformance import GENERATORS, generated
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fxrpg
from fxrpg.epilogue import ACTIVATIONS, EPILOGUES, Epilogue
from fxrpg.folding import affine_of_norm
from fxrpg.staging import DENSE_OPS
from fxrpg.weights import plain_weight

EVERYTHING = [fxrpg.Rule("*", "generate")]
# name -> (op, shapes of input and weight, logical order, bias, settings, shape of factor as it meets the output)
CALLS = {
    "linear": ("linear", (3, 5), (4, 5), (0, 1), 4, (False,), (4,)),
    "linear, many axes": ("linear", (2, 3, 5), (4, 5), (0, 1), None, (False,), (4,)),
    "product": ("linear", (3, 5), (5, 4), (1, 0), 4, (True,), (4,)),
    "conv1d": ("conv", (2, 3, 7), (4, 3, 2), (0, 2, 1), 4, ([1], [0], [1], False, [0], 1), (4, 1)),
    "conv2d": ("conv", (2, 6, 7, 6), (4, 3, 3, 2), (0, 2, 3, 1), None, ([2, 1], [1, 0], [1, 1], False, [0, 0], 2), (4, 1, 1)),
    "conv2d, one image": (
        "conv", (3, 7, 6), (4, 3, 3, 2), (0, 2, 3, 1), 4, ([1, 1], [1, 0], [1, 1], False, [0, 0], 1), (4, 1, 1),
    ),
    "conv3d": (
        "conv", (1, 2, 3, 4, 4), (3, 2, 2, 2, 2), (0, 2, 3, 4, 1), 3,
        ([1] * 3, [0] * 3, [1] * 3, False, [0] * 3, 1), (3, 1, 1, 1),
    ),
    "transposed": ("conv", (2, 4, 3, 3), (4, 3, 2, 2), (1, 2, 3, 0), 3, ([2, 2], [0, 0], [1, 1], True, [1, 0], 1), (3, 1, 1)),
}  # fmt: skip


class Count(TorchDispatchMode):
    """How often each op of this project is called inside the block."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fxrpg":
            name = func._schema.name.removeprefix("fxrpg::")
            self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def counted(module, *args):
    """The project's ops in one call without gradients: name -> how often."""
    with torch.no_grad(), Count() as count:
        module(*args)
    return count.calls


def arguments(name, dtype=torch.float64):
    """(epilogue, its base op's arguments, channels, shape of factor as it meets the output) of one of CALLS."""
    op, x, weight, order, bias, config, shape = CALLS[name]
    draw = torch.Generator().manual_seed(1)
    generation = generated(GENERATORS["ring"][0], weight, order, 37, dtype)
    x = torch.randn(x, generator=draw, dtype=torch.float64).to(dtype)
    bias = None if bias is None else torch.randn(bias, generator=draw, dtype=torch.float64).to(dtype)
    return EPILOGUES[getattr(torch.ops.fxrpg, op).default], (x, bias, *generation[:3], *config), shape[0], shape


def reference(epilogue: Epilogue, args, factor, shift, activation, shape):
    """The op on an ordinary weight, then the affine, then the activation, as autograd follows them."""
    x, bias, state, scale, view, *config = args
    out = DENSE_OPS[epilogue.base].forward(x, plain_weight(state, scale, view, x.dtype), bias, *config)
    out = out if factor is None else out * factor.view(shape)
    return ACTIVATIONS[activation](out if shift is None else out + shift.view(shape))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", CALLS)
def test_equals_one_after_the_other(name, activation):
    """With autograd and without, with either, both or none of factor and shift."""
    epilogue, args, channels, shape = arguments(name)
    affine = torch.linspace(0.5, 2, channels, dtype=torch.float64), torch.linspace(-1, 1, channels, dtype=torch.float64)
    for factor, shift in (affine, (affine[0], None), (None, affine[1]), (None, None)):
        wanted = [t.requires_grad_() for t in (args[0], args[1], args[2], factor, shift) if t is not None]
        found = epilogue.op(*epilogue.join(args, factor, shift, activation))
        expected = reference(epilogue, args, factor, shift, activation, shape)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            again = epilogue.op(*epilogue.join(args, factor, shift, activation))
        torch.testing.assert_close(again, expected.detach(), rtol=1e-12, atol=1e-12)
        cotangent = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view(found.shape)
        for one, other in zip(
            torch.autograd.grad(found, wanted, cotangent), torch.autograd.grad(expected, wanted, cotangent), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name, gradients):
    epilogue, args, channels, _shape = arguments(name, torch.float32)
    args = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
    full = list(epilogue.join(tuple(args), torch.ones(channels), torch.ones(channels), "silu"))
    if gradients:
        full = [a.requires_grad_() if isinstance(a, torch.Tensor) and a is not args[3] else a for a in full]
    torch.library.opcheck(epilogue.op, tuple(full))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gradients", [True, False])
def test_sixteen_bits_are_rounded_once(dtype, gradients):
    """The affine and the activation of the op's 16-bit output happen in float32."""
    epilogue, args, channels, shape = arguments("conv2d", dtype)
    factor, shift = torch.linspace(0.9, 1.1, channels), torch.linspace(-1, 1, channels)
    with torch.set_grad_enabled(gradients):
        out = epilogue.op(*epilogue.join(args, factor, shift, "gelu"))
        exact = F.gelu(epilogue.base(*args).float() * factor.view(shape) + shift.view(shape))
    assert out.dtype == dtype
    assert ((out.float() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-7).all()


def test_autocast_casts_what_the_op_alone_casts():
    epilogue, args, channels, _shape = arguments("conv2d", torch.float32)
    factor, shift = torch.ones(channels), torch.zeros(channels)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(epilogue.op(*epilogue.join(args, factor, shift, "none")), epilogue.base(*args))


def test_flops_are_those_of_the_op():
    conv = nn.Conv2d(3, 8, 3, padding=1)
    small = fxrpg.transform(fx.symbolic_trace(nn.Sequential(conv, nn.ReLU())), dof=20, plan=EVERYTHING).eval()
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        small(x)
    with torch.no_grad(), FlopCounterMode(display=False) as dense:
        conv(x)
    assert counter.get_total_flops() == dense.get_total_flops() > 0


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_affine_of_norm(affine, dtype):
    torch.manual_seed(0)
    norm = warmed(nn.BatchNorm1d(5, affine=affine)).to(dtype).eval()
    factor, shift = affine_of_norm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
    assert factor.dtype == shift.dtype == torch.promote_types(dtype, torch.float32)
    x = torch.randn(9, 5, dtype=torch.float64)
    exact = copy.deepcopy(norm).double()(x)
    torch.testing.assert_close(x * factor + shift, exact, rtol=1e-5, atol=1e-6, check_dtype=False)


def warmed(module):
    """`module` with statistics and affine weights that batch norms would have after training."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 2)
                nn.init.uniform_(norm.bias, -1, 1)
    return module


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.b, self.norm_b, self.act = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False), nn.SiLU(inplace=True)
        self.c, self.norm_c = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.d = nn.Linear(6, 2)

    def forward(self, x):
        x = self.act(self.norm_b(self.b(F.relu(self.norm_a(self.a(x)), inplace=True))))
        return torch.sigmoid(self.d(self.norm_c(self.c(x.mean((2, 3))))))


SOURCES = {
    "symbolic_trace": lambda net, x: fx.symbolic_trace(net),
    "export": lambda net, x: torch.export.export(net, (x,)).module(),
    "decomposed": lambda net, x: torch.export.export(net, (x,)).run_decompositions().module(),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("source", SOURCES)
def test_graphs_of_every_origin(source):
    """Every layer of the network becomes one op, with the numbers and gradients of the module; and the way back."""
    torch.manual_seed(0)
    net, x = warmed(Net()).eval(), torch.randn(4, 3, 8, 8)
    plain = fxrpg.transform(net, dof=40, plan=EVERYTHING)
    small = fxrpg.transform(SOURCES[source](net, x), dof=40, plan=EVERYTHING)
    calls = counted(small, x)
    # core ATen writes SiLU as a product: its norm joins the op, it does not
    assert calls == {"conv_epilogue": 2, "linear_epilogue": 2}
    with torch.no_grad():
        torch.testing.assert_close(small(x), plain(x))
    small(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(small.fxrpg_ring.grad, plain.fxrpg_ring.grad)
    assert fxrpg.explain(small).fraction("staged") == 1
    dense = fxrpg.materialize(small)
    assert not any("fxrpg" in str(node.target) or "epilogue" in str(node.target) for node in dense.graph.nodes)
    torch.testing.assert_close(dense(x), plain(x))
    assert {name for name, _ in dense.named_parameters()} == {name for name, _ in net.named_parameters()}


def test_train_mode_of_a_traced_graph_is_that_of_the_module():
    """Batch statistics, running statistics and counters: the modules decide when the graph runs."""
    torch.manual_seed(0)
    net = warmed(Net())
    plain, small = (fxrpg.transform(m, dof=40, plan=EVERYTHING) for m in (net, fx.symbolic_trace(net)))
    for step in range(2):
        x = torch.randn(4, 3, 8, 8)
        assert torch.equal(small(x), plain(x)), step
        for one, other in zip(small.buffers(), plain.buffers(), strict=True):
            assert torch.equal(one, other)
        small(x).sum().backward()
        plain(x).sum().backward()
        assert torch.equal(small.fxrpg_ring.grad, plain.fxrpg_ring.grad)
    assert counted(small, x) == {"conv": 2, "linear": 1, "linear_epilogue": 1}
    plain(x)  # its running statistics move on as those of `small` did
    small.eval()
    plain.eval()
    assert counted(small, x) == {"conv_epilogue": 2, "linear_epilogue": 2}
    torch.testing.assert_close(small(x), plain(x))
    small.norm_a.train()
    assert counted(small, x) == {"conv": 1, "conv_epilogue": 1, "linear_epilogue": 2}


def test_what_stays_apart():
    """Norms without running statistics or with hooks, with generated weights, or on other channels; values read twice."""
    torch.manual_seed(0)

    def both(layers, x, method="ring"):
        small = fxrpg.transform(fx.symbolic_trace(layers.eval()), dof=5, plan=EVERYTHING, method=method)
        plain = fxrpg.transform(layers, dof=5, plan=EVERYTHING, method=method)
        with torch.no_grad():
            torch.testing.assert_close(small(x), plain(x))
        return counted(small, x)

    x, rows = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 6)
    statistics = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert both(statistics, x) == {"conv": 1}
    hooked = warmed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    hooked[1].register_forward_hook(lambda *args: None)
    assert both(hooked, x) == {"conv": 1}
    assert "linear_epilogue" not in both(warmed(nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))), rows)
    norms = warmed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert "conv_epilogue" not in both(norms, x, fxrpg.Pranc(norms=True))

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), warmed(nn.BatchNorm2d(4))

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    assert both(Twice(), x) == {"conv": 1}

    class Between(nn.Module):
        """The norm may not move before what changes in between."""

        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 3, 1), nn.ReLU()

        def forward(self, x):
            x = x * 1
            y = self.conv(x)
            x.add_(1)
            return self.act(y) + x

    assert both(Between(), x) == {"conv": 1}


def test_hooks_and_modes_that_come_later_count():
    torch.manual_seed(0)
    small = fxrpg.transform(fx.symbolic_trace(warmed(Net()).eval()), dof=40, plan=EVERYTHING)
    x, seen = torch.randn(4, 3, 8, 8), []
    expected = small(x).detach()
    small.norm_b.register_forward_hook(lambda *args: seen.append("norm"))
    small.act.register_forward_hook(lambda *args: seen.append("act"))
    with torch.no_grad():
        torch.testing.assert_close(small(x), expected)
    assert seen == ["norm", "act"]


def test_copies_pickles_and_compiled_code():
    torch.manual_seed(0)
    small = fxrpg.transform(fx.symbolic_trace(warmed(Net()).eval()), dof=40, plan=EVERYTHING)
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected = small(x)
        for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), fxrpg.quantize(small, 8)):
            assert counted(again, x) == counted(small, x)
        assert torch.equal(copy.deepcopy(small)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(small))(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch.*")
@pytest.mark.parametrize("gradients", [True, False])
def test_compiled(gradients):
    torch.manual_seed(0)
    torch._dynamo.reset()
    small = fxrpg.transform(fx.symbolic_trace(warmed(Net()).eval()), dof=40, plan=EVERYTHING)
    x = torch.randn(4, 3, 8, 8)
    with torch.set_grad_enabled(gradients):
        compiled = torch.compile(small, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, small(x))


@settings(max_examples=40)
@given(data=st.data())
def test_any_layer_norm_and_activation(data):
    """Shapes, options and modes drawn at once: a traced graph gives what the module gives, in eval and in train mode."""
    dims, transposed = data.draw(st.integers(0, 3)), data.draw(st.booleans())
    width, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    channels, bias = 2 * groups, data.draw(st.booleans())
    if dims:
        cls = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
        layer = cls(width * groups, channels, data.draw(st.integers(1, 2)), groups=groups, bias=bias)
    else:
        layer = nn.Linear(width * groups, channels, bias=bias)
    layers = [layer]
    if data.draw(st.booleans()):
        statistics = data.draw(st.booleans())
        norm = getattr(nn, f"BatchNorm{max(dims, 1)}d")
        layers.append(norm(channels, affine=data.draw(st.booleans()), track_running_stats=statistics))
    activations = [
        None,
        nn.ReLU(),
        nn.ReLU(True),
        nn.ReLU6(),
        nn.SiLU(),
        nn.Hardswish(),
        nn.GELU(),
        nn.Sigmoid(),
        nn.Tanh(),
    ]
    if activation := data.draw(st.sampled_from([*activations, nn.GELU("tanh")])):
        layers.append(activation)
    net = warmed(nn.Sequential(*layers)).train(data.draw(st.booleans()))
    plain, small = (fxrpg.transform(m, dof=1, plan=EVERYTHING) for m in (net, fx.symbolic_trace(net)))
    x = torch.randn(3, width * groups, *(4, 3, 2)[:dims])
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(small(x), plain(x))
    for one, other in zip(small.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)
