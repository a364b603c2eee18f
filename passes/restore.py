"""The way back: a graph of ordinary ops on ordinary weights from one that was lowered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.fx.passes.infra.pass_base import PassResult

from fxrpg.handle import handle_of
from fxrpg.passes.epilogue import separate_epilogues
from fxrpg.staging import DENSE_OPS
from fxrpg.view import View


def restore(weights: Mapping[int, str]) -> Callable[[fx.GraphModule], PassResult]:
    """The pass that puts `get_attr <weight>` and the ordinary op where a view was used.

    Args:
        weights: a view's tensor id -> the name under which the graph module holds the full weight.
    """

    def restore_graph(gm: fx.GraphModule) -> PassResult:
        changed = separate_epilogues(gm).modified
        tracer = fx.proxy.GraphAppendingTracer(gm.graph)
        full = (handle_of, torch.ops.fxrpg.generate.default)
        for node in [node for target in full for node in gm.graph.find_nodes(op="call_function", target=target)]:
            with gm.graph.inserting_before(node):
                node.replace_all_uses_with(gm.graph.get_attr(weights[View.parse(node.args[2]).tensor]))
            gm.graph.erase_node(node)
            changed = True
        for op, dense in DENSE_OPS.items():
            n = len(dense.inputs)
            for node in list(gm.graph.find_nodes(op="call_function", target=op)):
                proxies: Any = lambda n: fx.Proxy(n, tracer)  # noqa: E731
                args: Any = fx.node.map_arg(node.args, proxies)
                with gm.graph.inserting_before(node):
                    weight: Any = fx.Proxy(gm.graph.get_attr(weights[View.parse(args[n + 3]).tensor]), tracer)
                    out: Any = dense.forward(*args[:n], weight, args[n], *args[n + 4 :])
                out.node.meta = dict(node.meta)
                node.replace_all_uses_with(out.node)
                gm.graph.erase_node(node)
                changed = True
        if changed:
            for read in [node for node in gm.graph.find_nodes(op="get_attr") if not node.users]:
                gm.graph.erase_node(read)
            gm.graph.lint()
            gm.recompile()
        return PassResult(gm, changed)

    return restore_graph


def put_parameter(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register `parameter` under its dotted name, with empty modules on the way where a graph has dropped them."""
    *path, attribute = name.split(".")
    module = root
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    module._parameters[attribute] = parameter
