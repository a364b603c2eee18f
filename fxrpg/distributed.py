"""PRANC over several ranks: each sums its own run of basis vectors, and all-reduced partial sums are the weights.

PRANC, Section 3, "Distributed learning". No rank draws all of the basis, nor trains all of the coefficients.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from fxrpg.assemble import copy_module, plan_of, states_in
from fxrpg.errors import FxrpgError
from fxrpg.owner import LINK, owned, tensor_at
from fxrpg.plan import Plan
from fxrpg.regions import uninstall
from fxrpg.shares import is_sharded

DATA = ("same", "split")


def distribute(model: nn.Module, group: Any = None, *, data: str = "same") -> nn.Module:
    """A copy of a PRANC `model` whose coefficients, and with them the drawing of the basis, are split over ranks.

    Every rank calls this with the same model; rank 0's numbers count. Each keeps a run of k / ranks coefficients
    (`fxrpg_alpha` becomes a DTensor of placement Shard(0), and so do its gradient and its optimizer state) and draws only
    the basis vectors of that run. Whenever a weight is generated the ranks add up exact sums, so weights are bit for bit
    those of one process, and so is, with the same data, the gradient of every coefficient. A weight of n elements costs
    an all-reduce of n float64 (2n where one has no room for the sum: with the laws "uniform" and "normal" from some dozens
    of coefficients on, with signs from four million) and of one number, in the forward and once more in the backward where
    its input needs a gradient: 2P a step for P weights, whatever k. Ranks must run the same ops in the same order.

    `fxrpg.save`, called on every rank, writes all coefficients; `torch.distributed.checkpoint` saves and loads the parts,
    also for another number of ranks. Verbs that return a new model need the model from before.

    Args:
        model: the result of `transform` with PRANC for some of its weights.
        group: the process group; None is the default one.
        data: "same" if every rank is given the same batch; "split" if each has its own: then gradients of generated weights
            are averaged over the ranks before they are projected (n numbers more a weight), as DistributedDataParallel
            does for the dense parameters when it is put around the result, to which it leaves the coefficients.

    Raises:
        FxrpgError: no process group, no PRANC weights, a model that is split already or that differs between ranks.
    """
    plan = plan_of(model)
    if data not in DATA:
        raise FxrpgError("distribute, data", f"must be one of {DATA}", repr(data), "Pass one of them.")
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        fix = "Call torch.distributed.init_process_group first, under torchrun."
        raise FxrpgError("distribute", "needs a process group", "none", fix)
    group = torch.distributed.group.WORLD if group is None else group
    states = _split_states(model, plan)
    _check_alike(plan, group)
    result = copy_module(model)
    for module in result.modules():
        uninstall(module)  # the graphs of regions read a whole state
    _shard(result, states, group)
    texts = {
        view.text: dataclasses.replace(view, ranks=group.group_name, average=data == "split").text
        for name, view in plan.views.items()
        if plan.state_of(name) in states
    }
    _reread(result, states, texts)
    if data == "split":
        left = [*states, *("." + state for state in states)]  # DDP spells the root's parameters both ways
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(result, left)
    return result


def _split_states(model: nn.Module, plan: Plan) -> list[str]:
    """The states that ranks can split, as they are: whole."""
    states = [s for s, (name, *_) in states_in(model).items() if plan.scope(name).generator.splits]
    if not states:
        found = ", ".join(sorted({scope.generator.method for scope in plan.scopes}))
        raise FxrpgError("distribute", "needs a PRANC model", found, "Rings and masks train under DDP or fully_shard.")
    for state in states:
        if is_sharded(tensor_at(model, state)):
            raise FxrpgError(f"distribute, {state}", "must be whole", "a part", "Pass the model from before.")
        if tensor_at(model, state).is_meta:
            raise FxrpgError(
                f"distribute, {state}", "must hold values", "a tensor on the meta device", "Load it first."
            )
    return states


def _check_alike(plan: Plan, group: Any) -> None:
    digests: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(digests, plan.digest(), group)
    if len(set(digests)) > 1:
        fix = "Pass the same seed, dof, method and plan to transform on every rank."
        found = f"{len(set(digests))} different ones"
        raise FxrpgError("distribute", "every rank must have the same seed and plan", found, fix)


def _shard(model: nn.Module, states: list[str], group: Any) -> None:
    """Give every rank rank 0's numbers, and of `states` its own part of them."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = DeviceMesh.from_group(group, tensor_at(model, states[0]).device.type)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in states:
            torch.distributed.broadcast(tensor.detach(), group=group, group_src=0)
    for state in states:
        path, _, attribute = state.rpartition(".")
        holder, alpha = model.get_submodule(path), tensor_at(model, state)
        part = distribute_tensor(alpha.detach(), mesh, [Shard(0)])
        holder._parameters[attribute] = nn.Parameter(part, requires_grad=alpha.requires_grad)


def _reread(model: nn.Module, states: list[str], texts: dict[str, str]) -> None:
    """Have owners and graphs read the views `texts[text]` of this rank's part of the states."""
    for _name, owner, attribute in owned(model):
        name, state, text, shape = owner.__dict__[LINK].weights[attribute]
        owner.__dict__[LINK].weights[attribute] = name, state, texts.get(text, text), shape
    if isinstance(model, fx.GraphModule):
        for node in model.graph.find_nodes(op="get_attr"):
            if node.target in states:
                with model.graph.inserting_after(node):
                    part = model.graph.call_method("to_local", (node,))
                node.replace_all_uses_with(part, delete_user_cb=lambda user, part=part: user is not part)
        for node in model.graph.nodes:
            node.args = tuple(texts.get(a, a) if isinstance(a, str) else a for a in node.args)
        model.recompile()
