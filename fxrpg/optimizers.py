"""Optimizers that would train a model wrongly: given a part of it without the state, or a state that no process shares."""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fxrpg.digest import PLAN
from fxrpg.errors import FxrpgError
from fxrpg.handle import Handle
from fxrpg.owner import Link, owned
from fxrpg.shares import PLAIN

PATIENCE = 10
"""Steps of an optimizer before it is looked at: others may step less often."""

_stepped: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
"""Optimizer -> how often it has stepped."""


@functools.cache
def watch_optimizers() -> None:
    """Look at the first steps of every optimizer. Called when a first model is transformed."""
    register_optimizer_step_pre_hook(_refuse_handles)
    register_optimizer_step_pre_hook(_refuse_unshared)
    register_optimizer_step_post_hook(_warn_of_forgotten)


def _refuse_handles(optimizer: Optimizer, *_: Any) -> None:
    """A generated weight is a fresh tensor at each read: a step on one would be lost."""
    if optimizer in _stepped:
        return
    for parameter in _parameters(optimizer):
        if isinstance(parameter, Handle):
            raise FxrpgError(
                type(optimizer).__name__,
                "an optimizer must hold parameters",
                f"the generated weight {parameter.weight_name}",
                "Pass model.parameters(), which holds the state that it is generated from.",
            )


def _refuse_unshared(optimizer: Optimizer, *_: Any) -> None:
    """fully_shard on blocks alone leaves out the root's state: its gradient would stay that of one rank's data."""
    sharding = sys.modules.get("torch.distributed.fsdp")
    if optimizer in _stepped or sharding is None:
        return
    own = {id(p) for p in _parameters(optimizer)}
    for root in Link.roots():
        if any(id(p) in own for p in root.parameters()) and not isinstance(root, sharding.FSDPModule):
            for module in root.modules():
                if isinstance(module, sharding.FSDPModule):
                    _check_shared(root, module)


def _check_shared(root: nn.Module, module: nn.Module) -> None:
    """The states that a fully_shard-ed module's weights are generated from must be sharded, or trained by nobody."""
    plan = root.__dict__[PLAN]
    for name, _owner, _attribute in owned(module):
        state = plan.state_of(name)
        tensor = root.get_parameter(state) if _is_parameter(root, state) else None
        if type(tensor) in PLAIN and tensor is not None and tensor.requires_grad:
            raise FxrpgError(
                name,
                f"its state {state} must be sharded where its module is",
                "fully_shard on a part of the model, without which no rank hears of the others' gradients",
                "Apply fully_shard to the transformed model itself too, after its blocks.",
            )


def _warn_of_forgotten(optimizer: Optimizer, *_: Any) -> None:
    """Once it has stepped some times, and other optimizers had their turns: is a model trained without its state?"""
    _stepped[optimizer] = steps = _stepped.get(optimizer, 0) + 1
    if steps != PATIENCE:
        return
    own = {id(p) for p in _parameters(optimizer)}
    everyones = {id(p) for other in list(_stepped) for p in _parameters(other)}
    for root in Link.roots():
        if any(id(p) in own for p in root.parameters()):
            _warn(root, everyones)


def _warn(root: nn.Module, trained: set[int]) -> None:
    states = {state: root.get_parameter(state) for state in root.__dict__[PLAN].states if _is_parameter(root, state)}
    left = [name for name, p in states.items() if p.requires_grad and p.grad is not None and id(p) not in trained]
    if left:
        names = ", ".join(left[:3]) + ", ..." * (len(left) > 3)
        warnings.warn(
            f"{names} has a gradient, but no optimizer has stepped it so far: generated weights are not among the "
            "parameters() of the module that owns them, their state is among those of the whole model. Pass that to the "
            "optimizer, or call requires_grad_(False) on it if it is to stay as it is.",
            stacklevel=4,
        )


def _is_parameter(root: nn.Module, name: str) -> bool:
    path, _, attribute = name.rpartition(".")
    try:
        return attribute in root.get_submodule(path)._parameters
    except AttributeError:  # surgery has taken it out
        return False


def _parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
