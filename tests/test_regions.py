"""Regions: proved graphs answer the calls that they were proved for, and no other; a model with regions is like any other."""

from __future__ import annotations

import copy
import pickle
import random
import threading

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_epilogue import Count, counted, warmed
from torch import nn

import fxrpg
from fxrpg.networks import BasicBlock, ResNet
from fxrpg.passes.region import RegionTracer, fuse_layers
from fxrpg.regions import Call, region_class

EVERYTHING = [fxrpg.Rule("*", "generate")]


def pair(net, *inputs, dof=60, **kwargs):
    """`net` transformed without regions and with them; they share no tensor."""
    settings = {"dof": dof, "plan": EVERYTHING}
    return fxrpg.transform(net, **settings), fxrpg.transform(net, **settings, example_inputs=inputs, **kwargs)


def fused(model, *args, **kwargs):
    """How many ops with an epilogue one call without gradients runs."""
    return counted(lambda *a: model(*a, **kwargs), *args).get("conv_epilogue", 0)


def same_call(plain, small, *args):
    """Both give the same, with gradients (bit for bit) and without, and leave the same buffers and gradients."""
    for model in (plain, small):
        model.zero_grad()
    expected, found = plain(*args), small(*args)
    assert torch.equal(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    for (name, one), other in zip(small.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.equal(one.grad, other.grad), name
    with torch.no_grad():
        torch.testing.assert_close(small(*args), plain(*args))
    for (name, one), other in zip(small.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other), name


class Tiny(nn.Module):
    """A block, and a constant that its code reads."""

    def __init__(self):
        super().__init__()
        self.block = warmed(BasicBlock(3, 4, 2))
        self.gain = 2.0

    def forward(self, x, offset=0.0):
        return self.block(x) * self.gain + offset


def tiny():
    torch.manual_seed(0)
    return Tiny().eval(), torch.randn(2, 3, 8, 8)


def test_a_resnet_runs_its_epilogues():
    torch.manual_seed(0)
    net, x = warmed(ResNet((1, 1, 1, 1), 10)), torch.randn(2, 3, 32, 32)
    plain, small = (
        fxrpg.transform(net, dof=50_000),
        fxrpg.transform(net, dof=50_000, example_inputs=(x,)),
    )
    assert list(small.state_dict()) == list(plain.state_dict())
    assert [(n, type(m)) for n, m in small.named_modules()][1:] == [(n, type(m)) for n, m in plain.named_modules()][1:]
    assert isinstance(small, ResNet)
    for training in (True, False):
        same_call(plain.train(training), small.train(training), x)
        x = torch.randn(3, 3, 48, 40)  # another size of the same kind
        same_call(plain, small, x)
    assert counted(small, x) == {"conv_epilogue": 11}
    assert counted(plain, x) == {"conv": 11}
    rows = [row for row in fxrpg.explain(small).rows if row.status == "generated"]
    assert all("region" in row.way and "Conv2d + batch_norm" in row.op for row in rows)
    assert fxrpg.explain(small).dropped == ()


def test_transform_changes_nothing_else():
    net, x = tiny()
    states = torch.get_rng_state(), random.getstate()
    before, given = copy.deepcopy(net.state_dict()), x.clone()
    plain, small = pair(net, x)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert torch.equal(x, given)
    assert not small.training
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), small.state_dict().values(), strict=True))


def test_the_graph():
    net, x = tiny()
    small = fxrpg.transform(net, dof=60, plan=EVERYTHING)
    call, tensors = Call.of((x,), {"offset": 1})
    tracer = RegionTracer(lambda proxies: call.arguments([x, 1], proxies), len(tensors))
    gm = fx.GraphModule(small, tracer.trace_module(small))
    assert fuse_layers(gm).modified
    assert [f"{node.op} {getattr(node.target, '__name__', node.target)}{node.args}" for node in gm.graph.nodes] == [
        "placeholder input_0()",
        "get_attr block.downsample.0()",
        "get_attr block.downsample.1()",
        "call_function layer_epilogue(block_downsample_2, block_downsample_3, 'none', input_0, 'Conv2d + batch_norm')",
        "get_attr block.conv1()",
        "get_attr block.bn1()",
        "get_attr block.relu()",
        "call_function layer_epilogue(block_conv1_1, block_bn1_1, block_relu_2, input_0, 'Conv2d + batch_norm + relu')",
        "get_attr block.conv2()",
        "get_attr block.bn2()",
        "call_function layer_epilogue(block_conv2_1, block_bn2_1, 'none', layer_epilogue_1, 'Conv2d + batch_norm')",
        "call_function add(layer_epilogue_2, layer_epilogue)",
        "call_module block.relu(add,)",
        "call_function mul(block_relu_1, 2.0)",
        "call_function add(mul, 1)",
        "output output(add_1,)",
    ]
    assert not fuse_layers(gm).modified
    assert {name for _path, name in tracer.reads} == {"gain"}


