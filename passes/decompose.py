"""Write functions of several weights out as functions of one weight each, which have lowerings."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx.passes.infra.pass_base import PassResult
from torch.overrides import TorchFunctionMode
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from fxrpg.lowering import DECOMPOSITIONS, current_mode
from fxrpg.passes.lower import GENERATE, readings, value_of


def decompose(gm: fx.GraphModule) -> PassResult:
    """Replace each call of such a function on a generated weight by the calls that its decomposition makes.

    Needs the values that tracing noted (`meta["val"]`): the decomposition runs on them, without memory. Idempotent.
    """
    forms = {form for node in gm.graph.find_nodes(op="call_function", target=GENERATE) for form in readings(node)}
    changed = False
    for call in list(gm.graph.nodes):
        known = call.op == "call_function" and call.target in DECOMPOSITIONS and current_mode() != "materialized"
        if known and not forms.isdisjoint(call.all_input_nodes):
            changed |= _write_out(gm.graph, call)
    if changed:
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, changed)


def _write_out(graph: fx.Graph, call: fx.Node) -> bool:
    """Put the decomposition in the place of one call. Returns False where a graph cannot hold what it does."""
    before = call.prev
    try:
        args, kwargs = fx.node.map_arg((call.args, call.kwargs), lambda node: node.meta["val"])
        with graph.inserting_before(call), _differentiating(call), _Recorder(call) as recorder:
            out = recorder.node_of(DECOMPOSITIONS[call.target](*args, **kwargs))
    except Exception:  # whatever a decomposition may do; the call stays as it is, and is right
        while call.prev is not before:
            graph.erase_node(call.prev)
        return False
    for reader in list(call.users) if isinstance(out, tuple | list) else []:
        reader.replace_all_uses_with(out[reader.args[1]])
        graph.erase_node(reader)
    if isinstance(out, fx.Node):
        call.replace_all_uses_with(out)
    graph.erase_node(call)
    return True


@contextlib.contextmanager
def _differentiating(call: fx.Node) -> Iterator[None]:
    """Values get a record where those of the call have one; hooks on saved tensors are for those of a run."""
    values = [value for node in call.all_input_nodes if (value := value_of(node)) is not None]
    unhooked = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.set_grad_enabled(any(value.requires_grad for value in values)), unhooked:
        yield


class _Recorder(TorchFunctionMode):
    """Makes a node of every function that runs on values of a graph."""

    def __init__(self, call: fx.Node) -> None:
        super().__init__()
        self.call, self.graph = call, call.graph
        self.nodes = {id(node.meta["val"]): node for node in call.all_input_nodes}
        self.values: list[Any] = []  # which keeps their ids from being given to others

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        if not tensors or all(id(tensor) in self.nodes for tensor in tensors):
            return out
        getter = getattr(func, "__name__", "") == "__get__"
        target, args = (getattr, (*args[:1], func.__self__.__name__)) if getter else (func, args)
        self._record(self.graph.call_function(target, *self.node_of((args, kwargs))), out)
        return out

    def _record(self, node: fx.Node, value: Any) -> None:
        node.meta = {**self.call.meta, "val": value, "example_value": value}
        self.nodes[id(value)] = node
        self.values.append(value)
        if isinstance(value, tuple | list):
            for i, part in enumerate(value):
                self._record(self.graph.call_function(operator.getitem, (node, i)), part)

    def node_of(self, tree: Any) -> Any:
        """`tree` with nodes in the places of what it has of the graph's values. Raises KeyError for one of unknown origin."""
        symbolic = (Tensor, torch.SymInt, torch.SymFloat)
        return pytree.tree_map_only(symbolic, lambda value: self.nodes.get(id(value)) or self._size(value), tree)

    def _size(self, value: Any) -> Any:
        """A node that computes a size from those of the call's inputs; a size that turned out to be fixed, as an int."""
        if not isinstance(value, torch.SymInt):
            raise KeyError("a value that is none of the graph's")
        tracer = fx.proxy.GraphAppendingTracer(self.graph)
        known: dict[Any, Any] = {}
        for node in self.call.all_input_nodes:
            tensor = value_of(node)
            for axis, n in enumerate(() if tensor is None else tensor.shape):
                if isinstance(n, torch.SymInt) and n.node.expr in value.node.expr.free_symbols:
                    known.setdefault(n.node.expr, fx.Proxy(node, tracer).size(axis))
        size = sympy_interp(PythonReferenceAnalysis, known, value.node.expr)
        return size.node if isinstance(size, fx.Proxy) else size
