"""The graph way: golden graphs for each pass, idempotence, torch-level and ATen-level targets, and the way back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

import fxrpg
from fxrpg.assemble import plan_of
from fxrpg.handle import handle_of
from fxrpg.owner import SCALE
from fxrpg.passes.lower import lower
from fxrpg.passes.normalise import normalise
from fxrpg.passes.parametrize import parametrize
from fxrpg.passes.strip import strip
from fxrpg.trace import Trace
from fxrpg.weights import encode_scales

EVERYTHING = [fxrpg.Rule("*", "generate")]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding="same")
        self.norm = nn.BatchNorm1d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean(-1)
        return F.linear(self.fc(x), self.fc.weight.t()) + self.fc.weight.sum()


def parametrized() -> tuple[fx.GraphModule, object]:
    """A traced net that holds the state already, and its plan, with no pass run yet."""
    torch.manual_seed(0)
    gm = fx.symbolic_trace(Net())
    plan = plan_of(fxrpg.transform(gm, dof=12, plan=EVERYTHING))
    gm.register_parameter("fxrpg_ring", nn.Parameter(torch.randn(12)))
    gm.register_buffer(SCALE, encode_scales(torch.ones(2)))
    return gm, plan


def shown(gm: fx.GraphModule) -> list[str]:
    """One line a node, views shortened."""
    lines = []
    for node in gm.graph.nodes:
        target = getattr(node.target, "__name__", str(node.target))
        args = ", ".join("view" if isinstance(a, str) and a.startswith("{") else str(a) for a in node.args)
        lines.append(f"{node.op} {target}({args})")
    return lines


def test_normalise():
    gm, plan = parametrized()
    assert normalise(plan)(gm).modified
    assert shown(gm) == [
        "placeholder x()",
        "get_attr conv.weight()",
        "get_attr conv.bias()",
        "call_function conv1d(x, weight, bias, (1,), same, (1,), 1)",
        "call_module norm(conv1d)",
        "call_method relu(norm)",
        "call_method mean(relu, -1)",
        "get_attr fc.weight()",
        "get_attr fc.bias()",
        "call_function linear(mean, weight_1, bias_1)",
        "get_attr fc.weight()",
        "call_method t(fc_weight)",
        "call_function linear(linear_1, t)",
        "call_method sum(fc_weight)",
        "call_function add(linear, sum_1)",
        "output output(add)",
    ]
    assert not normalise(plan)(gm).modified


def test_parametrize():
    gm, plan = parametrized()
    normalise(plan)(gm)
    assert parametrize(plan)(gm).modified
    assert shown(gm) == [
        "placeholder x()",
        "get_attr fxrpg_ring()",
        "get_attr fxrpg_scale()",
        "call_function generate.default(fxrpg_ring, fxrpg_scale, view)",
        "call_function generate.default(fxrpg_ring, fxrpg_scale, view)",
        "get_attr conv.bias()",
        "call_function conv1d(x, generate_default, bias, (1,), same, (1,), 1)",
        "call_module norm(conv1d)",
        "call_method relu(norm)",
        "call_method mean(relu, -1)",
        "get_attr fc.bias()",
        "call_function linear(mean, generate_default_1, bias_1)",
        "call_method t(generate_default_1)",
        "call_function linear(linear_1, t)",
        "call_method sum(generate_default_1)",
        "call_function add(linear, sum_1)",
        "output output(add)",
    ]
    assert not parametrize(plan)(gm).modified


def test_lower_and_strip():
    gm, plan = parametrized()
    x = torch.randn(2, 2, 5)
    normalise(plan)(gm)
    parametrize(plan)(gm)
    before = gm(x)
    assert lower(gm).modified
    assert shown(gm) == [
        "placeholder x()",
        "get_attr fxrpg_ring()",
        "get_attr fxrpg_scale()",
        "call_function handle_of(fxrpg_ring, fxrpg_scale, view, fc.weight)",
        "get_attr conv.bias()",
        "call_function conv.default(x, bias, fxrpg_ring, fxrpg_scale, view, [1], [1], [1], False, [0], 1)",
        "call_module norm(conv_default)",
        "call_method relu(norm)",
        "call_method mean(relu, -1)",
        "get_attr fc.bias()",
        "call_function linear.default(mean, bias_1, fxrpg_ring, fxrpg_scale, view, False)",
        "call_function linear.default(linear_default, None, fxrpg_ring, fxrpg_scale, view, True)",
        "call_method sum(handle_of)",
        "call_function add(linear_default_1, sum_1)",
        "output output(add)",
    ]
    assert not lower(gm).modified
    torch.testing.assert_close(gm(x), before)
    trace = Trace()
    assert strip(plan, trace)(gm).modified
    assert not strip(plan, trace)(gm).modified
    assert not {"conv.weight", "fc.weight"} & set(dict(gm.named_parameters()))
    torch.testing.assert_close(gm(x), before)


def test_materialized_mode_leaves_handles():
    gm = fx.symbolic_trace(Net())
    with fxrpg.lowering_mode("materialized"):
        small = fxrpg.transform(gm, dof=12, plan=EVERYTHING)
    targets = [node.target for node in small.graph.nodes]
    assert targets.count(handle_of) == 2
    assert not any(str(target).startswith("fxrpg.") for target in targets)
    x = torch.randn(2, 2, 5)
    torch.testing.assert_close(small(x), fxrpg.transform(gm, dof=12, plan=EVERYTHING)(x))


SOURCES = {
    "symbolic_trace": lambda net, x: fx.symbolic_trace(net),
    "export": lambda net, x: torch.export.export(net, (x,)).module(),
    "decomposed": lambda net, x: torch.export.export(net, (x,)).run_decompositions().module(),
    "no-bias": lambda net, x: torch.export.export(net, (x,)).run_decompositions().module(),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("source", SOURCES)
def test_graphs_of_every_origin(source):
    """Same plan, same bits and same numbers as the module way, whatever wrote the graph."""
    torch.manual_seed(0)

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 4, 3, stride=2, bias=source != "no-bias")
            self.up = nn.ConvTranspose2d(4, 4, 2, groups=2)
            self.b = nn.Linear(4, 8, bias=source != "no-bias")
            self.c = nn.Linear(8, 2)
            self.table = nn.Embedding(5, 8)

        def forward(self, x):
            y = self.b(self.up(self.a(x)).mean((2, 3)))
            return self.c(y + self.table(torch.tensor([1, 4])))

    net, x = Body().eval(), torch.randn(2, 3, 9, 9)
    small = fxrpg.transform(net, dof=40, plan=EVERYTHING)
    graph = fxrpg.transform(SOURCES[source](net, x), dof=40, plan=EVERYTHING)
    assert isinstance(graph, fx.GraphModule)
    assert plan_of(graph).digest() == plan_of(small).digest()
    assert torch.equal(graph.fxrpg_ring, small.fxrpg_ring)
    assert torch.equal(graph.fxrpg_scale, small.fxrpg_scale)
    assert fxrpg.explain(graph).fraction("staged") == 1
    assert {row.way for row in fxrpg.explain(graph).rows if row.status == "generated"} == {"graph"}
    torch.testing.assert_close(graph(x), small(x))
    graph(x).square().sum().backward()
    small(x).square().sum().backward()
    torch.testing.assert_close(graph.fxrpg_ring.grad, small.fxrpg_ring.grad)
    dense = fxrpg.materialize(graph)
    assert not any("fxrpg" in str(node.target) for node in dense.graph.nodes)
    assert {name for name, _ in dense.named_parameters()} == {name for name, _ in net.named_parameters()}
    torch.testing.assert_close(dense(x), small(x))


def test_modules_that_the_graph_only_calls_read_handles():
    """A layer with hooks, and one that is no stock layer, stay calls; both still generate."""
    torch.manual_seed(0)
    calls = []
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), Twice(4, 5)))
    getattr(gm, "0").register_forward_hook(lambda *args: calls.append(1))
    small = fxrpg.transform(gm, dof=10, plan=EVERYTHING)
    x = torch.randn(2, 3)
    out = small(x)
    assert calls == [1]
    assert fxrpg.explain(small).rows[0].way == "handle"
    torch.testing.assert_close(out, fxrpg.materialize(small)(x))
    again = copy.deepcopy(small)
    torch.testing.assert_close(again(x), out)
    with torch.no_grad():
        again.fxrpg_ring.zero_()
    assert torch.equal(small(x), out), "a copy reads its own ring"
    assert not torch.equal(again(x), out)


class Twice(nn.Linear):
    """No stock layer: its forward is its own."""

    def forward(self, x):
        return super().forward(x) + self.weight.sum()


def test_a_pickled_graph_comes_back_whole():
    small = fxrpg.transform(fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), Twice(4, 5))), dof=10, plan=EVERYTHING)
    x = torch.randn(2, 3)
    again = pickle.loads(pickle.dumps(small))
    assert torch.equal(again(x), small(x))
    assert list(again.state_dict()) == list(small.state_dict())
    assert str(fxrpg.explain(again)) == str(fxrpg.explain(small))
    again.load_state_dict(small.state_dict(), strict=True)
    with torch.no_grad():
        again.fxrpg_ring.zero_()
    assert not torch.equal(again(x), small(x)), "it reads its own ring"
    torch.testing.assert_close(
        fxrpg.materialize(again).state_dict(), fxrpg.materialize(copy.deepcopy(again)).state_dict()
    )


def test_tied_weights_in_a_graph():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(6, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.table.weight

        def forward(self, i):
            return self.head(self.table(i))

    torch.manual_seed(0)
    net, index = Tied(), torch.tensor([0, 5, 2])
    small = fxrpg.transform(net, dof=7, plan=EVERYTHING)
    graph = fxrpg.transform(fx.symbolic_trace(net), dof=7, plan=EVERYTHING)
    assert plan_of(small).names == {"head.weight": ("table.weight", "head.weight")}
    torch.testing.assert_close(small(index), graph(index))
    dense = fxrpg.materialize(small)
    assert dense.head.weight is dense.table.weight
    torch.testing.assert_close(dense(index), small(index))


def test_strict_refuses_a_graph_that_materializes():
    with pytest.raises(fxrpg.FxrpgError, match=r"fc.weight: sum needs a lowering"):
        fxrpg.transform(fx.symbolic_trace(Net()), dof=12, plan=EVERYTHING, strict=True)


def test_assemble_leaves_the_argument_alone():
    gm = fx.symbolic_trace(Net())
    code, names = gm.code, list(gm.state_dict())
    fxrpg.transform(gm, dof=12, plan=EVERYTHING)
    assert (gm.code, list(gm.state_dict())) == (code, names)