def _hook(module):
    module.register_forward_hook(lambda module, args, out: out + 1)


def _pre_hook(module):
    module.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def _patch(module):
    before = module.forward
    module.forward = lambda *args: before(*args) + 1


def _replace(net):
    net.block.downsample = nn.Sequential(nn.Conv2d(3, 4, 1, 2), nn.Identity())


def _append(net):
    net.block.downsample.append(nn.Tanh())


def _leave(net):
    net.block.downsample[1] = nn.Identity()


def _gain(net):
    net.gain = 3.0


def _forget(net):
    net.block.bn1.running_mean = net.block.bn1.running_var = None


CHANGES = {
    "a hook on a block": (lambda net: _hook(net.block), 0),
    "a hook before a block": (lambda net: _pre_hook(net.block), 0),
    "a patched forward": (lambda net: _patch(net.block), 0),
    "another module": (_replace, 0),
    "one more module": (_append, 0),
    "a norm that is gone": (_leave, 0),
    "a constant": (_gain, 0),
    "a block in train mode": (lambda net: net.block.train(), 0),
    "a hook on a layer": (lambda net: _hook(net.block.conv1), 2),
    "a hook on a norm": (lambda net: _hook(net.block.bn1), 2),
    "a hook on an activation": (lambda net: _hook(net.block.relu), 2),
    "a patched layer": (lambda net: _patch(net.block.conv1), 2),
    "a norm in train mode": (lambda net: net.block.bn1.train(), 2),
    "statistics that are gone": (_forget, 2),
    "a hook on the root": (_hook, 3),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_later_counts(change):
    """What a graph was not proved for takes the module's own forward; a layer that changed, its own."""
    net, x = tiny()
    plain, small = pair(net, x)
    assert fused(small, x) == 3
    alter, left = CHANGES[change]
    for model in (plain, small):
        torch.manual_seed(1)
        alter(model)
    same_call(plain, small, x)
    assert fused(copy.deepcopy(small), x) == (left if "patched" not in change else fused(small, x))
    if "patched" not in change:  # a closure stays with the module that it was made for
        same_call(copy.deepcopy(plain), copy.deepcopy(small), x)
    assert fused(small, x) == left


class Sees(nn.Module):
    """Code that looks at more than attributes of its own."""

    scale = 1.0

    def __init__(self):
        super().__init__()
        self.block, self.more = warmed(BasicBlock(3, 4, 2)), nn.ModuleList([nn.Tanh()])
        self.scheme = nn.Sequential(nn.Dropout(0.5))
        self.register_parameter("shift", None)
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, x):
        x = F.dropout(self.block(x) * self.scale, 0.5, self.scheme.training)
        for step in self.more:
            x = step(x)
        x = x if self.shift is None else x + self.shift
        x = x if self.gate is None else x * self.gate
        return self.finish(x + getattr(self, "offset", 0.0))

    def finish(self, x):
        return x


SIGHTS = {
    "an attribute of the class": lambda net: setattr(net, "scale", 2.0),
    "an attribute that was not there": lambda net: setattr(net, "offset", 2.0),
    "a method": lambda net: setattr(net, "finish", torch.exp),
    "a parameter that was None": lambda net: setattr(net, "shift", nn.Parameter(torch.ones(()))),
    "a parameter that is gone": lambda net: setattr(net, "gate", None),
    "one more module in a list": lambda net: net.more.append(nn.Sigmoid()),
    "the mode of a module that nobody calls": lambda net: net.scheme.train(),
    "the order of modules": lambda net: net.block._modules.update(bn1=net.block._modules.pop("bn1")),
}  # fmt: skip


