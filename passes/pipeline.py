"""The order of the passes, and the roles that weights have in a graph whose layers are only ops."""

from __future__ import annotations

import torch
import torch.fx as fx
from torch import nn
from torch.fx.passes.infra.pass_manager import PassManager

from fxrpg.epilogue import EPILOGUES
from fxrpg.folding import epilogue_of_norm
from fxrpg.handle import handle_of
from fxrpg.lowering import Rule
from fxrpg.passes.epilogue import fuse_epilogues
from fxrpg.passes.lower import GENERATE, OP, REASONS, lower, rule_of, transposes_matrix
from fxrpg.passes.normalise import normalise
from fxrpg.passes.parametrize import parametrize
from fxrpg.passes.strip import strip
from fxrpg.plan import Plan
from fxrpg.roles import Role, bias_role
from fxrpg.staging import DENSE_OPS
from fxrpg.trace import Trace


def graph_roles(gm: fx.GraphModule) -> dict[str, Role]:
    """The roles of parameters that the graph itself consumes as weights: name -> role.

    In an exported graph the layers' classes are gone, but there the graph is the model, and its ops say what a weight is.
    """
    roles: dict[str, Role] = {}
    for read in gm.graph.find_nodes(op="get_attr"):
        parameter = _parameter(gm, read.target)
        if parameter is None:
            continue
        turned = [user for user in read.users if parameter.dim() == 2 and transposes_matrix(user)]
        for weight, transposed in [(read, False), *((node, True) for node in turned)]:
            for call in weight.users:
                rule = rule_of(call, weight)
                if rule and rule.role and call.args[rule.position : rule.position + 1] == (weight,):
                    role = rule.role(tuple(parameter.shape), transposed, *call.args)
                    if role is None:
                        continue
                    roles.setdefault(read.target, role)
                    if bias := _bias_read(call, rule):
                        roles.setdefault(bias, bias_role(role.std))
    return roles


def _bias_read(call: fx.Node, rule: Rule) -> str | None:
    """The name of the parameter that a call takes as its bias."""
    place = rule.bias_position
    bias = call.args[place] if place is not None and len(call.args) > place else call.kwargs.get(rule.bias)
    return str(bias.target) if isinstance(bias, fx.Node) and bias.op == "get_attr" else None


def _parameter(gm: fx.GraphModule, name: str) -> nn.Parameter | None:
    path, _, attribute = name.rpartition(".")
    return gm.get_submodule(path)._parameters.get(attribute)


def rewrite(gm: fx.GraphModule, plan: Plan, trace: Trace) -> None:
    """Rewrite the graph of `gm`, which holds the state already, in place."""
    PassManager(passes=[normalise(plan), parametrize(plan), lower, fuse_epilogues, strip(plan, trace)])(gm)
    names = {view.text: name for name, view in plan.views.items()}
    for node in gm.graph.nodes:
        if node.target is GENERATE:
            for user in node.users:
                trace.note(names[node.args[2]], "staged", user.meta[OP], way="graph")
        elif view := view_of(node):
            trace.note(names[view], "staged", node.meta[OP], way="graph")
        elif node.target is handle_of:
            for op, reason in node.meta[REASONS].items():
                trace.note(node.args[3], "materialized", op, reason, way="graph")


def view_of(node: fx.Node) -> str | None:
    """The view that a lowered node generates its weight from."""
    target, args = node.target, node.args
    if target is epilogue_of_norm:
        target, args = getattr(torch.ops.fxrpg, args[0]).default, args[3:]  # type: ignore[arg-type]
    place = {op: len(dense.inputs) + 3 for op, dense in DENSE_OPS.items()}
    place |= {epilogue.op: epilogue.view_at for epilogue in EPILOGUES.values()}
    return args[place[target]] if target in place else None  # type: ignore[return-value]
