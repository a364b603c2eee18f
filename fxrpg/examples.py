"""Roles of parameters whose owners tell nothing, from the functions that consume them when the model runs on examples."""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxrpg.assemble import copy_module
from fxrpg.functions import rearrangement
from fxrpg.lowering import DECOMPOSITIONS, LOWERINGS
from fxrpg.proof import kept_randomness
from fxrpg.recipes import storage_of
from fxrpg.region_search import Arguments, record
from fxrpg.roles import Role, parametrized_layers, role_of


def example_roles(model: nn.Module, examples: Arguments | None) -> dict[str, Role]:
    """Name -> role of parameters that the model, run on `examples` in both modes, hands to functions as their weights.

    Only of those that their owner's class does not explain: raw parameters, the tensors of a mixture's experts. A slice,
    a transpose, a reshape or a cast of one counts as itself. All runs are of a copy.

    Raises:
        FxrpgError: the model does not run on the examples in eval mode.
    """
    unknown = {name for name, parameter in _unexplained(model)}
    if examples is None or not unknown:
        return {}
    copy = copy_module(model)
    watcher = _Watcher({name: p for name, p in copy.named_parameters() if name in unknown})
    with kept_randomness(), watcher:
        record(copy, [], examples)
    return watcher.roles


def _unexplained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    holders = {id(holder): layer for holder, layer in parametrized_layers(model)}
    found = []
    for path, module in model.named_modules():
        for attribute, p in module._parameters.items():
            if p is None or p.dim() < 2 or not p.requires_grad or not p.is_floating_point():
                continue
            if role_of(holders.get(id(module), module), attribute, tuple(p.shape)) is None:
                found.append((f"{path}.{attribute}" if path else attribute, p))
    return found


class _Watcher(TorchFunctionMode):
    """Looks at every call of a torch function for the watched parameters, which it knows by their storage."""

    def __init__(self, watched: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.roles: dict[str, Role] = {}
        self.watched = watched
        self.names = {storage_of(p): name for name, p in watched.items()}
        self.copies: list[Tensor] = []  # kept, so that nothing else gets their storage

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DECOMPOSITIONS and isinstance(func, FunctionType):
            with self:  # its own code, whose calls are seen one by one
                return DECOMPOSITIONS[func](*args, **kwargs)
        used = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and self._name(x)]
        if used:
            self._consumed(func, args, kwargs)
        out = func(*args, **kwargs)
        if used and type(out) in (Tensor, nn.Parameter) and self._copied(func, args, kwargs, out, used[0]):
            self.copies.append(out)
            self.names[storage_of(out)] = str(self._name(used[0]))
        return out

    def _name(self, tensor: Tensor) -> str | None:
        plain = (
            tensor.layout == torch.strided
            and not tensor.is_meta
            and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        )
        return self.names.get(storage_of(tensor)) if plain else None  # within a vmap, a wrapper has no storage

    def _consumed(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        for rule in LOWERINGS.get(func, ()):  # both factors of a product may be parameters
            weight = rule.weight_in(args, kwargs)
            name = self._name(weight) if isinstance(weight, Tensor) else None
            if rule.role and name and (role := rule.role(tuple(weight.shape), False, *args)):
                self.roles.setdefault(name, _role_of_whole(role, weight, self.watched[name]))

    def _copied(self, func: Any, args: Any, kwargs: dict[str, Any], out: Tensor, source: Tensor) -> bool:
        """Whether a function made a copy that still lies as the parameter does: a cast, or rows picked from a stack."""
        if self._name(out) or not args or args[0] is not source:
            return False
        picked = func in (Tensor.__getitem__, torch.index_select) and source.dim() > 2
        if picked:
            return out.stride()[-source.dim() + 1 :] == source.stride()[1:]
        return rearrangement(func, args[1:], kwargs, source.device) is not None and out.stride() == source.stride()


def _role_of_whole(role: Role, alias: Tensor, parameter: Tensor) -> Role:
    """The role of a parameter of which an alias has `role`: an axis is known by its stride, one that is gone only counts."""
    if (alias.shape, alias.stride()) == (parameter.shape, parameter.stride()):
        return role
    axes: dict[int, list[int]] = {}
    gone = []
    for axis, (n, stride) in enumerate(zip(parameter.shape, parameter.stride(), strict=True)):
        spans = enumerate(zip(alias.shape, alias.stride(), strict=True))
        place = next((j for j, (m, step) in spans if n > 1 and m > 1 and step <= stride < step * m), None)
        if place is None:
            gone.append(axis)
        else:
            axes.setdefault(place, []).append(axis)
    outputs = sum(len(axes.get(j, ())) for j in role.order[: role.stack + 1])
    order = (*gone, *(axis for j in role.order for axis in axes.get(j, ())))
    return Role(role.kind, order, role.std, max(0, min(len(gone) + outputs - 1, len(order) - 2)))