@pytest.mark.parametrize("sight", SIGHTS)
def test_all_that_the_code_could_see_counts(sight):
    torch.manual_seed(0)
    net, x = Sees().eval(), torch.randn(2, 3, 8, 8)
    plain, small = pair(net, x)
    assert fused(small, x) == 3
    for model in (plain, small):
        SIGHTS[sight](model)
    results = []
    for model in (plain, small):
        torch.manual_seed(1)
        results.append(model(x))
    assert torch.equal(*results)
    assert fused(small, x) == 0


class Asks(nn.Module):
    """Code that asks about a tensor what a graph cannot answer, and goes by the size if told that it is one."""

    def __init__(self, question):
        super().__init__()
        self.block, self.question, self.table = warmed(BasicBlock(3, 3, 1)), question, {2: 1.0, 4: 3.0}

    def forward(self, x):
        return getattr(self, self.question)(x) * self.block(x)

    def of_class(self, x):
        return 2.0 if isinstance(x, torch.Tensor) and len(x) > 2 else 1.0

    def of_class_of_a_result(self, x):
        return 2.0 if isinstance(x.relu(), torch.Tensor) and len(x) > 2 else 1.0

    def is_a_tensor(self, x):
        return 2.0 if torch.is_tensor(x) and x.shape[0] > 2 else 1.0

    def tries(self, x):
        try:
            return 2.0 if x.shape[0] > 2 else 1.0
        except Exception:
            return 1.0

    def looks_up(self, x):
        return self.table.get(x.shape[0], 1.0)

    def is_one_of(self, x):
        return 2.0 if x.shape[0] in {3, 4} else 1.0

    def is_inferred(self, x):
        return 2.0 if torch.is_inference_mode_enabled() else 1.0

    def changes_the_mode(self, x):
        with fxrpg.lowering_mode("materialized"):
            return self.block(x)


@pytest.mark.parametrize("question", [name for name in vars(Asks) if name not in vars(nn.Module) and name[0] != "_"])
def test_questions_that_a_graph_cannot_answer(question):
    """The code is not traced through, also where it survives that; the block that it calls is a region."""
    torch.manual_seed(0)
    plain, small = pair(Asks(question).eval(), torch.randn(2, 3, 6, 6))
    assert set(dict(fxrpg.explain(small).dropped)) == {"Asks"}
    for batch in (2, 4):
        x = torch.randn(batch, 3, 6, 6)
        with torch.inference_mode():
            torch.testing.assert_close(small(x), plain(x))
            assert fused(small, x) == 2


def test_an_input_is_a_tensor():
    class Expects(Asks):
        def forward(self, x):
            return self.block(x if isinstance(x, torch.Tensor) else x[0])

    torch.manual_seed(0)
    plain, small = pair(Expects("tries").eval(), x := torch.randn(2, 3, 6, 6))
    same_call(plain, small, x)
    assert type(small) is region_class(Expects)
    assert isinstance(1, int)


def test_other_threads_go_on(monkeypatch):
    """torch.fx and the search replace what all threads use: only the thread that traces meets it."""
    net, x = tiny()
    went = []

    def elsewhere():
        with torch.no_grad():
            went.append(nn.Sequential(nn.Linear(2, 2), nn.ReLU())(torch.ones(1, 2)))
        went.append(Straight.apply(torch.ones(1)))

    class Waits(Tiny):
        def forward(self, x):
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            return super().forward(x)

    net.__class__ = Waits
    pair(net, x)
    assert len(went) % 2 == 0
    assert went


def test_inference_mode_leaves_a_model_that_trains():
    net, x = tiny()
    with torch.inference_mode():
        small = fxrpg.transform(net, dof=60, plan=EVERYTHING, example_inputs=(x,))
    assert fused(small, x) == 3
    small(x).sum().backward()
    assert small.fxrpg_ring.grad is not None


