"""Put a plan and a state into a model, and take them out again: the step that `transform`, `load` and `materialize` share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from fxrpg.errors import FxrpgError
from fxrpg.handle import Trace
from fxrpg.lowering import generate_weight
from fxrpg.owner import DIGEST, SCALE, disown, link_of, own
from fxrpg.passes.pipeline import rewrite
from fxrpg.passes.restore import put_parameter, restore
from fxrpg.plan import Plan

_PLAN = "_fxrpg_plan"
_TRACE = "_fxrpg_trace"


def plan_of(model: nn.Module) -> Plan:
    """The plan of a transformed model. Raises FxrpgError for any other."""
    plan = model.__dict__.get(_PLAN)
    if plan is None:
        raise FxrpgError(type(model).__name__, "must be a transformed model", "an ordinary one", "Call fxrpg.transform first.")
    return plan


def trace_of(model: nn.Module) -> Trace:
    """What became of the model's weights when they were last consumed."""
    return model.__dict__[_TRACE]


def check_untransformed(model: nn.Module) -> None:
    """Raise FxrpgError if `model`, or a part of it, is transformed already."""
    for name, module in model.named_modules():
        if _PLAN in module.__dict__ or link_of(module) is not None:
            raise FxrpgError(
                name or type(model).__name__,
                "must not be transformed yet",
                "a module with generated weights",
                "Transform the original model, or call fxrpg.materialize first.",
            )


def copy_without(model: nn.Module, parameters: list[nn.Parameter]) -> nn.Module:
    """A deep copy of `model` in which `parameters`, soon to be generated, are empty stand-ins on the meta device."""
    stand_ins: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in parameters
    }
    return copy.deepcopy(model, stand_ins)


