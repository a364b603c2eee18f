"""torch.compile(small, backend="fxrpg"): what it lowers, what it leaves, what explain says, and that no weight is kept."""

from __future__ import annotations

import copy
import importlib.metadata
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends import registry
from torch.utils.checkpoint import checkpoint

import fxrpg
from fxrpg.discovery import ENTRY, Finder, announce
from fxrpg.dynamo import _compiler, compile_graph
from fxrpg.passes.lifetimes import shorten_lives
from fxrpg.passes.lower import GENERATE, lower_readings

# Dynamo's own: deprecated calls of the libraries it drives, and its remark on calls that it does not look into
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning"),
              pytest.mark.filterwarnings("ignore::UserWarning:torch.*")]  # fmt: skip

EVERYTHING = [fxrpg.Rule("*", "generate")]
BY_NAME = [fxrpg.Rule("0.weight", "generate"), fxrpg.Rule("2.weight", "generate")]
EAGER = {"backend": "aot_eager_decomp_partition"}
"""Inductor's way of splitting a graph for backward, without its code generation, which takes seconds."""


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Call(nn.Module):
    """A model of a few layers and a function of them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs):
        return self.run(self, *inputs)


class Conv1D(nn.Module):
    """GPT-2's linear layer."""

    def __init__(self, width_in, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width_in, width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


def standardised(model, x):
    weight = model.conv.weight
    std, mean = torch.std_mean(weight, (1, 2, 3), keepdim=True)
    return F.conv2d(x, (weight - mean) / (std + 1e-5), model.conv.bias)


def cells(model, x):
    h = x.new_zeros(x.shape[0], 16)
    for t in range(x.shape[1]):
        h = model.cell(x[:, t], h)
    return h


def tied():
    table = nn.Embedding(40, 16)
    head = nn.Linear(16, 40, bias=False)
    head.weight = table.weight
    return Call(lambda m, i: m.head(m.inner(m.table(i)).relu()), table=table, inner=nn.Linear(16, 16), head=head)


def attend(model, x):
    return model.out(model.attention(x, x, x, need_weights=False)[0])


def products(model, x):
    x = torch.matmul(x, model.a.weight.t()).relu() @ model.b.weight
    return torch.einsum("bi,oi->bo", x, model.a.weight) + model.b.weight.sum()


def pieces(model, x):
    q, k = model.a.weight.chunk(2)
    return F.linear(x, q) * F.linear(x, k) + F.linear(x, model.b.weight.view(4, 2, 16).reshape(8, 16).to(x.dtype))


def recomputed(model, x):
    return checkpoint(
        lambda y: F.linear(torch.relu(F.linear(y, model.a.weight)), model.b.weight.T), x, use_reentrant=False
    )


def image(channels=3):
    return torch.randn(2, channels, 8, 8)


MODELS = {
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding="same")), image),
    "conv_transpose": (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ConvTranspose1d(8, 4, 4, 2)), lambda: torch.randn(2, 3, 9)),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.SiLU(), nn.Conv2d(8, 16, 1)), lambda: image(8)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 8)), lambda: torch.randint(40, (2, 3))),
    "tied": (tied, lambda: torch.randint(40, (2, 3))),
    "addmm": (lambda: nn.Sequential(Conv1D(8, 32), nn.GELU(), Conv1D(32, 8)), lambda: torch.randn(2, 3, 8)),
    "products": (lambda: Call(products, a=nn.Linear(16, 8), b=nn.Linear(16, 8)), lambda: torch.randn(3, 16)),
    "pieces": (lambda: Call(pieces, a=nn.Linear(16, 16), b=nn.Linear(16, 8)), lambda: torch.randn(3, 16)),
    "composed": (
        lambda: Call(lambda m, x: x @ (m.a.weight.t() @ m.b.weight), a=nn.Linear(16, 8), b=nn.Linear(16, 8)),
        lambda: torch.randn(3, 16),
    ),
    "checkpoint": (lambda: Call(recomputed, a=nn.Linear(16, 8), b=nn.Linear(16, 8)), lambda: torch.randn(3, 16)),
    "attention": (
        lambda: Call(attend, attention=nn.MultiheadAttention(16, 2, batch_first=True), out=nn.Linear(16, 4)),
        lambda: torch.randn(2, 3, 16),
    ),
    "weight_norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 8, 3)), nn.ReLU(), nn.Conv1d(8, 8, 1)),
        lambda: torch.randn(2, 4, 9),
    ),
    "standardised": (lambda: Call(standardised, conv=nn.Conv2d(3, 8, 3)), image),
    "cells": (lambda: Call(cells, cell=nn.GRUCell(8, 16)), lambda: torch.randn(2, 3, 8)),
}  # fmt: skip