def test_calls_of_other_forms():
    net, x = tiny()
    plain, small = pair(net, x, 1.0)
    assert fused(small, x, 1.0) == 3
    for args in ((x,), (x, 2.0), (x, 1), (x, x.mean()), (x[0],), (x.double(),)):
        wide = args[0].dtype == torch.float64
        a, b = (copy.deepcopy(m).double() if wide else m for m in (plain, small))
        if args[0].dim() == 4:
            same_call(a, b, *args)
        assert fused(b, *args) == 0 if args[0].dim() == 4 else True
    assert torch.equal(small(x, offset=1.0), plain(x, offset=1.0))
    assert fused(small, x, offset=1.0) == 0
    plain, small = pair(net, x, example_kwargs={"offset": torch.ones(1)})
    same_call(plain, small, x)
    assert fused(small, x, offset=torch.zeros(1)) == 3
    assert fused(small, x) == 0


def test_transforms_and_modes_of_lowering_take_the_module():
    net, x = tiny()
    plain, small = pair(net, x)
    with fxrpg.lowering_mode("materialized"):
        assert fused(small, x) == 0
    found, expected = (torch.func.jvp(model, (x,), (x + 1,)) for model in (small, plain))
    torch.testing.assert_close(found, expected)
    parameters = dict(small.named_parameters())
    torch.testing.assert_close(torch.func.functional_call(small, parameters, (x,)), plain(x))
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert fused(small, x) == 0
    handle.remove()
    assert fused(small, x) == 3
    assert isinstance(fx.Tracer().trace(small), fx.Graph)