def owners_of(model: nn.Module, plan: Plan) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, owner, attribute) for every place where a planned weight stands in `model`."""
    for name, aliases in plan.names.items():
        for alias in aliases:
            path, _, attribute = alias.rpartition(".")
            yield name, model.get_submodule(path), attribute


def assemble(root: nn.Module, plan: Plan, state: Tensor, scale: Tensor, strict: bool) -> None:
    """Make `root`, whose planned parameters are still in place, generate them from `state` and `scale` (float32).

    The state becomes a parameter of the root, scales (as bit patterns, which no cast of the model rounds) and the plan's
    digest persistent buffers.
    """
    root.register_parameter(plan.generator.state_name, nn.Parameter(state))
    root.register_buffer(SCALE, scale.to(torch.float32).view(torch.int32))
    digest = torch.frombuffer(bytearray.fromhex(plan.digest()), dtype=torch.uint8)
    root.register_buffer(DIGEST, digest.to(scale.device))
    root.__dict__[_PLAN], root.__dict__[_TRACE] = plan, Trace(strict)
    root.register_load_state_dict_pre_hook(_check_digest)
    if isinstance(root, fx.GraphModule):
        root.__class__ = graph_class(_named_class(root))
        rewrite(root, plan, root.__dict__[_TRACE])
    else:
        own(root, ((name, owner, a, plan.views[name]) for name, owner, a in owners_of(root, plan)), root.__dict__[_TRACE])


def disassemble(root: nn.Module) -> None:
    """Turn a transformed `root` into an ordinary module with full weights under their original names, in place."""
    plan = plan_of(root)
    state, scale = getattr(root, plan.generator.state_name).detach(), root.get_buffer(SCALE)
    weights = {name: nn.Parameter(generate_weight(state, scale, view.text)) for name, view in plan.views.items()}
    owned: dict[int, tuple[nn.Module, dict[str, nn.Parameter]]] = {}
    for name, owner, attribute in _owners_left(root, plan):
        owned.setdefault(id(owner), (owner, {}))[1][attribute] = weights[name]
    for owner, parameters in owned.values():
        disown(owner, parameters)
    if isinstance(root, fx.GraphModule):
        for name, aliases in plan.names.items():
            for alias in aliases:
                put_parameter(root, alias, weights[name])
        restore({view.tensor: name for name, view in plan.views.items()})(root)
        root.__class__ = type("GraphModuleImpl", (type(root)._fxrpg_base,), {})
        root.recompile()
    del root._parameters[plan.generator.state_name], root._buffers[SCALE], root._buffers[DIGEST]
    del root.__dict__[_PLAN], root.__dict__[_TRACE]
    for key, hook in list(root._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", hook) is _check_digest:
            del root._load_state_dict_pre_hooks[key]


def _owners_left(root: nn.Module, plan: Plan) -> Iterator[tuple[str, nn.Module, str]]:
    """The owners that still have a link (a copied graph module keeps only what its graph calls)."""
    for module in root.modules():
        if link := link_of(module):
            for attribute, (name, *_view) in link.weights.items():
                yield name, module, attribute


def _check_digest(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any
) -> None:
    """Before a state_dict is loaded: refuse one that belongs to another seed, plan or implementation."""
    found = state_dict.get(prefix + DIGEST)
    expected = plan_of(module).digest()
    if found is not None and found.device.type != "meta" and bytes(found.cpu().tolist()).hex() != expected:
        raise FxrpgError(
            f"load_state_dict, {prefix + DIGEST}",
            f"the state must belong to this model's seed and plan (digest {expected[:12]}...)",
            f"digest {bytes(found.cpu().tolist()).hex()[:12]}...",
            "Transform the model with the seed, dof, method and plan that the state was trained with.",
        )


def _named_class(gm: fx.GraphModule) -> type[fx.GraphModule]:
    """The class of a graph module without the one that torch makes for each instance."""
    return next(cls for cls in type(gm).__mro__ if cls.__qualname__.split(".")[-1] != "GraphModuleImpl")


@functools.cache
def _graph_class(base: type[fx.GraphModule]) -> type[fx.GraphModule]:
    """A graph module that keeps its plan when it is copied or pickled (torch's own keeps what the graph mentions)."""
    namespace = {"_fxrpg_base": base, "__deepcopy__": _deepcopy_graph, "__reduce__": _reduce_graph}
    return type(base)(f"Generated{base.__name__}", (base,), namespace)


def graph_class(base: type[fx.GraphModule]) -> type[fx.GraphModule]:
    """A class of its own for one transformed instance of `base`: torch sets `forward` on the class."""
    return type(base)("GraphModuleImpl", (_graph_class(base),), {})


def _deepcopy_graph(self: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
    result = type(self)._fxrpg_base.__deepcopy__(self, memo)
    return _carry(result, copy.deepcopy(_carried(self), memo))


def _reduce_graph(self: fx.GraphModule) -> tuple[Any, ...]:
    function, arguments = type(self)._fxrpg_base.__reduce__(self)[:2]
    return _revive_graph, (type(self)._fxrpg_base, function, arguments, _carried(self))


def _revive_graph(base: type[fx.GraphModule], function: Any, arguments: tuple, carried: dict[str, Any]) -> fx.GraphModule:
    result = function(*arguments)
    result.__class__ = graph_class(base)
    result.recompile()
    return _carry(result, carried)


def _carried(gm: fx.GraphModule) -> dict[str, Any]:
    hooks = {key: value for key, value in gm.__dict__.items() if key in (_PLAN, _TRACE)}
    return {"attributes": hooks, "digest": gm.get_buffer(DIGEST), "training": gm.training}


def _carry(gm: fx.GraphModule, carried: dict[str, Any]) -> fx.GraphModule:
    gm.__dict__.update(carried["attributes"])
    gm.register_buffer(DIGEST, carried["digest"])
    for module in gm.modules():
        if link := link_of(module):
            link.root = gm
    if not any(getattr(hook, "hook", hook) is _check_digest for hook in gm._load_state_dict_pre_hooks.values()):
        gm.register_load_state_dict_pre_hook(_check_digest)
    return gm
