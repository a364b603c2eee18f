"""Put a plan and a state into a model, and take them out again: the step that `transform`, `load` and `materialize` share."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxrpg.digest import DIGEST, PLAN, encode_digest, unwatch_loading, watch_loading
from fxrpg.epilogue import register_epilogue_flops
from fxrpg.errors import FxrpgError
from fxrpg.functions import METADATA, REQUIRES_GRAD
from fxrpg.optimizers import watch_optimizers
from fxrpg.owner import (
    LINK,
    SCALE,
    TRACE,
    disown,
    link_of,
    own,
    owned,
    tensor_at,
)
from fxrpg.passes.graph_module import adopt, release
from fxrpg.passes.pipeline import rewrite
from fxrpg.passes.restore import put_parameter, restore
from fxrpg.plan import Plan
from fxrpg.regions import uninstall
from fxrpg.shares import is_sharded, whole
from fxrpg.staging import register_flops
from fxrpg.ties import tie_again, untie
from fxrpg.trace import Trace
from fxrpg.view import View
from fxrpg.weights import encode_scales, generate_weight


def plan_of(model: nn.Module) -> Plan:
    """The plan of a transformed model. Raises FxrpgError for any other."""
    plan = getattr(model, "__dict__", {}).get(PLAN)
    if plan is None:
        compiled = hasattr(model, "_orig_mod")
        found = "a compiled one" if compiled else "an ordinary one" if isinstance(model, nn.Module) else "no module"
        fix = "Pass the model that was given to torch.compile." if compiled else "Call fxrpg.transform first."
        raise FxrpgError(type(model).__name__, "must be a transformed model", found, fix)
    return plan


def trace_of(model: nn.Module) -> Trace:
    """What became of the model's weights when they were last consumed."""
    return model.__dict__[TRACE]


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The full weight called `name` of a transformed model, without autograd."""
    plan = plan_of(model)
    state = whole(tensor_at(model, plan.state_of(name))).detach()
    return generate_weight(state, model.get_buffer(SCALE), plan.views[name].text)


def views_in(model: nn.Module) -> dict[str, View]:
    """name -> view of the weights that a transformed `model` still has: surgery may have taken owners out."""
    plan = plan_of(model)
    if isinstance(model, fx.GraphModule):
        return plan.views
    left = {name for name, _owner, _attribute in owned(model)}
    return {name: view for name, view in plan.views.items() if name in left}


def states_in(model: nn.Module) -> dict[str, list[str]]:
    """`Plan.states` without the states of weights whose owners surgery took out, which went with them."""
    plan, left = plan_of(model), views_in(model)
    return {
        s: names for s, names in plan.states.items() if names[0] in left or not plan.scope(names[0]).generator.local
    }


def check_untransformed(model: nn.Module) -> None:
    """Raise FxrpgError if `model`, or a part of it, is transformed already."""
    for name, module in model.named_modules():
        if PLAN in module.__dict__ or link_of(module) is not None:
            raise FxrpgError(
                name or type(model).__name__,
                "must not be transformed yet",
                "a module with generated weights",
                "Transform the original model, or call fxrpg.materialize first.",
            )


class StandIn(nn.Parameter):
    """What takes a planned parameter's place in a copy until its owners generate it: shape and type, no values.

    A reference that nobody rewrites (a parameter kept in a plain list, say) would compute with uninitialised memory: any op
    on a stand-in raises.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METADATA or func is Tensor.__deepcopy__ or func in REQUIRES_GRAD or func is Tensor.requires_grad_:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise FxrpgError(
            f"a parameter of shape {tuple(args[0].shape) if args and isinstance(args[0], StandIn) else '?'}",
            "a generated weight must be read from the module that owns it, when it is used",
            "a reference kept elsewhere (a list, a closure, another object)",
            'Read it from its owner, or leave it dense with a Rule(name, "dense").',
        )


def copy_without(model: nn.Module, parameters: list[nn.Parameter]) -> nn.Module:
    """A deep copy of `model` in which `parameters`, soon to be generated, are stand-ins without values."""
    stand_ins: dict[int, Any] = {}
    for p in parameters:
        empty = torch.empty_like(p, device="meta")
        stand_ins[id(p)] = torch.Tensor._make_subclass(StandIn, empty, p.requires_grad)
    return copy_module(model, stand_ins)


