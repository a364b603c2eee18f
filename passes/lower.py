"""Let ops take the view instead of the generated weight; what has no rule takes a handle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch.fx.passes.infra.pass_base import PassResult

from fxrpg.handle import handle_of
from fxrpg.lowering import Generated, NotLowered, Rule, current_mode, rule_for
from fxrpg.parts import part_of
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
    left = lower_readings(gm)
    for generate, reasons in left.items():
        _defer(gm.graph, generate, reasons)
    if left:
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, bool(left))


def lower_readings(gm: fx.GraphModule) -> dict[fx.Node, dict[str, str]]:
    """Replace `op(x, generate(...))` by the lowering of `op`, for every form in which the graph reads a generated weight.

    Returns each generate that was read -> {op that still consumes it: why it was not lowered}.
    """
    left: dict[fx.Node, dict[str, str]] = {}
    for generate in [node for node in gm.graph.find_nodes(op="call_function", target=GENERATE) if _other_users(node)]:
        forms = readings(generate)
        reasons: dict[fx.Node, str] = {}
        for form, reading in forms.items():
            reasons |= _lower_users(gm.graph, form, reading, skip=forms)
        for form in reversed(list(forms)[1:]):
            if not form.users:
                gm.graph.erase_node(form)
        left[generate] = {op_name(user): reason for user, reason in reasons.items()}
    return left


def _other_users(generate: fx.Node) -> list[fx.Node]:
    """Nodes that take the generated tensor as anything but the bias of a lowered op."""
    return [user for user in generate.users if not _is_bias(user, generate)]


def _is_bias(call: fx.Node, generate: fx.Node) -> bool:
    dense: Any = DENSE_OPS.get(call.target)
    return dense is not None and call.args[len(dense.inputs)] is generate and call.args.count(generate) == 1


def _lower_users(
    graph: fx.Graph, weight: fx.Node, reading: Reading | None, skip: Mapping[fx.Node, Any]
) -> dict[fx.Node, str]:
    """Lower each node that consumes `weight`; for those that are left, why."""
    reasons: dict[fx.Node, str] = {}
    for user in list(weight.users):
        if user not in skip:
            try:
                if reading is None:
                    raise NotLowered("the weight was rearranged, cast, detached or written to on the way")
                _lower_call(graph, user, weight, reading)
            except NotLowered as reason:
                reasons[user] = str(reason)
    return reasons


def _lower_call(graph: fx.Graph, call: fx.Node, weight: fx.Node, reading: Reading) -> None:
    """Replace one consuming node. Raises NotLowered where no rule covers it."""
    generated, kind = reading
    rule = rule_of(call, weight)
    if rule is None:
        raise NotLowered("no lowering for this op")
    if current_mode() == "materialized":
        raise NotLowered("lowering_mode('materialized')")
    found = rule.weight_in(call.args, call.kwargs)
    uses = [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if leaf is weight]
    if found is not weight or len(uses) > 1:
        raise NotLowered(f"the generated tensor is not only the op's argument {rule.keyword!r}")
    if generated.transposed and not rule.transposable:
        raise NotLowered("the weight was transposed on the way")
    if kind and {value.dtype for node in call.all_input_nodes if (value := value_of(node)) is not None} != {kind}:
        raise NotLowered("the weight was cast to another type than the input's")
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


def rule_of(call: fx.Node, weight: fx.Node) -> Rule | None:
    """The lowering of the op that a node calls with `weight`, if it has one."""
    target: Any = call.target
    if call.op == "call_method":
        target = getattr(torch.Tensor, target, None)
    known = call.op in ("call_function", "call_method")
    return rule_for(target, call.args, call.kwargs, lambda x: x is weight) if known else None


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


class Reading(NamedTuple):
    """A form in which a graph reads a generated weight: as it is or transposed, or a part of it; and cast to what type."""

    generated: Generated
    dtype: torch.dtype | None = None


def readings(generate: fx.Node) -> dict[fx.Node, Reading | None]:
    """The generate and all nodes that show its weight in another form, with what rules take it for: None if for nothing.

    Transposes are known by their names, other forms by how their values (`meta["val"]`, where a graph has them) lie in the
    memory of the weight.
    """
    state, scale, view = cast(Any, generate.args)
    whole = Reading(Generated.of(state, scale, view))
    found: dict[fx.Node, Reading | None] = {generate: whole}
    nodes = [generate]
    for node in nodes:  # which grows
        for user in node.users:
            if writes(user, node):
                return {generate: None}
            if user.op not in ("call_function", "call_method") or user.all_input_nodes != [node] or user in found:
                continue
            if op_name(user) in _FORMS and _detached(generate, user):
                found[user] = None
            elif node is generate and len(whole.generated.shape) == 2 and transposes_matrix(user):
                found[user] = Reading(Generated.of(state, scale, view, transposed=True))
            elif op_name(user) in _FORMS:
                found[user] = _reading(generate, user)
            if user in found:
                nodes.append(user)
    return found


def writes(call: fx.Node, tensor: fx.Node) -> bool:
    """Whether a node changes `tensor`, which it is given: by torch's own convention, a trailing underscore."""
    name = op_name(call)
    by_name = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
    return (by_name and call.args[:1] == (tensor,)) or call.kwargs.get("out") is tensor