def build(name: str, **options) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    plan = BY_NAME if name == "addmm" else EVERYTHING
    return fxrpg.transform(make(), dof=0.3, plan=plan, **options), inputs()


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def kept_for_backward(out: Tensor) -> Iterator[Tensor]:
    """What the nodes of `out`'s record hold where no hook sees it: compiled code has tensors of its own there."""
    nodes, seen = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield from getattr(node, "_tensors_no_vc_check", None) or ()
            nodes += [parent for parent, _ in node.next_functions]


class Saved:
    """The tensors that are saved for backward in the block."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def __enter__(self) -> Saved:
        def pack(tensor: Tensor) -> Tensor:
            self.tensors.append(tensor.detach())
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self.hooks.__exit__(None, None, None)

    def weights_of(self, model: nn.Module) -> list[str]:
        """Names of the generated weights that are saved: whole or a good part, in any layout, as any type.

        A saved tensor, and all the memory that it is a view of, is compared by its values: are all of them the weight's?
        """
        stored = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        weights = dict(fxrpg.materialize(model).named_parameters(remove_duplicate=False))
        found = []
        for tensor in self.tensors:
            storage = tensor.untyped_storage()
            if not tensor.is_floating_point() or storage.data_ptr() in stored:
                continue
            whole = torch.empty(0, dtype=tensor.dtype).set_(storage)
            for row in fxrpg.explain(model).rows:
                weight = weights[row.name].detach()
                size = row.status == "generated" and 4 * max(tensor.numel(), whole.numel()) >= weight.numel()
                if size and any(bool(torch.isin(t, weight.to(tensor.dtype)).all()) for t in (tensor, whole)):
                    found.append(row.name)
        return found


def run(name: str, model: nn.Module, x: Tensor, compiled) -> None:
    """The compiled model is as right as the model itself, and keeps no weight."""
    expected = model(x)
    grads = gradients(model, expected)
    with Saved() as saved:
        out = compiled(x)
    saved.tensors += kept_for_backward(out)
    assert saved.tensors
    assert saved.weights_of(model) == []
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(model, out), grads)


@pytest.mark.parametrize("name", MODELS)
def test_no_weight_is_kept(name):
    model, x = build(name)
    run(name, model, x, torch.compile(model, backend="fxrpg", options=EAGER, fullgraph=True))
    assert all("compiled" in row.way for row in fxrpg.explain(model).rows if row.status == "generated")


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
@pytest.mark.parametrize("name", MODELS)
def test_plain_compile_keeps_no_weight(name, backend):
    model, x = build(name)
    run(name, model, x, torch.compile(model, backend=backend, fullgraph=True))


@pytest.mark.parametrize("name", ["tied", "pieces", "standardised"])
def test_inductor_keeps_no_weight(name):
    model, x = build(name)
    run(name, model, x, torch.compile(model, backend="fxrpg", fullgraph=True))


def test_the_proof_can_fail():
    """The measuring tools see a weight that is saved: whole, turned, cast, or a view of it."""
    model, x = build("products")
    link = model.a._fxrpg_link
    _name, _state, view, _shape = link.weights["weight"]
    for change in (lambda w: w, lambda w: w.t().contiguous().t(), lambda w: w.bfloat16(), lambda w: w[:4]):
        weight = change(torch.ops.fxrpg.generate.default(model.fxrpg_ring, model.fxrpg_scale, view))
        with Saved() as saved:
            torch.einsum("bi,oi->bo", x.to(weight.dtype).requires_grad_(), weight)
        assert saved.weights_of(model) == ["a.weight"]


class Spy:
    """A backend that keeps the graphs it is given, and runs them as they are."""

    __name__ = "spy"

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.given: dict[str, object] = {}

    def __call__(self, gm, _inputs, **given):
        self.graphs += [m for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]
        self.given = given
        return gm.forward

    def ops(self) -> list[str]:
        targets = [node.target for gm in self.graphs for node in gm.graph.nodes if node.op.startswith("call")]
        return [getattr(target, "__name__", str(target)) for target in targets]


def compiled_with(spy: Spy, model: nn.Module, **given):
    return torch.compile(model, backend="fxrpg", fullgraph=True, options={"backend": spy}, **given)


def test_what_the_compiler_is_given():
    spy = Spy()
    model, x = build("products")
    compiled_with(spy, model)(x)
    assert spy.ops()[:3] == ["linear.default", "relu", "linear.default"]
    assert spy.ops()[-3:] == ["generate.default", "sum", "add"]
    assert spy.ops().count("generate.default") == 1
    assert not any("val" in node.meta for node in spy.graphs[0].graph.nodes)  # a note of ours, not Dynamo's


def test_a_weight_is_lowered_inside_other_graphs():
    spy = Spy()
    model, x = build("checkpoint")
    compiled_with(spy, model)(x)
    assert len(spy.graphs) == 2
    assert spy.ops().count("linear.default") == 2
    assert "generate.default" not in spy.ops()


def branch(model, x):
    return torch.cond(x.sum() > 0, lambda y: F.linear(y, model.a.weight), lambda y: y @ model.b.weight.t(), (x,))


def test_branches_of_a_graph():
    spy = Spy()
    torch.manual_seed(0)
    model = fxrpg.transform(
        Call(branch, a=nn.Linear(8, 4, bias=False), b=nn.Linear(8, 4, bias=False)), dof=20, plan=EVERYTHING
    )
    x = torch.randn(3, 8)
    torch.testing.assert_close(compiled_with(spy, model)(x), model(x))
    assert spy.ops().count("linear.default") == 2


def test_options_go_to_the_other_backend():
    spy = Spy()
    model, x = build("conv")
    torch.compile(model, backend="fxrpg", options={"backend": spy, "level": 3})(x)
    assert spy.given == {"options": {"level": 3}}
    with pytest.raises(Exception, match="Unexpected optimization option level"):
        torch.compile(model, backend="fxrpg", options={"level": 3})(x)


def test_a_mode_goes_to_inductor():
    assert _compiler("inductor", "max-autotune-no-cudagraphs", {}).config["max_autotune"] is True


@pytest.mark.parametrize("name", ["fxrpg", "no_such_backend", 3])
def test_a_backend_that_is_none(name):
    model, x = build("conv")
    with pytest.raises(Exception, match="must name another backend of torch.compile, or be one, found"):
        torch.compile(model, backend="fxrpg", options={"backend": name})(x)


def test_dynamic_shapes():
    spy = Spy()
    model, _ = build("attention")
    compiled = compiled_with(spy, model, dynamic=True)
    for batch, length in ((2, 3), (4, 7), (3, 5)):
        x = torch.randn(batch, length, 16)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(spy.graphs) == 1
    assert "generate.default" not in spy.ops()


def stopped(model, x):
    x = F.linear(x, model.a.weight).relu()
    torch._dynamo.graph_break()
    return F.linear(x, model.b.weight)


@pytest.mark.parametrize("layer", ["lstm", "break"])
def test_graph_breaks(layer):
    torch.manual_seed(0)
    if layer == "lstm":
        model = Call(lambda m, x: m.b(m.a(x)[0]), a=nn.LSTM(8, 4, batch_first=True), b=nn.Linear(4, 4))
    else:
        model = Call(stopped, a=nn.Linear(8, 16), b=nn.Linear(16, 4))
    small = fxrpg.transform(model, dof=50, plan=EVERYTHING)
    run(layer, small, torch.randn(2, 2, 8), torch.compile(small, backend="fxrpg", options=EAGER))
    rows = {row.name: row for row in fxrpg.explain(small).rows}
    assert "compiled" in rows["b.weight"].way


def carried(model, x):
    whole, turned, part = model.a.weight, model.a.weight.t(), model.b.weight.chunk(2)[1]
    x = x.relu()
    torch._dynamo.graph_break()
    return torch.inner(x, whole) + x @ turned + F.linear(x, part) + torch.inner(x, part)


def test_a_weight_goes_from_one_graph_to_the_next_as_a_handle():
    torch.manual_seed(0)
    small = fxrpg.transform(Call(carried, a=nn.Linear(8, 6), b=nn.Linear(8, 12)), dof=50, plan=EVERYTHING)
    run("", small, torch.randn(3, 8, requires_grad=True), torch.compile(small, backend="fxrpg", options=EAGER))


@pytest.mark.parametrize("method", ["pranc", "pemn", "frozen", "several"])
def test_methods_and_states(method):
    torch.manual_seed(0)
    net = Call(products, a=nn.Linear(16, 8), b=nn.Linear(16, 8))
    if method == "several":
        plan = [fxrpg.Rule("a.*", fxrpg.Ring(), scope="layer", dof=20), fxrpg.Rule("b.*", fxrpg.Pranc(), dof=20)]
        small = fxrpg.transform(net, plan=plan)
    else:
        small = fxrpg.transform(net, dof=20, method="pranc" if method == "pranc" else "pemn", plan=EVERYTHING)
        small = fxrpg.freeze(small) if method == "frozen" else small
    x = torch.randn(3, 16, requires_grad=True)
    run(method, small, x, torch.compile(small, backend="fxrpg", options=EAGER, fullgraph=True))


@pytest.mark.parametrize("context", ["eval", "no_grad", "inference", "autocast"])
@pytest.mark.parametrize("name", ["products", "attention", "conv"])
def test_contexts(name, context):
    model, x = build(name)
    model.train(context != "eval")
    blocks = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "eval": torch.enable_grad,
              "autocast": lambda: torch.autocast("cpu", torch.bfloat16)}  # fmt: skip
    compiled = torch.compile(model, backend="fxrpg", options=EAGER, fullgraph=True)
    with blocks[context]():
        out, expected = compiled(x), model(x)
    assert (out.dtype, out.requires_grad) == (expected.dtype, expected.requires_grad)
    torch.testing.assert_close(out, expected)


def test_a_cast_weight_is_lowered_where_the_input_has_its_type():
    spy = Spy()
    model = Call(lambda m, x: F.linear(x, m.a.weight.to(x.dtype)) + F.linear(x.float(), m.a.weight.bfloat16().float()),
                 a=nn.Linear(16, 8))  # fmt: skip
    small = fxrpg.transform(model, dof=20, plan=EVERYTHING)
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    torch.testing.assert_close(compiled_with(spy, small)(x), small(x), rtol=0.02, atol=0.02)
    assert spy.ops().count("linear.default") == 1
    assert spy.ops().count("generate.default") == 1


def test_a_weight_that_was_read_without_gradients_has_one():
    """As the parameter has that it stands for; what is made of it without gradients has none."""

    def forward(m, x):
        with torch.no_grad():
            weight = m.a.weight
            turned = m.b.weight.t()
        return torch.inner(x, weight) + x @ turned

    torch.manual_seed(0)
    model = fxrpg.transform(Call(forward, a=nn.Linear(8, 4), b=nn.Linear(8, 4)), dof=20, plan=EVERYTHING)
    run("", model, torch.randn(3, 8), torch.compile(model, backend="fxrpg", options=EAGER, fullgraph=True))


def test_an_ordinary_model_and_a_graph_module():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    small = fxrpg.transform(torch.fx.symbolic_trace(net), dof=20, plan=EVERYTHING)
    x = torch.randn(3, 8)
    for model in (net, small):
        out = torch.compile(model, backend="fxrpg", options=EAGER, fullgraph=True)(x)
        torch.testing.assert_close(gradients(model, out), gradients(model, model(x)))


def test_explain():
    """The rows of the model that was compiled say so; those of a copy, of the same plan and seed, do not."""
    model, x = build("standardised")
    other = fxrpg.transform(MODELS["standardised"][0](), dof=0.3, plan=EVERYTHING)
    copied = copy.deepcopy(model)
    torch.compile(model, backend="fxrpg", options=EAGER)(x)
    (row,) = [row for row in fxrpg.explain(model).rows if row.status == "generated"]
    assert (row.way, row.path) == ("compiled", "materialized")
    assert row.op == "std_mean, sub"
    assert row.reason == "no lowering for this op"
    for untouched in (other, copied):
        assert fxrpg.explain(untouched).rows[0].way == "handle"


def test_explain_names_the_op_of_a_stock_layer():
    model, x = build("conv_transpose")
    torch.compile(model, backend="fxrpg", options=EAGER)(x)
    rows = [row for row in fxrpg.explain(model).rows if row.status == "generated"]
    assert [(row.way, row.path, row.op) for row in rows] == [
        ("compiled", "staged", "conv1d"),
        ("compiled", "staged", "conv_transpose1d"),
    ]


def test_strict():
    model, x = build("standardised", strict=True)
    with pytest.raises(Exception, match=r"conv.weight: std_mean needs a lowering .*strict=True"):
        torch.compile(model, backend="fxrpg", options=EAGER)(x)
    lowered, x = build("tied", strict=True)
    torch.compile(lowered, backend="fxrpg", options=EAGER, fullgraph=True)(x)


def test_found_by_name_in_a_checkout():
    """In a fresh process: importing fxrpg loads no Dynamo, and lets it find the backend."""
    code = """
