"""Trace a module as a region: its forward becomes a graph that refers to the live module, and epilogues are drawn in."""

from __future__ import annotations

import builtins
import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.proxy import Attribute

from fxrpg.epilogue import EPILOGUES
from fxrpg.errors import FxrpgError
from fxrpg.folding import hooked
from fxrpg.lowering import current_mode
from fxrpg.owner import link_of, plain_class, stock_layer
from fxrpg.passes.epilogue import names_of, norm_and_activation, tail_of, take_place
from fxrpg.regions import Unknown, layer_epilogue, seen

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


class _Strict(fx.Proxy):
    """A value of a graph that is being traced. Sets and dicts would take it for another than it will be, so no hash."""

    def __getattr__(self, k: str) -> Attribute:
        return _StrictAttribute(self, k)

    def __hash__(self) -> int:
        tracer: Any = self.tracer
        return tracer.refuse("a look-up by a value of the graph")


class _StrictAttribute(Attribute):
    __getattr__, __hash__ = _Strict.__getattr__, _Strict.__hash__


class RegionTracer(fx.Tracer):
    """torch.fx's tracer, but what it cannot look into becomes a leaf, and what the code saw of a module is noted.

    A module is a leaf when its code fails on proxies (though it may catch that), or does what a graph would lose: contexts
    (autocast, no_grad, saved-tensor hooks), custom autograd functions, tensors made of constants, attributes set.

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
        """(path of a module, attribute) -> what the code found there (`regions.seen`)."""
        self.modes: set[str] = set()
        """Paths of modules of which the code has read the mode."""
        self.failures: list[Exception] = []
        self.mode, self.thread = current_mode(), threading.get_ident()

    def trace_module(self, module: nn.Module) -> fx.Graph:
        """The graph of `module`'s forward, its targets relative to it. Raises whatever the forward raises on proxies."""
        self.through.append(module)
        with _watching(self, module):
            graph = self.trace(module)
        if self.failures:
            raise self.failures[0]
        for node in [node for node in graph.find_nodes(op="get_attr") if not node.users]:
            graph.erase_node(node)
        graph.lint()
        modules = dict(module.named_modules())
        for (path, name), value in self.reads.items():
            if seen(modules[path], name) != value:
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
        if threading.get_ident() != self.thread:  # torch.fx watches the modules of all threads
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if current_mode() != self.mode:
            self.refuse("lowering_mode")
        if self.is_leaf_module(m, path) or path in self.leaves:
            return self.create_proxy("call_module", path, args, kwargs)
        before = len(self.graph.nodes), dict(self.reads), list(self.through), dict(self.module_stack)
        failed = len(self.failures)
        try:
            out = super().call_module(m, forward, args, kwargs)
            if self.failures[failed:]:
                raise self.failures[failed]
        except Exception as e:  # a forward may do anything to a proxy
            self._forget(*before)
            del self.failures[failed:]
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

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Strict(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and a not in self.tensor_attrs:
            known = {id(t) for t in (*self.root.parameters(), *self.root.buffers())}
            if id(a) not in known:
                self.refuse("a tensor that the code makes out of constants")
        return super().create_arg(a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self._remembered(super().to_bool, obj)

    def iter(self, obj: fx.Proxy) -> Iterator:
        return self._remembered(super().iter, obj)

    def _remembered(self, ask: Callable[[fx.Proxy], Any], obj: fx.Proxy) -> Any:
        try:
            return ask(obj)
        except fx.proxy.TraceError as e:
            self.failures.append(e)
            raise

    def refuse(self, what: str) -> NoReturn:
        """Raise Unknown, and remember it: the code may catch it."""
        self.failures.append(Unknown(what))
        raise self.failures[-1]

    def note_read(self, path: str, module: nn.Module, name: str) -> None:
        """The traced code has asked a module for an attribute that is no module."""
        if (path, name) not in self.reads:
            if isinstance(vars(module).get(name), Tensor):
                self.refuse(f"{name}, a tensor that is neither parameter nor buffer")
            try:
                self.reads[path, name] = seen(module, name)
            except Unknown as e:
                self.refuse(str(e))


def reason_of(error: Exception) -> str:
    """Why a module cannot be traced, in a line."""
    if isinstance(error, Unknown):
        return f"a graph would not keep {error}"
    if isinstance(error, FxrpgError):
        where, must, found, _fix = error.args
        return f"{where}: {must}, found {found}"
    return f"{type(error).__name__}: {error}".splitlines()[0]


_INTERNAL = frozenset((*vars(nn.Module()), *dir(nn.Module)))


@contextlib.contextmanager
def _watching(tracer: RegionTracer, root: nn.Module) -> Iterator[None]:
    """While the block traces: note which plain attributes of modules are read, and refuse what a graph would lose."""
    paths = {id(module): path for path, module in root.named_modules()}

    def read(self: nn.Module, name: str) -> Any:
        plain = id(self) in paths and name not in _INTERNAL and not name.startswith(("__", "_fxrpg"))
        if plain and name not in object.__getattribute__(self, "_modules"):
            tracer.note_read(paths[id(self)], self, name)
        elif id(self) in paths and name == "training":
            tracer.modes.add(paths[id(self)])
        return object.__getattribute__(self, name)

    def is_instance(value: Any, classes: Any) -> bool:
        """What the user's code asks about a value: an input is a tensor, what other values are the graph does not know."""
        where = sys._getframe(1).f_globals.get("__name__", "")
        if issubclass(type(value), fx.Proxy) and value.tracer is tracer and not where.startswith(("torch.", "fxrpg.")):
            if type(value) is not _Strict or value.node.op != "placeholder":
                tracer.refuse("the class of a value of the graph")
            return issubclass(Tensor, classes)
        return built_in(value, classes)

    built_in = builtins.isinstance
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(nn.Module, "__getattribute__", read))
        for holder, name, what in _LOST:
            stack.enter_context(_replaced(holder, name, _refused(tracer, holder, name, what)))
        stack.enter_context(_replaced(builtins, "isinstance", is_instance))
        yield


def _refused(tracer: RegionTracer, holder: Any, name: str, what: str) -> Any:
    """What raises in the place of `holder.name`, but in other threads than the tracer's."""
    method = vars(holder).get(name)
    original: Any = getattr(method, "__func__", method) or getattr(holder, name)

    def refused(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == tracer.thread:
            tracer.refuse(what)
        return original(*args, **kwargs)

    return classmethod(refused) if isinstance(method, classmethod) else refused


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
    (torch, "is_inference_mode_enabled", "is_inference_mode_enabled"),
    (torch, "is_autocast_enabled", "is_autocast_enabled"),
    (torch, "are_deterministic_algorithms_enabled", "are_deterministic_algorithms_enabled"),
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
