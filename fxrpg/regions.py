"""Regions: the calls of a module that a proved graph answers, and the guards that send every other call to the module.

A region is a subclass of its module's class (`isinstance` holds) whose `forward` runs the graph's code on the live module:
it holds no copy of a parameter, registers nothing, and what it does not know for sure it leaves to the module.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxrpg.dispatch import choices
from fxrpg.folding import Norm, hooked, is_fixed, run_after, run_fixed
from fxrpg.lowering import LAYERS, current_mode, transforming
from fxrpg.owner import TRACE, generated_of, link_of, plain_class, stock_layer, subclass

REGION = "_fxrpg_region"


@dataclass(frozen=True)
class Call:
    """How a module was called: the tensors go into a graph, the rest is part of it.

    Args:
        structure: of (args, kwargs).
        leaves: for each leaf (dimensions, dtype) of a tensor, or a constant.
    """

    structure: pytree.TreeSpec
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Call, list[Tensor]]:
        """The call, and its tensors."""
        leaves, structure = pytree.tree_flatten((args, dict(kwargs)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        shown = [_Kind(x.dim(), x.dtype, type(x)) if isinstance(x, Tensor) else frozen(x) for x in leaves]
        return cls(structure, tuple(shown)), tensors

    def arguments(self, leaves: list[Any], tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with `tensors` in the place of those among `leaves`."""
        fresh = iter(tensors)
        return pytree.tree_unflatten([next(fresh) if isinstance(x, Tensor) else x for x in leaves], self.structure)


@dataclass(frozen=True)
class _Kind:
    dims: int
    dtype: torch.dtype
    cls: type


class Unknown(Exception):
    """A value that a graph cannot be guarded on; the text says which."""


def frozen(value: Any) -> Any:
    """A copy of a constant, to compare it with what is there later. Raises Unknown for a value that could change unseen."""
    if isinstance(value, list | tuple) and type(value).__eq__ in (list.__eq__, tuple.__eq__):
        return type(value), tuple(frozen(item) for item in value)
    if type(value) is dict:
        return dict, tuple((frozen(key), frozen(item)) for key, item in value.items())
    if isinstance(value, _ATOMS):
        return type(value), value
    if isinstance(value, nn.Module):
        return value
    raise Unknown(f"a {type(value).__name__}, which may change unseen")


_ATOMS = (
    bool, int, float, complex, str, bytes, type(None), type, FunctionType, BuiltinFunctionType, torch.dtype, torch.device,
    torch.layout, torch.memory_format, type(...), slice,
)  # fmt: skip


def seen(module: nn.Module, name: str) -> Any:
    """What code finds under a name of a module, to compare it with what is there later; of a tensor only that it is one.

    Raises Unknown for a value that could change unseen.
    """
    own = vars(module)
    if name in own:
        return "own", frozen(own[name])
    value = getattr(type(module), name, own)
    if value is not own:  # methods and properties run, so what they read is seen by itself
        return "class", value if hasattr(type(value), "__get__") else frozen(value)
    for tensors in (module._parameters, module._buffers):
        if name in tensors:
            return "none" if tensors[name] is None else "tensor"
    return "nothing"


@dataclass(frozen=True, eq=False)
class Part:
    """A module of which the traced code could see something, and all that it could see of it but tensors.

    Args:
        training: the mode of a module whose code was traced through; None for one that was only looked at.
    """

    module: nn.Module
    cls: type
    training: bool | None
    children: tuple[tuple[str, nn.Module | None], ...]
    attributes: tuple[tuple[str, Any], ...]

    def unchanged(self, root: nn.Module) -> bool:
        """Whether the code would see the same now, and nothing looks on that the graph would pass by."""
        module, run = self.module, self.training is not None
        if type(module) is not self.cls or tuple(module._modules.items()) != self.children:
            return False
        try:
            same = all(seen(module, name) == value for name, value in self.attributes)
        except Unknown:
            return False
        if not same or (run and module.training is not self.training):
            return False
        return not run or module is root or not hooked(module)  # a root's own hooks run around its forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        module, children = copy.deepcopy(self.module, memo), copy.deepcopy(self.children, memo)
        return Part(module, self.cls, self.training, children, _copied(self.attributes, memo))