import sys, torch, fxrpg
assert "torch._dynamo" not in sys.modules
assert "fxrpg" in torch.compiler.list_backends()
assert "fxrpg.dynamo" not in sys.modules
small = fxrpg.transform(torch.nn.Linear(3, 5), dof=4, plan=[fxrpg.Rule("*", "generate")])
torch.compile(small, backend="fxrpg", options={"backend": "eager"})(torch.randn(2, 3))
print(fxrpg.explain(small).rows[0].way)
"""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "compiled\n"), done.stderr
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][ENTRY.group] == {ENTRY.name: ENTRY.value}


def test_found_by_name_though_dynamo_has_read_the_entry_points(monkeypatch):
    registry.list_backends()
    for known in (registry._BACKENDS, registry._COMPILER_FNS):
        monkeypatch.delitem(known, "fxrpg", raising=False)
    announce()
    announce()
    assert registry.lookup_backend("fxrpg") is compile_graph
    assert sum(isinstance(finder, Finder) for finder in sys.meta_path) == 1


def test_metadata_of_a_checkout_is_no_one_elses():
    assert importlib.metadata.version("fxrpg") == fxrpg.__version__
    assert not [d for d in importlib.metadata.distributions(path=[]) if d.name == "fxrpg"]
    assert [file for d in importlib.metadata.distributions(name="no-such-thing") for file in d.files or ()] == []


def graph_of(model: nn.Module, use) -> torch.fx.GraphModule:
    """A graph of the two arguments state and scale: `use(read)`, where `read()` generates the first weight."""
    view = next(iter(model._fxrpg_plan.views.values())).text
    graph = torch.fx.Graph()
    tracer = torch.fx.proxy.GraphAppendingTracer(graph)
    state, scale = (torch.fx.Proxy(graph.placeholder(name), tracer) for name in ("state", "scale"))
    out = use(lambda: GENERATE(state, scale, view))
    graph.output(out.node)
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def one_after_the_other(read):
    first, second = read(), read()
    return first.sum() + second.abs().sum()


def at_once(read):
    first, _unread, second = read(), read(), read()
    return torch.relu(first) + torch.sigmoid(second) + first


@pytest.mark.parametrize(("use", "generates"), [(one_after_the_other, 2), (at_once, 1)])
def test_equal_weights_are_merged_where_both_are_alive(use, generates):
    model, _ = build("addmm")
    gm = graph_of(model, use)
    expected = gm(model.fxrpg_ring, model.fxrpg_scale)
    assert shorten_lives(gm).modified
    assert len(gm.graph.find_nodes(op="call_function", target=GENERATE)) == generates
    assert all(node.next in node.users for node in gm.graph.find_nodes(op="call_function", target=GENERATE))
    assert not shorten_lives(gm).modified
    torch.testing.assert_close(gm(model.fxrpg_ring, model.fxrpg_scale), expected, rtol=0, atol=0)


def test_what_is_written_to_is_neither_lowered_nor_merged():
    def use(read):
        weight, other = read(), read()
        return torch.mm(weight.mul_(2).t(), other) + weight.sum()

    model, _ = build("addmm")
    gm, state = graph_of(model, use), model.fxrpg_ring.detach()
    expected = gm(state, model.fxrpg_scale)
    lower_readings(gm)
    shorten_lives(gm)
    assert len(gm.graph.find_nodes(op="call_function", target=GENERATE)) == 1
    torch.testing.assert_close(gm(state, model.fxrpg_scale), expected)
