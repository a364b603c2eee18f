"""Take the old parameters out: what is generated is not stored."""

from __future__ import annotations

from collections.abc import Callable

import torch.fx as fx
from torch.fx.passes.infra.pass_base import PassResult

from fxrpg.owner import own
from fxrpg.plan import Plan
from fxrpg.trace import Trace


def strip(plan: Plan, trace: Trace) -> Callable[[fx.GraphModule], PassResult]:
    """The pass that removes every planned parameter; modules that the graph still calls read it through a property."""

    def strip_graph(gm: fx.GraphModule) -> PassResult:
        owners, changed = [], False
        for name, aliases in plan.names.items():
            for alias in aliases:
                path, _, attribute = alias.rpartition(".")
                owner = gm.get_submodule(path)
                if attribute not in owner._parameters:
                    continue
                changed = True
                if owner is gm:  # nothing but its own graph, which is rewritten, reads it
                    del gm._parameters[attribute]
                else:
                    owners.append((name, owner, attribute))
        own(gm, plan, owners, trace)
        return PassResult(gm, changed)

    return strip_graph
