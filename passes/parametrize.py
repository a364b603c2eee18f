"""Replace each read of a planned weight by one op that generates it from the state."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.fx as fx
from torch.fx.passes.infra.pass_base import PassResult

from fxrpg.owner import SCALE
from fxrpg.plan import Plan


def parametrize(plan: Plan) -> Callable[[fx.GraphModule], PassResult]:
    """The pass that turns `get_attr weight` into `fxrpg.generate(state, scale, view)` for every weight of `plan`.

    All reads of a (tied) weight become one node. Idempotent: afterwards no read is left.
    """
    views = {alias: (name, plan.views[name]) for name, aliases in plan.names.items() for alias in aliases}

    def parametrize_graph(gm: fx.GraphModule) -> PassResult:
        reads = [node for node in gm.graph.find_nodes(op="get_attr") if node.target in views]
        first = next(node for node in gm.graph.nodes if node.op != "placeholder")
        made: dict[str, fx.Node] = {}
        shared = functools.cache(fx.Graph.get_attr)
        for node in reads:
            name, view = views[node.target]
            if name not in made:
                with gm.graph.inserting_before(first):
                    tensors = [shared(gm.graph, attribute) for attribute in (plan.state_of(name), SCALE)]
                    made[name] = gm.graph.call_function(torch.ops.fxrpg.generate.default, (*tensors, view.text))
                made[name].meta = {**node.meta, "fxrpg_name": name}
            node.replace_all_uses_with(made[name])
        for node in reads:
            gm.graph.erase_node(node)
        if reads:
            gm.graph.lint()
            gm.recompile()
        return PassResult(gm, bool(reads))

    return parametrize_graph