def _detached(generate: fx.Node, form: fx.Node) -> bool:
    """Whether no gradient leads from a node to the weight, though one would lead on from the weight to the state.

    Where a graph records no gradients for a while, the weight may have been read then: it still is like a parameter.
    """
    switches = form.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
    source, value = value_of(cast(Any, generate.args[0]) if switches else generate), value_of(form)
    return source is not None and value is not None and source.requires_grad and not value.requires_grad


def _reading(generate: fx.Node, form: fx.Node) -> Reading | None:
    """What a node shows of a weight, if its value says so: what Handle.as_weight asks of a handle."""
    state, scale, view = cast(Any, generate.args)
    whole, value = value_of(generate), value_of(form)
    if whole is None or value is None or whole.device != value.device:
        return None
    alike = (whole.shape, whole.stride()) == (value.shape, value.stride())
    if whole.dtype != value.dtype:
        return Reading(Generated.of(state, scale, view), value.dtype) if alike and op_name(form) in _CASTS else None
    if whole.untyped_storage()._cdata != value.untyped_storage()._cdata:
        return None
    if alike:
        return Reading(Generated.of(state, scale, view))
    if whole.dim() == 2 and (whole.t().shape, whole.t().stride()) == (value.shape, value.stride()):
        return Reading(Generated.of(state, scale, view, transposed=True))
    part = part_of(View.parse(view), tuple(value.shape), value.stride(), int(value.storage_offset()))
    return Reading(Generated.of(state, scale, part.text)) if part else None


def value_of(node: fx.Node) -> torch.Tensor | None:
    """What tracing has noted of the tensor that a node stands for."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


_CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "_to_copy.default", "to.dtype"}
_FORMS = _CASTS | {
    "chunk", "contiguous", "detach", "flatten", "getattr", "getitem", "movedim", "moveaxis", "narrow", "permute", "reshape",
    "select", "split", "squeeze", "swapaxes", "swapdims", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view",
}  # fmt: skip
_WRITES = {
    "setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift", "irshift",
    "imatmul",
}  # fmt: skip


def _defer(graph: fx.Graph, generate: fx.Node, reasons: dict[str, str]) -> None:
    """Put a handle in the place of a generate that is still used: its consumers materialize it when they run."""
    others = _other_users(generate)
    if others:
        with graph.inserting_before(generate):
            handle = graph.call_function(handle_of, (*generate.args, generate.meta["fxrpg_name"]))
        handle.meta = {**generate.meta, REASONS: reasons}
        for user in others:
            user.replace_input_with(generate, handle)
    for user in list(generate.users):  # a bias: one for each op, made when it is needed
        with graph.inserting_before(user):
            user.replace_input_with(generate, graph.node_copy(generate))
    if not generate.users:
        graph.erase_node(generate)