@dataclass(frozen=True, eq=False)
class Traced:
    """A module's graph in one mode, for one form of call.

    Args:
        call: the form of call.
        parts: the modules that were traced through; the first is the root.
        code: (root, *tensors) -> output, the graph's code.
    """

    call: Call
    parts: tuple[Part, ...]
    code: Callable[..., Any]

    def answers(self, root: nn.Module, call: Call) -> bool:
        """Whether the graph stands for this call of `root`, as everything is now."""
        return self.parts[0].module is root and self.call == call and all(part.unchanged(root) for part in self.parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> Traced:
        return Traced(self.call, copy.deepcopy(self.parts, memo), self.code)


def _copied(attributes: tuple[tuple[str, Any], ...], memo: dict[int, Any]) -> tuple[tuple[str, Any], ...]:
    """Attributes for the copy of a module: values compare by content, but for modules, which the copy has of its own."""
    return tuple((name, copy.deepcopy(value, memo) if holds_module(value) else value) for name, value in attributes)


def holds_module(value: Any) -> bool:
    """Whether a frozen value refers to modules, of which every copy of a model has its own."""
    return isinstance(value, nn.Module) or (isinstance(value, tuple) and any(map(holds_module, value)))


@dataclass(frozen=True, eq=False)
class Region:
    """The graphs of one module. Deepcopy follows its references; a pickle drops them, and the module path is left."""

    graphs: tuple[Traced, ...]

    def __reduce__(self) -> Any:
        return _no_region, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        return Region(tuple(copy.deepcopy(graph, memo) for graph in self.graphs))


def _no_region() -> None:
    return None


def install(module: nn.Module, region: Region) -> None:
    """Have `module` answer calls by `region` where its guards hold."""
    base: Any = type(module)
    object.__setattr__(module, "__class__", region_class(base))
    module.__dict__[REGION] = region


def uninstall(module: nn.Module) -> None:
    """Undo `install`."""
    if REGION in module.__dict__:
        del module.__dict__[REGION]
        object.__setattr__(module, "__class__", plain_class(module))


@functools.cache
def region_class(base: Any) -> Any:
    """The subclass of `base` whose calls a region may answer."""

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            found = answering(self, args, kwargs)
            if found is not None:
                code, tensors = found
                return code(self, *tensors)
        return base.forward(self, *args, **kwargs)

    namespace = {"forward": forward, "_fxrpg_base": base, "__reduce_ex__": _reduce, "__module__": base.__module__}
    return subclass(f"Region{base.__name__}", base, namespace)


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle and deepcopy by base class: the generated class has no name to import it by."""
    return _new_region, (plain_class(self),), self.__getstate__()


def _new_region(base: Any) -> nn.Module:
    cls: Any = region_class(base)
    return cls.__new__(cls)


def answering(module: nn.Module, args: Any, kwargs: Any) -> tuple[Callable[..., Any], list[Tensor]] | None:
    """The code that answers a call, and its tensors; None where the module has to."""
    region = module.__dict__.get(REGION)
    if region is None or transforming() or current_mode() == "materialized" or torch._C._get_tracing_state():
        return None
    if nn.modules.module._has_any_global_hook():
        return None
    try:
        call, tensors = Call.of(args, kwargs)
    except Unknown:
        return None
    for graph in region.graphs:
        if graph.answers(module, call):
            return graph.code, tensors
    return None


def layer_epilogue(layer: nn.Module, norm: Norm, activation: nn.Module | str, x: Tensor, label: str) -> Tensor:
    """One node of a region: `activation(norm(layer(x)))`, as one op where that gives the same. See `folding.run_layers`.

    The modules decide when it runs: a layer that is not torch's own by then, or does not generate its weight, is called.
    `label` is what `explain` shows.
    """
    cls: Any = type(layer)
    stock, link = _stock(cls), link_of(layer)
    if stock is not None and link is not None and set(link.weights) == {"weight"} and not hooked(layer):
        weight = generated_of(layer, "weight")
        plain = type(x) in (Tensor, nn.Parameter)
        if plain and is_fixed(norm, activation, (x, weight.state, layer.bias)):
            base, args = LAYERS[stock](layer, weight._replace(state=_Asked(weight.state)), x)
            with choices() as seen:
                out = run_fixed(base, args, norm, activation)
            path, reason = (seen[0].path, seen[0].reason) if seen else ("staged", "")
            link.root.__dict__[TRACE].note(link.weights["weight"][0], path, label, reason, way="region")
            return out
    return run_after(layer(x), norm, activation)


@functools.cache
def _stock(cls: Any) -> Any:
    return stock_layer(getattr(cls, "_fxrpg_base", cls))


class _Asked:
    """Stands for the state while a layer says which op it runs: the op does not run, it and its arguments come back."""

    def __init__(self, state: Tensor) -> None:
        self.state = state

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func, tuple(arg.state if isinstance(arg, _Asked) else arg for arg in args)
