"""The groups in which an optimizer takes a model's parameters: states, dense weights, norms and biases."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from fxrpg.assemble import plan_of, states_in
from fxrpg.digest import PLAN
from fxrpg.errors import FxrpgError
from fxrpg.generator import Generator
from fxrpg.owner import link_of
from fxrpg.plan import Candidate, candidates
from fxrpg.roles import PLAIN_KINDS, Role

DENSE, PLAIN = "dense", "norms and biases"


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    state_lr: float | None = None,
    state_decay: float | None = None,
    reuse_power: float = 0.0,
) -> list[dict[str, Any]]:
    """The trainable parameters of `model` in groups for any torch optimizer, each with a `name`, `lr` and `weight_decay`.

    Groups are called "ring", "pranc" and "pemn" (states, by their method), "dense" (weights that are stored) and "norms and
    biases" (all else of fewer than two dimensions, and the parameters of norms). Those that would be empty are left out, and
    so are frozen parameters; tied ones come once. `model` may hold transformed models (DistributedDataParallel does), and an
    ordinary one has no states.

    Args:
        lr: learning rate of what is stored.
        weight_decay: of dense weights; norms and biases have none.
        state_lr: learning rate of states before `reuse_power`; `lr` if None.
        state_decay: weight decay of states. None is `weight_decay` for rings (arXiv:2107.07110 decays the ring) and scores
            (as PEMN's recipe does), and 0 for PRANC's coefficients (which its recipe leaves alone).
        reuse_power: p of the rule: a ring of N numbers that generates M weights gets the rate state_lr * (N / M)^p, each
            ring its own. A number's gradient is the sum over its M / N uses, so the steps that SGD takes with a given rate
            grow with M / N (p = 1 undoes that for gradients that agree, 1/2 for those that have nothing in common).
            See bench/NOTES.md for what was measured.

    Raises:
        FxrpgError: a rate, decay or power out of range, or a part of a transformed model, which has no state.
    """
    given = {"lr": lr, "weight_decay": weight_decay, "state_lr": state_lr, "state_decay": state_decay}
    for name, value in (given | {"reuse_power": reuse_power}).items():
        _check(name, value)
    _check_whole(model)
    states, groups = _states(model), dict[tuple[Any, ...], dict[str, Any]]()
    for found in candidates(model, {}):
        if not found.parameter.requires_grad:
            continue
        if found.parameter in states:
            generator, uses = states[found.parameter]
            name, factor = generator.method, uses**-reuse_power
            decay = (weight_decay if generator.decays else 0.0) if state_decay is None else state_decay
            settings = {"lr": (lr if state_lr is None else state_lr) * factor, "weight_decay": decay}
        else:
            name = PLAIN if _plain(found) else DENSE
            settings = {"lr": lr, "weight_decay": weight_decay if name == DENSE else 0.0}
        group = groups.setdefault((name, *settings.values()), {"name": name, "params": [], **settings})
        group["params"].append(found.parameter)
    return list(groups.values())


def _plain(found: Candidate) -> bool:
    """Whether a stored parameter is no weight, which decays, but a norm's, or a vector."""
    return found.parameter.dim() < 2 or (isinstance(found.role, Role) and found.role.kind in PLAIN_KINDS)


def _states(model: nn.Module) -> dict[nn.Parameter, tuple[Generator, float]]:
    """Every parameter that is a state, or from which one is computed -> its generator, and how often a number is used."""
    found = {}
    for root in (module for module in model.modules() if PLAN in module.__dict__):
        plan = plan_of(root)
        for state, names in states_in(root).items():
            views = [plan.views[name] for name in names]
            for parameter in _stored(root, state):
                found[parameter] = views[0].generator, views[0].generator.reuse(views)
    return found


def _stored(root: nn.Module, state: str) -> Iterator[nn.Parameter]:
    """What is trained of a state: itself, of a parametrized one (torch.nn.utils.parametrize) its originals, else nothing."""
    path, _, attribute = state.rpartition(".")
    holder = root.get_submodule(path)
    if parametrize.is_parametrized(holder, attribute):
        yield from holder.parametrizations[attribute].parameters(recurse=False)  # type: ignore[index, union-attr]
    elif (parameter := holder._parameters.get(attribute)) is not None:
        yield parameter


def _check(name: str, value: Any) -> None:
    optional = value is None and name.startswith("state_")
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not optional and not (number and math.isfinite(value) and (value >= 0)):
        raise FxrpgError(f"parameter_groups, {name}", "must be a number of 0 or more", repr(value), "Pass one.")


def _check_whole(model: Any) -> None:
    if not isinstance(model, nn.Module):
        found = type(model).__name__
        raise FxrpgError("parameter_groups", "needs a module", found, "Pass the model, not its parameters.")
    inside = {id(module) for module in model.modules()}
    for name, module in model.named_modules():
        link = link_of(module)
        if link is not None and link.root is not None and id(link.root) not in inside:
            where, must = f"parameter_groups, {name or type(model).__name__}", "must come with the state of its weights"
            raise FxrpgError(where, must, "a part of a transformed model", "Pass the whole model, which holds it.")
