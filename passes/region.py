"""Trace a module as a region: its forward becomes a graph that refers to the live module, and epilogues are drawn in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxrpg.epilogue import EPILOGUES
from fxrpg.errors import FxrpgError
from fxrpg.folding import hooked
from fxrpg.owner import link_of, plain_class, stock_layer
from fxrpg.passes.epilogue import names_of, norm_and_activation, tail_of, take_place
from fxrpg.regions import Unknown, frozen, layer_epilogue

FUSED = "fxrpg_fused"
"""Key in a `layer_epilogue` node's `meta`: (the layer's path, what the node does, paths of idle modules it passes by)."""


def fuse_layers(gm: fx.GraphModule) -> PassResult:
    """Replace the call of a layer that generates its weight, and the batch norm and activation behind it, by one node.

    What nothing of this kind follows stays a call: the layer lowers itself. Idempotent.
    """
    changed = False
    for head in gm.graph.find_nodes(op="call_module"):
        layer = gm.get_submodule(str(head.target))
        if not generates(layer) or len(head.args) != 1 or head.kwargs or not isinstance(head.args[0], fx.Node):
            continue
        tail = tail_of(gm, head, past_idle=True)
        if not tail.nodes:
            continue
        label = " + ".join([plain_class(layer).__name__, *names_of(tail)])
        with gm.graph.inserting_before(tail.nodes[-1]):
            get_layer = gm.graph.get_attr(str(head.target))
            arguments = (get_layer, *norm_and_activation(gm.graph, tail), *head.args, label)
            node = gm.graph.call_function(layer_epilogue, arguments)
        node.meta = {FUSED: (str(head.target), label, tail.idle)}
        take_place(gm.graph, node, head, tail)
        changed = True
    if changed:
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, changed)


def generates(layer: nn.Module) -> bool:
    """Whether a layer's op has an epilogue, and its weight, alone, is generated."""
    link, stock = link_of(layer), stock_layer(plain_class(layer))
    able = any(stock in epilogue.layers for epilogue in EPILOGUES.values())
    return link is not None and set(link.weights) == {"weight"} and able and not hooked(layer)


class RegionTracer(fx.Tracer):
    """torch.fx's tracer, but what it cannot look into becomes a leaf, and what the code saw of a module is noted.

    A module is a leaf when its code fails on proxies, or does what a graph would lose: contexts (autocast, no_grad,
    saved-tensor hooks), custom autograd functions, tensors made of constants, attributes set.

    Args:
        arguments: proxies of the call's tensors -> (args, kwargs) of the module's forward.
        count: how many tensors.
    """

    proxy_buffer_attributes = True

    def __init__(self, arguments: Callable[[list[Any]], tuple[Any, Any]], count: int) -> None:
        super().__init__()
        self.arguments, self.count = arguments, count
        self.through: list[nn.Module] = []
        self.leaves: dict[str, str] = {}
        """Path of a module that could not be traced -> why."""
        self.reads: dict[tuple[str, str], Any] = {}
        """(path of a module, attribute) -> what the code read there."""

    def trace_module(self, module: nn.Module) -> fx.Graph:
        """The graph of `module`'s forward, its targets relative to it. Raises whatever the forward raises on proxies."""
        self.through.append(module)
        with _watching(self, module):
            graph = self.trace(module)
        for node in [node for node in graph.find_nodes(op="get_attr") if not node.users]:
            graph.erase_node(node)
        graph.lint()
        modules = dict(module.named_modules())
        for (path, name), value in self.reads.items():
            if frozen(vars(modules[path])[name]) != value:
                raise Unknown(f"{path or 'it'}.{name}, which the code changes")
        return graph

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        proxies = [self.create_proxy("placeholder", f"input_{i}", (), {}) for i in range(self.count)]

        def call(root: nn.Module, *tensors: Any) -> Any:
            args, kwargs = self.arguments(list(tensors))
            return root_fn(root, *args, **kwargs)

        return call, [self.root, *proxies]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or link_of(m) is not None or hooked(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path) or path in self.leaves:
            return self.create_proxy("call_module", path, args, kwargs)
        before = len(self.graph.nodes), dict(self.reads), list(self.through), dict(self.module_stack)
        try:
            out = super().call_module(m, forward, args, kwargs)
        except Exception as e:  # a forward may do anything to a proxy
            self._forget(*before)
            self.leaves[path] = reason_of(e)
            return self.create_proxy("call_module", path, args, kwargs)
        self.through.append(m)
        return out

    def _forget(self, count: int, reads: Any, through: Any, stack: Any) -> None:
        """Undo what was traced since: nodes but those that get attributes, which the tracer may have cached."""
        self.reads, self.through = reads, through
        self.module_stack.clear()
        self.module_stack.update(stack)
        for node in reversed(list(self.graph.nodes)[count:]):
            if node.op != "get_attr":
                self.graph.erase_node(node)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and a not in self.tensor_attrs:
            known = {id(t) for t in (*self.root.parameters(), *self.root.buffers())}
            if id(a) not in known:
                raise Unknown("a tensor that the code makes out of constants")
        return super().create_arg(a)

    def note_read(self, path: str, name: str, value: Any) -> None:
        """The traced code has read a plain attribute of a module."""
        if (path, name) not in self.reads:
            if isinstance(value, Tensor):
                raise Unknown(f"{name}, a tensor that is neither parameter nor buffer")
            self.reads[path, name] = frozen(value)


