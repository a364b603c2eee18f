"""torch.compile and torch.export: fullgraph, same numbers, and no generated weight kept for backward there either."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import fxrpg
from fxrpg.networks import resnet18

# Dynamo's own: deprecated calls of the libraries it drives, and its remark on calls that it does not look into
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning"),
              pytest.mark.filterwarnings("ignore::UserWarning:torch.*")]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model, forward, x):
    model.zero_grad()
    out = forward(x)
    out.square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def compiled_graphs(model, *inputs):
    """(output, gradients) of the compiled model, and the forward graphs, split for backward as Inductor would split them."""
    graphs = []

    def capture(gm, _inputs):
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    backend = aot_autograd(fw_compiler=capture, bw_compiler=lambda gm, _: make_boxed_func(gm.forward),
                           partition_fn=min_cut_rematerialization_partition)  # fmt: skip
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    return gradients(model, lambda args: compiled(*args), inputs), graphs


def saved_sizes(graph):
    (output,) = graph.graph.find_nodes(op="output")
    kept = [node for node in output.args[0] if isinstance(node, torch.fx.Node) and node.op != "placeholder"]
    return [node.meta["val"].numel() for node in kept if isinstance(node.meta.get("val"), torch.Tensor)]


def test_resnet18_with_inductor():
    torch.manual_seed(0)
    small = fxrpg.transform(resnet18(10), dof=100_000)
    x = torch.randn(4, 3, 64, 64)
    out, grads = gradients(small, small, x)
    compiled_out, compiled_grads = gradients(small, torch.compile(small, fullgraph=True), x)
    assert relative(compiled_out, out) < 1e-4
    assert compiled_grads.keys() == grads.keys()
    assert relative(compiled_grads["fxrpg_ring"], grads["fxrpg_ring"]) < 1e-3


def test_resnet18_keeps_no_weight():
    small = fxrpg.transform(resnet18(10), dof=100_000)
    _, (graph,) = compiled_graphs(small, torch.randn(2, 3, 32, 32))
    targets = [str(node.target) for node in graph.graph.nodes]
    assert sum("fxrpg.conv.default" in target for target in targets) == 19
    assert not any("generate" in target for target in targets)


class Leftovers(nn.Module):
    """Weights that reach plain ops: attention, recurrent cells, products of the user's own."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.b = nn.Linear(64, 64)
        self.table = nn.Embedding(50, 64)
        self.up = nn.ConvTranspose1d(64, 64, 2)

    def forward(self, x, index):
        x = self.a(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = torch.einsum("bti,oi->bto", x, self.b.weight) + self.table(index)
        return self.up(x.transpose(1, 2))


def test_leftovers_are_generated_again_in_backward():
    torch.manual_seed(0)
    small = fxrpg.transform(Leftovers(), dof=200, plan=[fxrpg.Rule("*", "generate")])
    x = (torch.randn(2, 5, 8), torch.randint(50, (2, 5)))
    out, grads = gradients(small, lambda args: small(*args), x)
    (compiled_out, compiled_grads), graphs = compiled_graphs(small, *x)
    torch.testing.assert_close(compiled_out, out)
    torch.testing.assert_close(compiled_grads, grads)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("fxrpg.generate" in target for target in targets) == 3  # in_proj, out_proj, einsum's
    assert max(saved_sizes(graphs[0])) < 64 * 64


def test_a_rewritten_graph_compiles():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    small = fxrpg.transform(torch.fx.symbolic_trace(net), dof=50, plan=[fxrpg.Rule("*", "generate")])
    x = torch.randn(2, 3, 8, 8)
    out, grads = gradients(small, small, x)
    (compiled_out, compiled_grads), _ = compiled_graphs(small, x)
    torch.testing.assert_close(compiled_out, out)
    torch.testing.assert_close(compiled_grads, grads)


def test_graph_breaks():
    """A recurrent layer breaks the graph: what runs between the pieces reads handles, and Dynamo lets them be."""
    torch.manual_seed(0)
    small = fxrpg.transform(nn.LSTM(8, 16), dof=100, plan=[fxrpg.Rule("*", "generate")])
    x = torch.randn(5, 2, 8)
    out, grads = gradients(small, lambda x: small(x)[0], x)
    compiled = torch.compile(small, backend="aot_eager")
    compiled_out, compiled_grads = gradients(small, lambda x: compiled(x)[0], x)
    torch.testing.assert_close(compiled_out, out)
    torch.testing.assert_close(compiled_grads, grads)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    torch.manual_seed(0)
    small = fxrpg.transform(Leftovers(), dof=200, plan=[fxrpg.Rule("*", "generate")]).eval()
    x = (torch.randn(2, 5, 8), torch.randint(50, (2, 5)))
    exported = torch.export.export(small, x, strict=strict)
    torch.testing.assert_close(exported.module()(*x), small(*x))
    assert "fxrpg_ring" in exported.state_dict
    assert not any("attention" in name and "weight" in name for name in exported.state_dict)
