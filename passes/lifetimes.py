"""Let the full weights that a graph still generates live as short as it allows: made late, once where they would be twice."""

from __future__ import annotations

import torch
import torch.fx as fx
from torch.fx.passes.infra.pass_base import PassResult

from fxrpg.passes.lower import GENERATE, readings, writes


def shorten_lives(gm: fx.GraphModule) -> PassResult:
    """Drop each generate that nothing reads, put it before its first reader, merge two of one weight that are alive at once.

    Two that are not stay two: as one, the weight would be kept from the first to the second. Idempotent.
    """
    changed = _put_late(gm.graph)
    # made where no gradient is recorded, a weight cannot stand for one that has one
    if not gm.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled):
        changed |= _merge(gm.graph)
    if changed:
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, changed)


def _places(graph: fx.Graph) -> dict[fx.Node, int]:
    return {node: place for place, node in enumerate(graph.nodes)}


def _put_late(graph: fx.Graph) -> bool:
    places, changed = _places(graph), False
    for node in graph.find_nodes(op="call_function", target=GENERATE):
        if not node.users:
            graph.erase_node(node)
            changed = True
            continue
        first, step = min(node.users, key=places.__getitem__), node.next
        while step.target is GENERATE and step is not first:
            step = step.next
        if step is not first:
            first.prepend(node)
            changed = True
    return changed


def _merge(graph: fx.Graph) -> bool:
    """A weight is alive from its generate to the last reader of any of its forms."""
    places, changed = _places(graph), False
    alive: dict[tuple[fx.node.Argument, ...], tuple[fx.Node, int]] = {}
    for node in graph.find_nodes(op="call_function", target=GENERATE):
        forms, state = readings(node), node.args[0]
        if forms[node] is None or any(writes(user, state) for user in state.users):
            alive.pop(node.args, None)
            continue
        end = max(places[user] for form in forms for user in form.users)
        kept, until = alive.get(node.args, (node, -1))
        if places[node] < until:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)
            changed = True
        else:
            kept = node
        alive[node.args] = kept, max(end, until)
    return changed