def test_autocast():
    net, x = tiny()
    plain, small = pair(net, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fused(small, x) == 3
        found, expected = small(x), plain(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch.*")
def test_compile_and_export_see_the_module():
    torch._dynamo.reset()
    net, x = tiny()
    plain, small = pair(net, x)
    torch.testing.assert_close(torch.compile(small, fullgraph=True, backend="aot_eager")(x), plain(x))
    exported = torch.export.export(small, (x,))
    assert not any("epilogue" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), plain(x))


def test_copies_follow_and_pickles_leave_regions():
    net, x = tiny()
    plain, small = pair(net, x)
    again = copy.deepcopy(small)
    assert fused(again, x) == 3
    with torch.no_grad():
        again.fxrpg_ring.zero_()
        assert torch.equal(small(x), small(x.clone()))
        assert not torch.equal(again(x), small(x)), "a copy reads its own ring"
    back = pickle.loads(pickle.dumps(small))
    assert type(back).__name__ == type(small).__name__
    assert fused(back, x) == 0
    same_call(plain, back, x)
    same_call(copy.deepcopy(plain), copy.deepcopy(back), x)


def test_other_verbs(tmp_path):
    net, x = tiny()
    plain, small = pair(net, x)
    dense = fxrpg.materialize(small)
    assert type(dense) is Tiny
    assert not any("fxrpg" in key for module in dense.modules() for key in vars(module))
    torch.testing.assert_close(dense(x), plain(x))
    for change in (
        lambda m: fxrpg.quantize(m, 8),
        lambda m: fxrpg.freeze(fxrpg.quantize(m, 8)),
        lambda m: fxrpg.prune(m, 0.5),
    ):
        one, other = change(plain), change(small)
        with torch.no_grad():
            torch.testing.assert_close(other(x), one(x))
        assert fused(other, x) == 3
    narrow, thin = fxrpg.prune_channels(plain, 0.5), fxrpg.prune_channels(small, 0.5)
    with torch.no_grad():
        torch.testing.assert_close(thin(x), narrow(x))
    assert fused(thin, x) == 3
    fxrpg.save(small, tmp_path / "m.safetensors")
    loaded = fxrpg.load(net, tmp_path / "m.safetensors")
    assert type(loaded) is Tiny
    torch.testing.assert_close(loaded(x), plain(x))
    small.load_state_dict(plain.state_dict(), strict=True)


class Branching(nn.Module):
    """Untraceable outside and in one child; the other child is a region."""

    def __init__(self):
        super().__init__()
        self.good, self.bad = warmed(BasicBlock(3, 3, 1)), Inner()

    def forward(self, x):
        return self.good(x) + self.bad(x) if x.sum() > -1e9 else x


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([warmed(BasicBlock(3, 3, 1)), warmed(BasicBlock(3, 3, 1))])

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if x.mean() < 1e9 else x
        return x


def test_the_largest_modules_that_can_be_traced():
    torch.manual_seed(0)
    net, x = nn.Sequential(Branching(), warmed(BasicBlock(3, 3, 1))).eval(), torch.randn(2, 3, 6, 6)
    plain, small = pair(net, x)
    same_call(plain, small, x)
    assert fused(small, x) == 8
    assert type(small).__name__ == "RegionSequential"
    tops = [name for name, module in small.named_modules() if type(module).__name__.startswith("Region")]
    assert tops == ["", "0.good", "0.bad.blocks.0", "0.bad.blocks.1"]
    dropped = dict(fxrpg.explain(small).dropped)
    assert set(dropped) == {"0", "0.bad"}
    assert all("TraceError" in reason for reason in dropped.values())
    assert "region 0, 0.bad: left to the module, TraceError" in str(fxrpg.explain(small))


class Loses(nn.Module):
    """Code that a graph would not repeat, around a block."""

    def __init__(self, what):
        super().__init__()
        self.block, self.what, self.calls, self.log = warmed(BasicBlock(3, 3, 1)), what, 0, []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        return getattr(self, self.what)(x)

    def sets(self, x):
        self.calls += 1
        return self.block(x) * self.calls

    def appends(self, x):
        self.log.append(1)
        return self.block(x) * len(self.log)

    def draws(self, x):
        return self.block(x) * (1 if random.random() < 2 else 0)

    def draws_a_tensor(self, x):
        return self.block(x) + torch.rand(1)

    def autocasts(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.block(x).float()

    def stops_gradients(self, x):
        with torch.no_grad():
            return self.block(x)

    def checkpoints(self, x):
        return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)

    def asks(self, x):
        return self.block(x) if torch.is_grad_enabled() else self.block(x) * 2

    def assigns(self, x):
        self.count = self.count + 1
        return self.block(x) * self.count

    def replaces(self, x):
        return Straight.apply(self.block(x))


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize(
    "what",
    [
        "sets",
        "appends",
        "draws",
        "draws_a_tensor",
        "autocasts",
        "stops_gradients",
        "checkpoints",
        "asks",
        "assigns",
        "replaces",
    ],
)
def test_code_that_a_graph_would_not_repeat_stays_outside(what):
    """The block inside is a region, unless its caller never calls it as a module."""
    torch.manual_seed(0)
    net, x = Loses(what), torch.randn(2, 3, 6, 6)
    plain, small = pair(net, x)
    assert set(dict(fxrpg.explain(small).dropped)) == {"Loses"}
    assert small.calls == 0
    assert small.log == []
    for training in (True, False):
        for model in (plain.train(training), small.train(training)):
            torch.manual_seed(3)
            random.seed(3)
            out = model(x)
            with torch.no_grad():
                torch.manual_seed(3)
                quiet = model(x)
            results = (out.detach(), quiet, torch.get_rng_state(), model.count.clone(), model.calls, len(model.log))
            if model is plain:
                expected = results
        for one, other in zip(results, expected, strict=True):
            torch.testing.assert_close(one, other)
    assert fused(small.eval(), x) == 2


def test_buffers_and_dropout_are_part_of_the_graph():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.drop = warmed(BasicBlock(3, 3, 1)), nn.Dropout(0.5)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count.add_(1)
            return F.dropout(self.drop(self.block(x)), 0.3, self.training) * self.count

    torch.manual_seed(0)
    net, x = Counts(), torch.randn(2, 3, 6, 6)
    plain, small = pair(net, x)
    assert type(small) is region_class(Counts)
    results = {}
    for training in (True, False):
        for model in (plain.train(training), small.train(training)):
            torch.manual_seed(5)
            results[model] = model(x), model.count.clone()
        torch.testing.assert_close(results[small], results[plain])
    assert fused(small, x) == 2


class NormAct(nn.BatchNorm2d):
    """A batch norm with code of its own, as timm writes it: checks, the function, an idle module, the activation."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        torch._assert(x.ndim == 4, "must have 4 dimensions")
        if self.training:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(x))


def test_norms_with_code_of_their_own():
    torch.manual_seed(0)
    net, x = (
        warmed(nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4), nn.Conv2d(4, 4, 1), NormAct(4))),
        torch.randn(2, 3, 5, 5),
    )
    plain, small = pair(net, x)
    for training in (True, False):
        same_call(plain.train(training), small.train(training), x)
    assert fused(small, x) == 2
    dense = fxrpg.materialize(fxrpg.transform(fx.symbolic_trace(net.eval()), dof=60, plan=EVERYTHING))
    torch.testing.assert_close(dense(x), fxrpg.transform(net, dof=60, plan=EVERYTHING)(x))
    assert not any("fxrpg" in str(node.target) or "RunningNorm" in str(node.target) for node in dense.graph.nodes)
    small[1].eps = 0.5
    plain[1].eps = 0.5
    assert fused(small, x) == 0
    same_call(plain, small, x)
    for model in (plain, small):
        model[1].eps = 1e-5
        model[3].drop.register_forward_hook(lambda module, args, out: out + 1)
    assert fused(small, x) == 0
    same_call(plain, small, x)


def test_explain_tells_what_ran():
    net, x = tiny()
    _plain, small = pair(net, x)
    shown = {row.name: (row.way, row.path, row.op) for row in fxrpg.explain(small).rows if row.status == "generated"}
    assert shown["block.conv1.weight"] == ("region", "staged", "Conv2d + batch_norm + relu")
    with torch.no_grad():
        small(x)
    assert shown == {r.name: (r.way, r.path, r.op) for r in fxrpg.explain(small).rows if r.status == "generated"}
    small(x)
    row = next(row for row in fxrpg.explain(small).rows if row.name == "block.conv1.weight")
    assert (row.way, row.op) == ("region, handle", "Conv2d + batch_norm + relu, conv2d")


def test_a_graph_that_is_wrong_is_dropped(monkeypatch):
    """The proof can fail: it sees an epilogue that computes something else."""
    net, x = tiny()
    from fxrpg import folding

    exact = folding.affine_of_norm
    monkeypatch.setattr(folding, "affine_of_norm", lambda *args: (exact(*args)[0] * 1.001, exact(*args)[1]))
    _plain, small = pair(net, x)
    assert type(small) is Tiny
    assert set(dict(fxrpg.explain(small).dropped)) == {"Tiny", "block", "block.downsample"}
    assert "other outputs than the module (eval mode, without gradients)" in str(fxrpg.explain(small))
    assert fused(small, x) == 0


def test_train_mode_that_cannot_run_is_left_to_the_module():
    """A batch norm refuses to train on one value a channel; eval mode is proved all the same."""
    torch.manual_seed(0)
    net, x = warmed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).eval(), torch.randn(1, 3, 3, 3)
    plain, small = pair(net, x, dof=20)
    assert fused(small, x) == 1
    assert "in train mode: ValueError" in str(fxrpg.explain(small))
    same_call(plain.train(), small.train(), torch.randn(2, 3, 5, 5))


def test_sixteen_bits():
    net, x = tiny()
    _plain, small = pair(net.bfloat16(), x.bfloat16())
    assert fused(small, x.bfloat16()) == 3
    assert fused(small.float(), x) == 0


def test_masks_and_coefficients():
    net, x = tiny()
    for method, dof in (("pemn", 0.5), ("pranc", 10)):
        plain = fxrpg.transform(net, dof=dof, method=method)
        small = fxrpg.transform(net, dof=dof, method=method, example_inputs=(x,))
        assert fused(small, x) == 3
        same_call(plain, small, x)
    frozen = fxrpg.freeze(fxrpg.transform(net, dof=0.5, method="pemn", example_inputs=(x,)))
    assert fused(frozen, x) == 3


def test_a_generated_bias_stays_with_its_layer():
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False), nn.ReLU()),
        torch.randn(2, 3, 5, 5),
    )
    plain = fxrpg.transform(net, dof=10, method="pranc")
    small = fxrpg.transform(net, dof=10, method="pranc", example_inputs=(x,))
    same_call(plain, small, x)
    assert fused(small, x) == 1


def test_strict_and_mode_of_lowering_and_graph_modules_and_meta():
    net, x = tiny()
    small = fxrpg.transform(net, dof=60, plan=EVERYTHING, strict=True, example_inputs=(x,))
    assert fused(small, x) == 3
    graph = fxrpg.transform(fx.symbolic_trace(net), dof=60, plan=EVERYTHING, example_inputs=(x,))
    assert fused(graph, x) == 3
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    with pytest.raises(fxrpg.FxrpgError, match=r"_weight_norm needs a lowering.*Transform with strict=False"):
        fxrpg.transform(normed, dof=2, plan=EVERYTHING, strict=True, example_inputs=(torch.ones(2, 3),))
    with torch.device("meta"):
        meta = fxrpg.transform(Tiny(), dof=60, plan=EVERYTHING, example_inputs=(torch.empty(2, 3, 8, 8),))
    assert dict(fxrpg.explain(meta).dropped) == {"Tiny": "the meta device has no values to compare"}


BAD_EXAMPLES = [
    ({"example_inputs": torch.zeros(2, 3, 8, 8)}, "example_inputs: must be a tuple of arguments, found Tensor"),
    ({"example_inputs": [torch.zeros(2, 3, 8, 8)]}, "example_inputs: must be a tuple of arguments, found list"),
    ({"example_kwargs": [1]}, "example_kwargs: must be a dict of keyword arguments, found list"),
    ({"example_kwargs": {1: 1}}, "example_kwargs: must be a dict of keyword arguments, found a key that is no string"),
    (
        {"example_inputs": (torch.zeros(2, 5, 8, 8),)},
        "example_inputs: the model must run on them, found RuntimeError: ",
    ),
    ({"example_kwargs": {"y": 1}}, "example_inputs: the model must run on them, found TypeError: "),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_EXAMPLES)
def test_examples_that_do_not_fit(arguments, message):
    net, _x = tiny()
    for model in (net, fx.symbolic_trace(net)):
        with pytest.raises(fxrpg.FxrpgError, match=f"transform, {message}"):
            fxrpg.transform(model, dof=60, plan=EVERYTHING, **arguments)


def test_no_weight_outlives_its_op():
    """Nothing of a layer's size is saved for backward, nor alive when another op of the region starts."""
    net, x = tiny()
    small = fxrpg.transform(net.train(), dof=60, plan=EVERYTHING, example_inputs=(x,))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        small(x).sum().backward()
    assert sizes
    assert not {(4, 3, 3, 3), (4, 4, 3, 3), (4, 3, 1, 1)} & set(sizes)
    with Count() as count:
        small.eval()(x)
    assert "generate" not in count.calls


@settings(max_examples=15)
@given(data=st.data())
def test_any_conv_norm_activation(data):
    """Small networks of drawn layers: with regions and without they are the same, in both modes."""
    dims, depth = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    layers, width = [], 3
    for _ in range(depth):
        out, padding = data.draw(st.integers(1, 4)), data.draw(st.sampled_from(["zeros", "circular"]))
        conv = getattr(nn, f"Conv{dims}d")(
            width, out, 3, padding=1, bias=data.draw(st.booleans()), padding_mode=padding
        )
        layers.append(conv)
        if data.draw(st.booleans()):
            layers.append(getattr(nn, f"BatchNorm{dims}d")(out, affine=data.draw(st.booleans())))
        layers += data.draw(st.sampled_from([[], [nn.ReLU(True)], [nn.GELU()], [nn.SiLU()], [nn.Dropout(0.5)]]))
        width = out
    torch.manual_seed(0)
    net, x = warmed(nn.Sequential(*layers)), torch.randn(2, 3, *(5, 4, 3)[:dims])
    plain, small = pair(net, x, dof=5)
    results = {}
    for training in (True, False):
        for model in (plain.train(training), small.train(training)):
            torch.manual_seed(1)
            out = model(x)
            with torch.no_grad():
                results[model] = out.detach(), model(x)
        assert torch.equal(results[plain][0], results[small][0])
        torch.testing.assert_close(results[plain][1], results[small][1])
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), small.buffers(), strict=True))


def test_explain_forgets_what_it_expected_when_it_sees_what_happens():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3))
    small = fxrpg.transform(model, dof=20, example_inputs=(torch.randn(2, 2, 9, 9),)).eval()
    (row,) = (row for row in fxrpg.explain(small).rows if row.status == "generated")
    assert (row.way, row.path) == ("region", "staged")
    small(torch.randn(2, 2, 9, 9, requires_grad=True))  # gradients are wanted: the layers run one after the other
    (row,) = (row for row in fxrpg.explain(small).rows if row.status == "generated")
    assert (row.way, row.op) == ("handle", "conv2d")
