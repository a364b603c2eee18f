"""The module way: each owner of a planned weight reads it through a property of its class, which returns a handle.

The user's forward, hooks, control flow and names stay as they are, and `isinstance` holds: the class is a generated subclass.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor, nn

from fxrpg.digest import check_written
from fxrpg.errors import FxrpgError
from fxrpg.handle import Handle
from fxrpg.lowering import LAYERS, Generated
from fxrpg.onnx_export import refuse_onnx_tracing
from fxrpg.plan import Plan
from fxrpg.shares import PLAIN, local
from fxrpg.surroundings import compiled_elsewhere, traced_symbolically
from fxrpg.trace import Trace

SCALE = "fxrpg_scale"
TRACE = "_fxrpg_trace"
LINK = "_fxrpg_link"


class Link:
    """An owner's unregistered reference to the root, which deepcopy and pickle follow, and the weights it reads there."""

    _alive: ClassVar[weakref.WeakSet[Link]] = weakref.WeakSet()
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __new__(cls, *_: Any) -> Link:
        link = super().__new__(cls)
        with cls._lock:
            cls._alive.add(link)
        return link

    @classmethod
    def roots(cls) -> list[nn.Module]:
        """Every transformed model that is alive: who meets a state in a graph or an optimizer finds its model here."""
        with cls._lock:
            links = list(cls._alive)
        return list({id(link.root): link.root for link in links if link.root is not None}.values())

    def __init__(self, root: nn.Module, order: list[str]) -> None:
        self.root = root
        self.order = order  # the names of the owner's parameters before any was taken out
        # attribute -> name, dotted name of its state from the root, view, shape
        self.weights: dict[str, tuple[str, str, str, tuple[int, ...]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A graph module pickles its submodules before itself: it joins them again when it comes back.
        return self.__dict__ | ({"root": None} if isinstance(self.root, fx.GraphModule) else {})


def own(root: nn.Module, plan: Plan, weights: Iterable[tuple[str, nn.Module, str]], trace: Trace) -> None:
    """Take each (name, owner, attribute)'s parameter out of its owner, which then generates it.

    The root must hold the states that the plan names, and the scales as `fxrpg_scale`.
    """
    root.__dict__[TRACE] = trace
    owners: dict[int, nn.Module] = {}
    for name, owner, attribute in weights:
        link = owner.__dict__.setdefault(LINK, Link(root, list(owner._parameters)))
        view = plan.views[name]
        link.weights[attribute] = name, plan.state_of(name), view.text, view.shape
        owner._parameters.pop(attribute, None)
        owners[id(owner)] = owner
    for owner in owners.values():
        if isinstance(owner, nn.RNNBase):
            owner.__dict__.pop("_flat_weights", None)  # a property of the generated class from here on
        base: Any = type(owner)  # changed past a __setattr__ of the module's own
        object.__setattr__(owner, "__class__", owner_class(base, tuple(owner.__dict__[LINK].weights)))


def disown(owner: nn.Module, weights: dict[str, nn.Parameter]) -> None:
    """Make `owner` an ordinary module again, with `weights` (attribute -> parameter) at their old places."""
    link: Link = owner.__dict__.pop(LINK)
    object.__setattr__(owner, "__class__", plain_class(owner))
    parameters = owner._parameters | weights
    owner._parameters.clear()
    for attribute in [*link.order, *(a for a in parameters if a not in link.order)]:
        if attribute in parameters:
            owner._parameters[attribute] = parameters[attribute]
    if isinstance(owner, nn.RNNBase):
        owner._init_flat_weights()


def link_of(module: nn.Module) -> Link | None:
    """The module's link, if it owns generated weights."""
    return module.__dict__.get(LINK)


def owned(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, owner, attribute) for every place where a module in `model` reads a generated weight."""
    for module in model.modules():
        if link := link_of(module):
            for attribute, (name, *_view) in link.weights.items():
                yield name, module, attribute


def generated_of(owner: nn.Module, attribute: str) -> Generated:
    """The weight as a lowering takes it: its state and the root's scales as they are now, and the view."""
    link: Any = owner._fxrpg_link
    name, place, text, shape = link.weights[attribute]
    state = tensor_at(link.root, place)
    if type(state) not in PLAIN:
        piece = local(state, text, name)
        state = state if torch.is_grad_enabled() else piece  # the op's autograd kernel takes its piece of the other
    return Generated(state, link.root.fxrpg_scale, text, shape)


def tensor_at(root: nn.Module, name: str) -> Any:
    """The parameter or buffer with this dotted name."""
    for part in name.split("."):
        root = getattr(root, part)
    return root


def read(owner: nn.Module, attribute: str) -> Tensor:
    """What the property returns: a handle, or in code that is being compiled the generated tensor (recomputed, not saved)."""
    generated = generated_of(owner, attribute)
    if torch.compiler.is_compiling() and not compiled_elsewhere():
        return torch.ops.fxrpg.generate.default(generated.state, generated.scale, generated.view)
    link: Any = owner._fxrpg_link
    refuse_onnx_tracing()
    if traced_symbolically():
        raise FxrpgError(
            link.weights[attribute][0],
            "a generated weight must be read when the model runs",
            "torch.fx's symbolic tracer",
            "Trace the original model and transform the graph module.",
        )
    check_written(link.root)
    return Handle(generated, link.weights[attribute][0], link.root.__dict__[TRACE]).attached()


def subclass(name: str, base: Any, namespace: dict[str, Any]) -> Any:
    """A subclass that `base` does not hear of: some classes register their subclasses, or want arguments of them."""
    if not any("__init_subclass__" in vars(cls) for cls in base.__mro__[:-1]):
        return type(base)(name, (base,), namespace)
    cls = type(base)(name, (nn.Module,), namespace)
    cls.__bases__ = (base,)
    return cls


@functools.cache
def owner_class(base: Any, attributes: tuple[str, ...]) -> Any:
    """The subclass of `base` whose `attributes` are generated. One class per argument, so that compiled code is shared."""
    namespace: dict[str, Any] = {name: _property(name) for name in attributes}
    namespace |= {"_fxrpg_base": base, "_fxrpg_attributes": attributes, "__reduce_ex__": _reduce}
    # under the module's own name torch.fx keeps torch's layers as leaves
    namespace |= {"register_parameter": _register_parameter, "__module__": base.__module__}
    namespace["_save_to_state_dict"] = _save_to_state_dict
    if (stock := stock_layer(base)) and "weight" in attributes and {*attributes} <= {"weight", "bias"}:
        namespace["forward"] = _compilable_forward(base, LAYERS[stock])
    if issubclass(base, nn.RNNBase):
        namespace["_flat_weights"] = property(_flat_weights, lambda self, value: None)
        namespace["flatten_parameters"] = lambda self: None
    return subclass(f"Generated{base.__name__}", base, namespace)


def plain_class(module: nn.Module) -> Any:
    """The class that a module has without its generated weights."""
    return getattr(type(module), "_fxrpg_base", type(module))


def stock_layer(base: Any) -> Any:
    """The registered layer type whose forward `base` runs unchanged, if any."""
    if issubclass(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None  # attention's output projection: its forward never runs, its weight is handed to a function
    for stock in LAYERS:
        if issubclass(base, stock) and base.forward is stock.forward:
            inner = getattr(stock, "_conv_forward", None)
            return stock if getattr(base, "_conv_forward", None) is inner else None
    return None


def _property(name: str) -> property:
    def refuse(self: nn.Module, *_: Any) -> None:
        _register_parameter(self, name, None)

    return property(lambda self: read(self, name), refuse, refuse)


def _compilable_forward(base: Any, layer: Any) -> Any:
    """Under torch.compile a handle cannot be built: the stock layers call their lowered op directly."""

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and not compiled_elsewhere():
            return layer(self, generated_of(self, "weight"), *args, **kwargs)
        return base.forward(self, *args, **kwargs)

    return forward


def _register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
    """What `module.weight = nn.Parameter(...)` calls: a generated weight cannot be replaced."""
    cls: Any = type(self)
    if name in cls._fxrpg_attributes:
        full = generated_name(self, name)
        raise FxrpgError(
            full,
            "a generated weight is read-only: it is computed from the generator's state",
            "an attempt to replace it",
            f'Assign it before transforming, or leave the weight dense with Rule("{full}", "dense").',
        )
    cls._fxrpg_base.register_parameter(self, name, param)


def _save_to_state_dict(self: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """A state_dict holds states and no weights, also where the owner's own code writes its attributes into it one by one."""
    cls: Any = type(self)
    cls._fxrpg_base._save_to_state_dict(self, destination, prefix, keep_vars)
    link: Any = self._fxrpg_link
    for attribute, (_name, state, *_view) in link.weights.items():
        if isinstance(destination.get(prefix + attribute), Handle):
            del destination[prefix + attribute]
        own = state.rpartition(".")[2]
        held = self._parameters.get(own, self._buffers.get(own))
        if held is not None and prefix + own not in destination:
            destination[prefix + own] = held if keep_vars else held.detach()


def generated_name(owner: nn.Module, attribute: str) -> str:
    """The name under which the weight is planned."""
    link: Any = owner._fxrpg_link
    return link.weights[attribute][0]


def _flat_weights(self: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle and deepcopy by base class and attributes: the generated class has no name to import it by."""
    cls: Any = type(self)
    return _new_owner, (cls._fxrpg_base, cls._fxrpg_attributes), self.__getstate__()


def _new_owner(base: Any, attributes: tuple[str, ...]) -> nn.Module:
    cls = owner_class(base, attributes)
    return cls.__new__(cls)
