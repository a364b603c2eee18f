"""Put a plan and a state into a model, and take them out again: the step that `transform`, `load` and `materialize` share."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from fxrpg.errors import FxrpgError
from fxrpg.handle import Trace
from fxrpg.lowering import generate_weight
from fxrpg.owner import DIGEST, PLAN, SCALE, TRACE, disown, link_of, own, unwatch_loading, watch_loading
from fxrpg.passes.graph_module import adopt, release
from fxrpg.passes.pipeline import rewrite
from fxrpg.passes.restore import put_parameter, restore
from fxrpg.plan import Plan


def plan_of(model: nn.Module) -> Plan:
    """The plan of a transformed model. Raises FxrpgError for any other."""
    plan = model.__dict__.get(PLAN)
    if plan is None:
        raise FxrpgError(
            type(model).__name__, "must be a transformed model", "an ordinary one", "Call fxrpg.transform first."
        )
    return plan


def trace_of(model: nn.Module) -> Trace:
    """What became of the model's weights when they were last consumed."""
    return model.__dict__[TRACE]


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
    root.__dict__[PLAN], root.__dict__[TRACE] = plan, Trace(strict)
    watch_loading(root)
    if isinstance(root, fx.GraphModule):
        adopt(root)
        rewrite(root, plan, root.__dict__[TRACE])
    else:
        own(
            root,
            ((name, owner, a, plan.views[name]) for name, owner, a in owners_of(root, plan)),
            root.__dict__[TRACE],
        )


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
        release(root)
    del root._parameters[plan.generator.state_name], root._buffers[SCALE], root._buffers[DIGEST]
    del root.__dict__[PLAN], root.__dict__[TRACE]
    unwatch_loading(root)


def _owners_left(root: nn.Module, plan: Plan) -> Iterator[tuple[str, nn.Module, str]]:
    """The owners that still have a link (a copied graph module keeps only what its graph calls)."""
    for module in root.modules():
        if link := link_of(module):
            for attribute, (name, *_view) in link.weights.items():
                yield name, module, attribute