def copy_module(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy, also of a module that keeps computed tensors as attributes (an old-style weight_norm's weight)."""
    memo = {} if memo is None else memo
    _check_whole(model)
    for module in model.modules():
        for value in pytree.tree_leaves(dict(vars(module))):  # also those in lists and dicts
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def _check_whole(model: nn.Module) -> None:
    """No verb makes a new model from pieces that lie on several ranks."""
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            fix = "Call fxrpg.save on every rank, and fxrpg.load in one process; or use the model from before."
            raise FxrpgError(
                name, "must be whole for a new model to be made from it", "a piece of it on this rank", fix
            )


def owners_of(model: nn.Module, plan: Plan) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, owner, attribute) for every place where a planned weight stands in `model`."""
    for name, aliases in plan.names.items():
        for alias in aliases:
            path, _, attribute = alias.rpartition(".")
            yield name, model.get_submodule(path), attribute


def assemble(
    root: nn.Module,
    plan: Plan,
    states: Mapping[str, Tensor],
    scale: Tensor,
    strict: bool,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Make `root`, whose planned parameters are still in place, generate them from `states` and `scale` (float32, on the CPU).

    States become parameters (frozen ones buffers) under the names that the plan gives them, scales and the plan's digest
    persistent buffers of the root, both in small integers that survive any cast of the model. `dtype`, the type of the
    buffer of scales, is that of weights whose state is frozen.
    """
    register_flops()
    register_epilogue_flops()
    watch_optimizers()
    device = next(iter(states.values())).device
    untie(root, [alias for aliases in plan.names.values() for alias in aliases])  # before there are names of states
    for name, state in states.items():
        put_state(root, name, state)
    root.register_buffer(SCALE, encode_scales(scale).to(device, dtype))
    root.register_buffer(DIGEST, encode_digest(plan.digest()).to(device))
    root.__dict__[PLAN], root.__dict__[TRACE] = plan, Trace(strict)
    watch_loading(root)
    if isinstance(root, fx.GraphModule):
        adopt(root)
        rewrite(root, plan, root.__dict__[TRACE])
    else:
        own(root, plan, owners_of(root, plan), root.__dict__[TRACE])


def put_state(root: nn.Module, name: str, state: Tensor) -> None:
    """Register a state under its dotted name: a parameter, or a buffer for one that is frozen."""
    path, _, attribute = name.rpartition(".")
    holder = root.get_submodule(path)
    if hasattr(holder, attribute):
        fix = "Rename it."
        raise FxrpgError(name, "must be free for the generator's state", "an attribute of the model", fix)
    if state.is_floating_point():
        holder.register_parameter(attribute, nn.Parameter(state))
    else:
        holder.register_buffer(attribute, state)


def take_state(root: nn.Module, name: str) -> None:
    """Undo `put_state`."""
    path, _, attribute = name.rpartition(".")
    holder = root.get_submodule(path)
    holder._parameters.pop(attribute, None)
    holder._buffers.pop(attribute, None)


def replan(root: nn.Module, plan: Plan) -> None:
    """Have a transformed `root` follow another plan for the same weights, whose states it holds already."""
    before = plan_of(root)
    root.__dict__[PLAN] = plan
    root.register_buffer(DIGEST, encode_digest(plan.digest()).to(root.get_buffer(DIGEST).device))
    for name, owner, attribute in owned(root):
        view = plan.views[name]
        owner.__dict__[LINK].weights[attribute] = name, plan.state_of(name), view.text, view.shape
    if isinstance(root, fx.GraphModule):
        renamed = {before.state_of(name): plan.state_of(name) for name in plan.views}
        texts = {before.views[name].text: plan.views[name].text for name in plan.views}
        for node in root.graph.nodes:
            if node.op == "get_attr":
                node.target = renamed.get(node.target, node.target)
            node.args = tuple(texts.get(a, a) if isinstance(a, str) else a for a in node.args)
        root.recompile()


def disassemble(root: nn.Module) -> None:
    """Turn a transformed `root` into an ordinary module with full weights under their original names, in place."""
    plan = plan_of(root)
    weights = {name: nn.Parameter(weight_of(root, name)) for name in views_in(root)}
    for name in states_in(root):
        take_state(root, name)
    taken: dict[int, tuple[nn.Module, dict[str, nn.Parameter]]] = {}
    for name, owner, attribute in owned(root):
        taken.setdefault(id(owner), (owner, {}))[1][attribute] = weights[name]
    for owner, parameters in taken.values():
        disown(owner, parameters)
    tie_again(root)
    for module in root.modules():
        uninstall(module)
    if isinstance(root, fx.GraphModule):
        for name, aliases in plan.names.items():
            for alias in aliases:
                put_parameter(root, alias, weights[name])
        restore({view.tensor: name for name, view in plan.views.items()})(root)
        release(root)
    del root._buffers[SCALE], root._buffers[DIGEST]
    del root.__dict__[PLAN], root.__dict__[TRACE]
    unwatch_loading(root)
