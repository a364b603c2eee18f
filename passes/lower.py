"""Let ops take the view instead of the generated weight; what has no rule takes a handle."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch.fx.passes.infra.pass_base import PassResult

from fxrpg.handle import handle_of
from fxrpg.lowering import LOWERINGS, Generated, NotLowered, Rule, current_mode
from fxrpg.staging import DENSE_OPS
from fxrpg.view import View

aten = torch.ops.aten
GENERATE = torch.ops.fxrpg.generate.default
OP = "fxrpg_op"
REASONS = "fxrpg_reasons"
"""Key in a handle node's `meta`: {consuming op: why it was not lowered}."""


def lower(gm: fx.GraphModule) -> PassResult:
    """Replace `op(x, generate(...))` by the lowering of `op`, and every generate that is left by a handle on the view.

    Idempotent: afterwards a generate is left only as the bias of a lowered op, which adds it and does not keep it.
    """
    generates = [node for node in gm.graph.find_nodes(op="call_function", target=GENERATE) if _other_users(node)]
    reasons: dict[fx.Node, str] = {}
    for generate in generates:
        arguments: Any = generate.args
        state, scale, view = arguments
        matrix = len(View.parse(view).shape) == 2
        transposes = [user for user in generate.users if matrix and transposes_matrix(user)]
        reasons |= _lower_users(gm.graph, generate, Generated.of(state, scale, view), skip=transposes)
        for transpose in transposes:
            reasons |= _lower_users(gm.graph, transpose, Generated.of(state, scale, view, transposed=True), skip=[])
            if not transpose.users:
                gm.graph.erase_node(transpose)
    for generate in generates:
        _defer(gm.graph, generate, reasons)
    if generates:
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, bool(generates))


def _other_users(generate: fx.Node) -> list[fx.Node]:
    """Nodes that take the generated tensor as anything but the bias of a lowered op."""
    return [user for user in generate.users if not _is_bias(user, generate)]


def _is_bias(call: fx.Node, generate: fx.Node) -> bool:
    dense: Any = DENSE_OPS.get(call.target)
    return dense is not None and call.args[len(dense.inputs)] is generate and call.args.count(generate) == 1


def _lower_users(graph: fx.Graph, weight: fx.Node, generated: Generated, skip: list[fx.Node]) -> dict[fx.Node, str]:
    """Lower each node that consumes `weight`; for those that are left, why."""
    reasons: dict[fx.Node, str] = {}
    for user in list(weight.users):
        if user not in skip:
            try:
                _lower_call(graph, user, weight, generated)
            except NotLowered as reason:
                reasons[user] = str(reason)
    return reasons


def _lower_call(graph: fx.Graph, call: fx.Node, weight: fx.Node, generated: Generated) -> None:
    """Replace one consuming node. Raises NotLowered where no rule covers it."""
    rule = rule_for(call)
    if rule is None:
        raise NotLowered("no lowering for this op")
    if current_mode() == "materialized":
        raise NotLowered("lowering_mode('materialized')")
    found = call.args[rule.position] if len(call.args) > rule.position else call.kwargs.get(rule.keyword)
    uses = [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if leaf is weight]
    if found is not weight or len(uses) > 1:
        raise NotLowered(f"the generated tensor is not only the op's argument {rule.keyword!r}")
    if generated.transposed and not rule.transposable:
        raise NotLowered("the weight was transposed on the way")
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxied = generated._replace(state=fx.Proxy(generated.state, tracer), scale=fx.Proxy(generated.scale, tracer))
    proxies: Any = lambda n: proxied if n is weight else fx.Proxy(n, tracer)  # noqa: E731
    args, kwargs = fx.node.map_arg((call.args, call.kwargs), proxies)
    with graph.inserting_before(call):
        lowered = rule.call(*args, **rule.arguments(kwargs)).node
    lowered.meta = {**call.meta, OP: op_name(call)}
    call.replace_all_uses_with(lowered)
    graph.erase_node(call)


def op_name(call: fx.Node) -> str:
    """What a node calls, as `explain` shows it."""
    return call.target if isinstance(call.target, str) else getattr(call.target, "__name__", str(call.target))


def rule_for(call: fx.Node) -> Rule | None:
    """The lowering of the op that a node calls, if it has one."""
    target: Any = call.target
    if call.op == "call_method":
        target = getattr(torch.Tensor, target, None)
    return LOWERINGS.get(target) if call.op in ("call_function", "call_method") else None


def transposes_matrix(node: fx.Node) -> bool:
    """Whether the node is a transpose, in one of the ways that graphs write it, given that its argument is a matrix."""
    target: Any = node.target
    rest: Any = node.args[1:]
    if target in (aten.t.default, torch.t, "t"):
        return True
    if target in (aten.transpose.int, torch.transpose, "transpose"):
        return sorted(dim % 2 for dim in rest) == [0, 1]
    if target in (aten.permute.default, torch.permute, "permute"):
        return [dim % 2 for dim in (rest[0] if len(rest) == 1 else rest)] == [1, 0]
    return target is getattr and rest in (("T",), ("mT",))


def _defer(graph: fx.Graph, generate: fx.Node, reasons: dict[fx.Node, str]) -> None:
    """Put a handle in the place of a generate that is still used: its consumers materialize it when they run."""
    others = _other_users(generate)
    if others:
        with graph.inserting_before(generate):
            handle = graph.call_function(handle_of, (*generate.args, generate.meta["fxrpg_name"]))
        turned = [reader for user in others if transposes_matrix(user) for reader in user.users]
        why = {op_name(user): reasons[user] for user in (*others, *turned) if user in reasons}
        handle.meta = {**generate.meta, REASONS: why}
        for user in others:
            user.replace_input_with(generate, handle)
    for user in list(generate.users):  # a bias: one for each op, made when it is needed
        with graph.inserting_before(user):
            user.replace_input_with(generate, graph.node_copy(generate))
    if not generate.users:
        graph.erase_node(generate)
