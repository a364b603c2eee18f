"""Write stock layers out as the functions they call, so that their weights appear in the graph."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch.fx as fx
from torch import nn
from torch.fx.passes.infra.pass_base import PassResult

from fxrpg.owner import stock_layer
from fxrpg.plan import Plan


def normalise(plan: Plan) -> Callable[[fx.GraphModule], PassResult]:
    """The pass that replaces each call of a stock conv, linear, embedding or bilinear layer by its functional form.

    Only layers with a planned weight; one with hooks, or a forward of its own, stays a call. Idempotent.
    """
    owners = {alias.rpartition(".")[0] for aliases in plan.names.values() for alias in aliases}

    def normalise_graph(gm: fx.GraphModule) -> PassResult:
        changed = False
        for node in [node for node in gm.graph.find_nodes(op="call_module") if node.target in owners]:
            layer = gm.get_submodule(node.target)
            if stock_layer(type(layer)) and not _has_hooks(layer) and (body := _body(layer, node)):
                _inline(gm.graph, node, body)
                changed = True
        if changed:
            gm.graph.lint()
            gm.recompile()
        return PassResult(gm, changed)

    return normalise_graph


def _has_hooks(layer: nn.Module) -> bool:
    patched = "forward" in vars(layer)
    return patched or any(
        (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    )


def _body(layer: nn.Module, call: fx.Node) -> fx.Graph | None:
    """The layer's own graph for the inputs that this call gives; None where its code looks into them."""
    given = list(inspect.signature(layer.forward).bind(*call.args, **call.kwargs).arguments)
    if call.kwargs or len(given) not in _FORWARDS:
        return None
    bare = copy.copy(layer)
    bare.__class__ = type(layer.__class__.__name__, (type(layer),), {"forward": _FORWARDS[len(given)]})
    try:
        return fx.Tracer().trace(bare)
    except fx.proxy.TraceError:
        return None


# A parameter that the call leaves at its default must not become an input of the trace.
_FORWARDS = {
    1: lambda self, input: super(type(self), self).forward(input),
    2: lambda self, input1, input2: super(type(self), self).forward(input1, input2),
}


def _inline(graph: fx.Graph, call: fx.Node, body: fx.Graph) -> None:
    """Put `body` in the place of the call."""
    inputs = iter(call.args)
    values: dict[fx.Node, Any] = {}
    with graph.inserting_before(call):
        for node in body.nodes:
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "output":
                call.replace_all_uses_with(values[node.args[0]])
            else:
                values[node] = copied = graph.node_copy(node, lambda n: values[n])
                if node.op == "get_attr":
                    copied.target = f"{call.target}.{node.target}"
                else:
                    copied.meta = dict(call.meta)
    graph.erase_node(call)
