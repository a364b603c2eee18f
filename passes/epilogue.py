"""Draw the batch norm and the activation that follow a lowered op into the op's epilogue, and take them out again."""

from __future__ import annotations

import inspect
import operator
from typing import Any, NamedTuple

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxrpg.epilogue import ACTIVATIONS, EPILOGUES, Epilogue
from fxrpg.folding import NORMS, RunningNorm, activation_name, affine_of_norm, epilogue_of_norm, hooked
from fxrpg.handle import handle_of
from fxrpg.passes.lower import GENERATE, OP, op_name

aten = torch.ops.aten
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", aten.relu.default: "relu", aten.relu_.default: "relu",
    F.relu6: "relu6", aten.relu6.default: "relu6", aten.relu6_.default: "relu6",
    F.silu: "silu", aten.silu.default: "silu", aten.silu_.default: "silu",
    F.hardswish: "hardswish", aten.hardswish.default: "hardswish", aten.hardswish_.default: "hardswish",
    F.sigmoid: "sigmoid", torch.sigmoid: "sigmoid", torch.sigmoid_: "sigmoid",
    aten.sigmoid.default: "sigmoid", aten.sigmoid_.default: "sigmoid",
    F.gelu: "gelu", aten.gelu.default: "gelu",
    F.hardtanh: "hardtanh", aten.hardtanh.default: "hardtanh", aten.hardtanh_.default: "hardtanh",
}  # fmt: skip
_METHODS = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "sigmoid_": "sigmoid"}


class Tail(NamedTuple):
    """What follows an op in a graph, each the only reader of what stands before it."""

    norm: fx.Node | None = None
    activation: fx.Node | None = None
    name: str = "none"
    """The activation's name in `epilogue.ACTIVATIONS`; "none" without one."""
    nodes: tuple[fx.Node, ...] = ()
    """All of it, in order."""
    idle: tuple[str, ...] = ()
    """Paths of modules in between that do nothing."""


def fuse_epilogues(gm: fx.GraphModule) -> PassResult:
    """Replace a lowered op, the batch norm behind it and the activation behind that by one node.

    Where one of them is a module the node is a call of `epilogue_of_norm`, which takes the modules and decides when it
    runs; an exported graph, or one without a norm, gets the op with an epilogue itself. Idempotent.
    """
    changed = False
    for head in [node for node in gm.graph.nodes if node.target in EPILOGUES]:
        tail = tail_of(gm, head)
        if tail.nodes and not (_is_aten(tail.norm) and not _on_channels(head)):
            _fuse(gm.graph, head, tail, EPILOGUES[head.target])
            changed = True
    if changed:
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, changed)


def tail_of(gm: fx.GraphModule, head: fx.Node, *, past_idle: bool = False) -> Tail:
    """What follows `head` that an epilogue can take: a batch norm or none, an activation or none.

    Args:
        past_idle: look for the activation behind modules that do nothing, too. They are not called any more then.
    """
    tail, follower = Tail(), _follower(head)
    if follower and _is_norm(gm, follower, head):
        nodes: tuple[fx.Node, ...] = (follower,)
        if follower.target is _NO_TRAINING:  # it returns the statistics too, which nothing may read
            first = _follower(follower)
            if first is None or first.target is not operator.getitem or first.args[1] != 0:
                return tail
            nodes = (follower, first)
        tail = Tail(norm=follower, nodes=nodes)
    last, idle = tail.nodes[-1] if tail.nodes else head, []
    between: list[fx.Node] = []
    while past_idle and (follower := _follower(last)) and follower.op == "call_module" and _is_idle(gm, follower):
        last = follower
        between.append(last)
        idle.append(str(last.target))
    follower = _follower(last)
    name = _activation(gm, follower, last) if follower else None
    if follower is None or name is None or (follower.op == "call_module" and _is_aten(tail.norm)):
        return tail
    return Tail(tail.norm, follower, name, (*tail.nodes, *between, follower), tuple(idle))


