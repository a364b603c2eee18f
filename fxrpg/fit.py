"""Project the weights of an existing model onto the state."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxrpg.assemble import copy_module, plan_of
from fxrpg.errors import FxrpgError
from fxrpg.lowering import accumulate_gradient, generate_weight
from fxrpg.owner import DIGEST, SCALE
from fxrpg.plan import Plan

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
        return f"relative squared residual {self.residual:.4f} over {len(self.residuals)} weights"


def fit(model: nn.Module, target: nn.Module) -> Fit:
    """A copy of the transformed `model` whose state generates, in the least-squares sense, the weights of `target`.

    Dense parameters and buffers are taken over as they are. For a ring every cell becomes the weighted mean of the entries
    it stands for (the exact solution, since each entry reads one cell). A small residual rarely follows: with fewer
    numbers than weights the projection loses most of a trained network, so train afterwards.

    Args:
        model: the result of `transform`; stays untouched.
        target: an ordinary module with the same parameters as the one that was transformed.

    Returns:
        The fitted model and how far off it is: `fxrpg.fit(small, model).model`.

    Raises:
        FxrpgError: `target` lacks a weight, has it in another shape, or holds NaN or infinite values.
    """
    plan = plan_of(model)
    weights = dict(target.named_parameters(remove_duplicate=False))
    for name, view in plan.views.items():
        _check_target(name, view.shape, weights.get(name))
    result = copy_module(model)
    _take_over_dense(result, target, plan)
    state = result.get_parameter(plan.generator.state_name)
    scale = result.get_buffer(SCALE)
    with torch.no_grad():
        state.copy_(_least_squares(plan, state, scale, weights))
        residuals, energy, error = {}, 0.0, 0.0
        for name, view in plan.views.items():
            wanted = weights[name].to(state.device, torch.float64)
            difference = (generate_weight(state, scale, view.text).to(torch.float64) - wanted).square().sum().item()
            total = wanted.square().sum().item()
            residuals[name] = difference / total if total else float(difference > 0)
            energy, error = energy + total, error + difference
    found = Fit(result, error / energy if energy else float(error > 0), residuals)
    _log.info("fit: %s", found)
    return found


def _least_squares(plan: Plan, state: Tensor, scale: Tensor, weights: dict[str, nn.Parameter]) -> Tensor:
    """argmin over the state of the summed squared differences, for methods in which each entry reads one state element."""
    wide = state.detach().to(torch.float64)
    numerator, denominator = torch.zeros_like(wide), torch.zeros_like(wide)
    for name, view in plan.views.items():
        # A^T w and the diagonal of A^T A, where A maps the state to this weight
        numerator += accumulate_gradient(weights[name].detach().to(wide), wide, scale, view.text)
        response = generate_weight(torch.ones_like(wide), scale, view.text)
        denominator += accumulate_gradient(response, wide, scale, view.text)
    return torch.where(denominator > 0, numerator / denominator.clamp(min=torch.finfo(wide.dtype).tiny), wide)


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
    own = {plan.generator.state_name, SCALE, DIGEST}
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