def reason_of(error: Exception) -> str:
    """Why a module cannot be traced, in a line."""
    if isinstance(error, Unknown):
        return f"a graph would not keep {error}"
    if isinstance(error, FxrpgError):
        where, must, found, _fix = error.args
        return f"{where}: {must}, found {found}"
    return f"{type(error).__name__}: {error}".splitlines()[0]


_INTERNAL = frozenset(vars(nn.Module()))


@contextlib.contextmanager
def _watching(tracer: RegionTracer, root: nn.Module) -> Iterator[None]:
    """While the block traces: note which plain attributes of modules are read, and refuse what a graph would lose."""
    paths = {id(module): path for path, module in root.named_modules()}

    def read(self: nn.Module, name: str) -> Any:
        value = object.__getattribute__(self, name)
        plain = name not in _INTERNAL and not name.startswith("_fxrpg")
        if plain and id(self) in paths and name in object.__getattribute__(self, "__dict__"):
            tracer.note_read(paths[id(self)], name, value)
        return value

    def refuse(what: str) -> Callable[..., Any]:
        def refused(*args: Any, **kwargs: Any) -> Any:
            raise Unknown(what)

        return refused

    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(nn.Module, "__getattribute__", read))
        for holder, name, what in _LOST:
            stack.enter_context(_replaced(holder, name, refuse(what)))
        yield


_LOST: list[tuple[Any, str, str]] = [
    (nn.Module, "__setattr__", "an attribute that the code sets"),
    (torch.autocast, "__enter__", "autocast"),
    (torch.no_grad, "__enter__", "no_grad"),
    (torch.enable_grad, "__enter__", "enable_grad"),
    (torch.set_grad_enabled, "__init__", "set_grad_enabled"),
    (torch.inference_mode, "__enter__", "inference_mode"),
    (torch.autograd.graph.saved_tensors_hooks, "__enter__", "saved-tensor hooks"),
    (torch.autograd.Function, "apply", "an autograd.Function"),
    (torch, "is_grad_enabled", "is_grad_enabled"),
    (torch, "is_autocast_enabled", "is_autocast_enabled"),
]
"""What a module's code may do that its graph would not: (holder, attribute, words)."""


@contextlib.contextmanager
def _replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    own = name in vars(holder)
    before = vars(holder).get(name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        if own:
            setattr(holder, name, before)
        else:
            delattr(holder, name)