def _follower(node: fx.Node) -> fx.Node | None:
    """The only reader of a node, where it also is the next that computes: nothing can change between the two."""
    readers = [user for user in node.users if not _is_aside(user)]
    step = node.next
    while step.op in ("get_attr", "placeholder") or _is_aside(step):
        step = step.next
    if readers != [step] or step.args[:1] != (node,) or any(map(_is_aside, step.all_input_nodes)):
        return None
    return step if step.all_input_nodes.count(node) == 1 else None


def _is_aside(node: fx.Node) -> bool:
    """Whether a node only reads or checks what norms and activations leave as it is: a shape, a type, a device."""
    if node.op == "call_method":
        return node.target in ("dim", "size")
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("ndim", "shape", "dtype", "device")
    inputs = node.all_input_nodes
    checks = node.target is torch._assert or getattr(node.target, "__module__", "") == "_operator"
    return checks and bool(inputs) and all(map(_is_aside, inputs))


def _is_idle(gm: fx.GraphModule, node: fx.Node) -> bool:
    module = gm.get_submodule(str(node.target))
    return type(module) is nn.Identity and not hooked(module)


def _is_norm(gm: fx.GraphModule, node: fx.Node, x: fx.Node) -> bool:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return type(module) in NORMS and not hooked(module) and node.args == (x,) and not node.kwargs
    return running_norm(node) is not None


_NO_TRAINING = aten._native_batch_norm_legit_no_training.default


def running_norm(node: fx.Node) -> tuple[Any, ...] | None:
    """(weight, bias, mean, var, eps) of a batch norm that is an op and uses running statistics; None for another node."""
    if node.target is F.batch_norm:
        bound = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        _x, mean, var, weight, bias, training, _momentum, eps = bound.arguments.values()
    elif node.target is aten.batch_norm.default and not node.kwargs:
        _x, weight, bias, mean, var, training, _momentum, eps, _cudnn = node.args
    elif node.target is _NO_TRAINING and not node.kwargs:
        (_x, weight, bias, mean, var, _momentum, eps), training = node.args, False
    else:
        return None
    tensors = (weight, bias, mean, var)
    generated = any(isinstance(t, fx.Node) and t.target in (GENERATE, handle_of) for t in tensors)
    return (*tensors, eps) if training is False and not generated and mean is not None and var is not None else None


def _is_aten(norm: fx.Node | None) -> bool:
    return norm is not None and isinstance(norm.target, torch._ops.OpOverload)


def _activation(gm: fx.GraphModule, node: fx.Node, x: fx.Node) -> str | None:
    """The name of the activation that a node is."""
    rest, options = node.args[1:], {key: value for key, value in node.kwargs.items() if key != "inplace"}
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return activation_name(module) if not rest and not node.kwargs else None
    name = _METHODS.get(str(node.target)) if node.op == "call_method" else _FUNCTIONS.get(node.target)
    if name == "hardtanh":
        return "relu6" if rest[:2] == (0, 6) and not options else None
    if name == "gelu" and set(options) <= {"approximate"}:
        return "gelu_tanh" if options.get("approximate") == "tanh" else "gelu"
    return name if not options and all(isinstance(arg, bool) for arg in rest) else None


def _on_channels(head: fx.Node) -> bool:
    """Whether a batch norm, whose channels are the second axis, meets the op's output channels there."""
    value = head.meta.get("val")
    return isinstance(value, Tensor) and value.dim() + EPILOGUES[head.target].axis(head.args) == 1


def _fuse(graph: fx.Graph, head: fx.Node, tail: Tail, epilogue: Epilogue) -> None:
    last = tail.nodes[-1]
    with graph.inserting_before(last):
        fused = graph.call_function(*_replacement(graph, head, tail, epilogue))
    fused.meta = {**last.meta, OP: " + ".join([head.meta.get(OP, op_name(head)), *names_of(tail)])}
    take_place(graph, fused, head, tail)


