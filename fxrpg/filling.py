"""Put the dense tensors of a file into a model of the architecture that was saved, once it is clear that it is that."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from fxrpg.errors import FxrpgError
from fxrpg.header import Contents, shown
from fxrpg.plan import Plan


def check_parameters(model: nn.Module, path: Any, plan: Plan) -> dict[str, nn.Parameter]:
    """All parameters of `model` by name, once it is clear that the planned ones are those of the file."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            fix = "Run one forward pass, which initialises lazy modules, then load."
            raise _other_model(path, f"{shown(name)} must be initialised", "a lazy one", fix)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names_of: dict[int, set[str]] = {}
    for name, parameter in parameters.items():
        names_of.setdefault(id(parameter), set()).add(name)
    for name, view in plan.views.items():
        for alias in plan.names[name]:
            if alias not in parameters:
                raise _other_model(path, f"the model must have the parameter {shown(alias)}", "none")
            if tuple(parameters[alias].shape) != view.whole.shape:
                must = f"{shown(alias)} must have shape {view.whole.shape}"
                raise _other_model(path, must, str(tuple(parameters[alias].shape)))
        if (tied := names_of[id(parameters[name])]) != set(plan.names[name]):
            must = f"one parameter must have just the names {shown(sorted(plan.names[name]))}"
            raise _other_model(path, must, shown(sorted(tied)))
    return parameters


def fill(model: nn.Module, contents: Contents, path: Any, own: set[str]) -> None:
    """Put the file's dense tensors into a freshly assembled model, in the file's types, ties kept."""
    current = model.state_dict(keep_vars=True)
    source = {name: name for name in contents.tensors if name not in own} | contents.fields["aliases"]
    for name in sorted((current.keys() - own) ^ source.keys()):
        side = "the file has none" if name in current else "the model has none"
        raise _other_model(path, f"model and file must both hold the dense tensor {shown(name)}", side)
    _check_ties(path, {name: current[name] for name in source if isinstance(current[name], nn.Parameter)}, source)
    state = OrderedDict((name, current[name]) for name in current if name in own)
    made: dict[tuple[str, bool], Tensor] = {}
    for name in source:
        key = source[name], isinstance(current[name], nn.Parameter)
        if key not in made:
            made[key] = _in_place_of(current[name], contents.tensors[source[name]], name, path)
        state[name] = made[key]
    state._metadata = getattr(current, "_metadata", None)  # type: ignore[attr-defined]
    try:  # past a load_state_dict of the user's own, which may not know `assign`
        nn.Module.load_state_dict(model, state, assign=True)
    except RuntimeError as e:
        raise _other_model(path, "the model must take the file's tensors", str(e)) from None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in contents.fields["frozen"]:
        if name in parameters:
            parameters[name].requires_grad_(False)
    for name, tensor in (*model.named_buffers(), *parameters.items()):
        if tensor.is_meta:
            fix = "Build the model on a real device: the buffer is not part of its state_dict, so no file holds it."
            raise _other_model(path, f"{shown(name)} must have values", "a tensor on the meta device", fix)


def _check_ties(path: Any, parameters: dict[str, nn.Parameter], source: dict[str, str]) -> None:
    """Two names must be one parameter in the model where they are one tensor in the file, and nowhere else."""
    first_of: dict[Any, str] = {}
    for name, parameter in parameters.items():
        for other in (first_of.setdefault(id(parameter), name), first_of.setdefault(source[name], name)):
            if (source[other] == source[name]) != (parameters[other] is parameter):
                found = "two in the " + ("model" if source[other] == source[name] else "file")
                must = f"{shown(other)} and {shown(name)} must be one parameter in both model and file"
                raise _other_model(path, must, found)


def _in_place_of(old: Any, new: Tensor, name: str, path: Any) -> Tensor:
    """`new` as the model holds `old`: on its device, in its memory format, a parameter if it is one."""
    if name.rpartition(".")[2] == "_extra_state":
        return new  # what the module's own get_extra_state gave
    if old.shape != new.shape:
        raise _other_model(path, f"{shown(name)} must have shape {tuple(new.shape)}", str(tuple(old.shape)))
    if (old.is_floating_point(), old.is_complex()) != (new.is_floating_point(), new.is_complex()):
        raise _other_model(path, f"{shown(name)} must be of a type like {new.dtype}", str(old.dtype))
    device = torch.device("cpu") if old.is_meta else old.device
    placed = torch.empty_like(old, dtype=new.dtype, device=device).copy_(new)
    return nn.Parameter(placed, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else placed


def _other_model(path: Any, must: str, found: str, fix: str = "") -> FxrpgError:
    return FxrpgError(f"load, {path}", must, found, fix or "Pass a model of the architecture that was saved.")
