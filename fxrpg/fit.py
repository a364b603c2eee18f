"""Project the weights of an existing model onto the state."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxrpg.assemble import copy_module, plan_of, weight_of
from fxrpg.digest import DIGEST
from fxrpg.errors import FxrpgError
from fxrpg.owner import SCALE
from fxrpg.plan import Plan
from fxrpg.view import View
from fxrpg.weights import scale_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """The result of `fit`.

    Args:
        model: the fitted model.
        residual: sum of squared differences of all generated weights from the targets, over the targets' sum of squares:
            0 is exact, 1 is no better than zero weights.
        residuals: the same for each weight.
    """

    model: nn.Module
    residual: float
    residuals: dict[str, float]

    def __str__(self) -> str:
        lost = "; little is left of what was trained: train before use" if self.residual > 0.1 else ""
        return f"relative squared residual {self.residual:.4f} over {len(self.residuals)} weights{lost}"


def fit(model: nn.Module, target: nn.Module) -> Fit:
    """A copy of the transformed `model` whose states generate, in the least-squares sense, the weights of `target`.

    Dense parameters and buffers are taken over as they are. For a ring every cell becomes the weighted mean of the entries
    it stands for; for a basis the coefficients solve the normal equations, by conjugate gradients that never hold more
    than one weight; for masks the scores are ordered so that the mask keeps the entries that their fixed values match
    best. A small residual rarely follows: with fewer numbers than weights the projection loses most of a trained network
    (regressed to a basis, its accuracy is near chance: PRANC, Table 4), so train afterwards.

    Args:
        model: the result of `transform`; stays untouched.
        target: an ordinary module with the same parameters as the one that was transformed.

    Returns:
        The fitted model and how far off it is: `fxrpg.fit(small, model).model`.

    Raises:
        FxrpgError: `target` lacks a weight, has it in another shape, or holds NaN or infinite values; `model` is frozen or
            its channels were pruned.
    """
    plan = plan_of(model)
    if plan.channels or any(scope.frozen for scope in plan.scopes):
        fix = "Fit first, then freeze or prune."
        raise FxrpgError(
            "fit", "must be a model that can be trained, with all its channels", "a frozen or pruned one", fix
        )
    if not isinstance(target, nn.Module):
        fix = "Pass the model whose weights to fit."
        raise FxrpgError("fit", "target must be a torch.nn.Module", type(target).__name__, fix)
    weights = dict(target.named_parameters(remove_duplicate=False))
    for name, view in plan.views.items():
        _check_target(name, view.shape, weights.get(name))
    result = copy_module(model)
    _take_over_dense(result, target, plan)
    with torch.no_grad():
        for state_name, names in plan.states.items():
            state = result.get_parameter(state_name)
            targets = [_target(result, name, weights[name], state.device) for name in names]
            state.copy_(plan.scope(names[0]).generator.fit(state.detach().to(torch.float64), targets))
        residuals, energy, error = {}, 0.0, 0.0
        for name in plan.views:
            found_weight = weight_of(result, name).to(torch.float64)
            wanted = weights[name].to(found_weight)
            difference = (found_weight - wanted).square().sum().item()
            total = wanted.square().sum().item()
            residuals[name] = difference / total if total else float(difference > 0)
            energy, error = energy + total, error + difference
    found = Fit(result, error / energy if energy else float(error > 0), residuals)
    _log.info("fit: %s", found)
    return found


def _target(model: nn.Module, name: str, weight: Tensor, device: torch.device) -> tuple[View, float, Tensor]:
    """The weight's view, its scale, and what it should become."""
    view = plan_of(model).views[name]
    scale = scale_of(model.get_buffer(SCALE), view).item()
    return view, scale, weight.detach().to(device, torch.float64)


def _check_target(name: str, shape: tuple[int, ...], weight: Tensor | None) -> None:
    where, fix = f"fit, {name}", "Fit to a model of the same architecture as the one that was transformed."
    if weight is None:
        raise FxrpgError(where, "the target must have this parameter", "none", fix)
    if tuple(weight.shape) != shape:
        raise FxrpgError(where, f"must have shape {shape}", str(tuple(weight.shape)), fix)
    if weight.is_meta:
        raise FxrpgError(where, "must hold values", "a tensor on the meta device", "Load the target's weights first.")
    if not bool(torch.isfinite(weight.detach()).all()):
        bad = int((~torch.isfinite(weight.detach())).sum())
        raise FxrpgError(where, "must be finite", f"{bad} NaN or infinite values", "Fit to an intact checkpoint.")


def _take_over_dense(result: nn.Module, target: nn.Module, plan: Plan) -> None:
    """Copy everything that is not generated, in value, from the target."""
    own = {*plan.states, SCALE, DIGEST}
    generated = {alias for aliases in plan.names.values() for alias in aliases}
    source = {name: tensor for name, tensor in target.state_dict().items() if name not in generated}
    mine = {name: tensor for name, tensor in result.state_dict().items() if name not in own}
    for name, tensor in mine.items():
        if name not in source or source[name].shape != tensor.shape:
            found = tuple(source[name].shape) if name in source else "none"
            fix = "Fit to a model of the same architecture as the one that was transformed."
            raise FxrpgError(f"fit, {name}", f"the target must have it in shape {tuple(tensor.shape)}", str(found), fix)
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(source[name])