def take_place(graph: fx.Graph, fused: fx.Node, head: fx.Node, tail: Tail) -> None:
    """Let `fused` stand for `head` and its tail; what only read their shapes reads its own, and moves behind it."""
    chain, place, step = (head, *tail.nodes), fused, head.next
    while step is not fused:
        step, node = step.next, step
        if _is_aside(node):
            place.append(node)
            place = node
    for node in reversed(chain):
        node.replace_all_uses_with(fused)
        graph.erase_node(node)


def _replacement(graph: fx.Graph, head: fx.Node, tail: Tail, epilogue: Epilogue) -> tuple[Any, tuple[Any, ...]]:
    """The node that takes all their places: (target, arguments)."""
    norm, activation = tail.norm, tail.activation
    if (norm is None or _is_aten(norm)) and (activation is None or activation.op != "call_module"):
        factor = shift = None
        if norm is not None:
            pair = graph.call_function(affine_of_norm, running_norm(norm))
            factor, shift = (graph.call_function(operator.getitem, (pair, i)) for i in (0, 1))
        return epilogue.op, epilogue.join(head.args, factor, shift, tail.name)
    return epilogue_of_norm, (epilogue.name, *norm_and_activation(graph, tail), *head.args)


def norm_and_activation(graph: fx.Graph, tail: Tail) -> tuple[Any, Any]:
    """Of a tail: a node that gets the module or makes a RunningNorm, or None; and one that gets a module, or a name."""
    norm: Any = tail.norm
    if norm is not None:
        module = norm.op == "call_module"
        norm = graph.get_attr(norm.target) if module else graph.call_function(RunningNorm, running_norm(norm))
    if tail.activation is not None and tail.activation.op == "call_module":
        return norm, graph.get_attr(str(tail.activation.target))
    return norm, tail.name


def names_of(tail: Tail) -> list[str]:
    """The tail's ops, as `explain` shows them."""
    norm = [] if tail.norm is None else ["batch_norm"]
    return norm + ([] if tail.activation is None else [tail.name])


def separate_epilogues(gm: fx.GraphModule) -> PassResult:
    """Undo `fuse_epilogues`: the lowered op, then the norm, then the activation. Idempotent."""
    changed = False
    for epilogue in EPILOGUES.values():
        for node in gm.graph.find_nodes(op="call_function", target=epilogue.op):
            base, (factor, _shift, name) = epilogue.split(node.args)
            with gm.graph.inserting_before(node):
                out = gm.graph.call_function(epilogue.base, base)
                if factor is not None:
                    weight, bias, mean, var, eps = factor.args[0].args
                    out = gm.graph.call_function(F.batch_norm, (out, mean, var, weight, bias, False, 0.0, eps))
            _finish(gm.graph, node, out, name)
            changed = True
    for node in gm.graph.find_nodes(op="call_function", target=epilogue_of_norm):
        op, norm, activation, *args = node.args
        with gm.graph.inserting_before(node):
            out = gm.graph.call_function(getattr(torch.ops.fxrpg, op).default, tuple(args))
            if norm is not None and norm.op == "get_attr":
                out = gm.graph.call_module(norm.target, (out,))
            elif norm is not None:
                weight, bias, mean, var, eps = norm.args
                out = gm.graph.call_function(F.batch_norm, (out, mean, var, weight, bias, False, 0.0, eps))
        _finish(gm.graph, node, out, activation)
        changed = True
    for target in (affine_of_norm, RunningNorm):
        for made in gm.graph.find_nodes(op="call_function", target=target):
            for node in (*made.users, made):
                gm.graph.erase_node(node)
    if changed:
        gm.recompile()
    return PassResult(gm, changed)


def _finish(graph: fx.Graph, node: fx.Node, out: fx.Node, activation: Any) -> None:
    """Put `activation(out)` in the place of a node with an epilogue."""
    with graph.inserting_before(node):
        if isinstance(activation, fx.Node):
            out = graph.call_module(str(activation.target), (out,))
        elif activation != "none":
            out = graph.call_function(ACTIVATIONS[activation], (out,))
    out.meta = dict(node.meta)
    node.replace_all_uses_with(out)
    graph.erase_node(node)
