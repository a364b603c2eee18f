"""The public verbs: transform a model, materialize it again, fit it to existing weights, and see what became of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from fxrpg.assemble import assemble, check_untransformed, copy_module, copy_without, disassemble, plan_of
from fxrpg.errors import FxrpgError
from fxrpg.generator import Generator, generator_from, rounded
from fxrpg.passes.pipeline import graph_roles
from fxrpg.plan import Candidate, Plan, Rule, candidates, checked_seed, choose, lay_out
from fxrpg.roles import Role


def transform(
    model: nn.Module,
    *,
    dof: int | float,
    method: str | Generator = "ring",
    seed: int = 0,
    plan: Sequence[Rule] = (),
    strict: bool = False,
) -> nn.Module:
    """A copy of `model` whose planned weights are generated from `dof` free numbers; `model` itself is untouched.

    A `torch.fx.GraphModule` is rewritten as a graph and comes back as one; any other module keeps its own forward code.
    The free numbers are a parameter of the result (`fxrpg_ring`); weights keep, layer by layer, the standard deviation
    that they have in `model`, or take their layer's default where they have none (constants, zeros, the meta device).
    Initialise, load or tie weights before: generated ones are read-only.

    Args:
        model: any module; on the meta device too.
        dof: degrees of freedom. An int is exact (so is a whole float above 1); a float in (0, 1] is a fraction of the
            generated weights, rounded to whole blocks: 1 is a single number, 1.0 as many as there are weights.
        method: "ring", or settings such as `fxrpg.Ring(block=1, layout="shuffle")`.
        seed: 0 <= seed < 2^64. The same seed gives the same bits on every machine.
        plan: rules that decide before the method's default does; the first that matches a parameter counts.
        strict: raise when an op consumes a generated weight without a lowering, instead of materializing it.

    Raises:
        FxrpgError: an argument out of range, a rule that matches nothing, no weight to generate, a module that cannot be
            transformed.
    """
    if not isinstance(model, nn.Module):
        fix = "Pass a module; of an exported program, what its method module() returns."
        raise FxrpgError("transform", "model must be a torch.nn.Module", type(model).__name__, fix)
    if hasattr(model, "_orig_mod"):
        raise FxrpgError(
            "transform", "model must not be compiled yet", type(model).__name__, "Transform first, then compile."
        )
    check_untransformed(model)
    _check_modules(model)
    generator, rules = generator_from(method), _checked_rules(plan)
    found = candidates(model, graph_roles(model) if isinstance(model, fx.GraphModule) else {})
    chosen, dense = choose(found, generator, rules)
    _check_alike([candidate for candidate, _ in chosen])
    seed = checked_seed(seed)
    views = lay_out(chosen, generator, seed)
    resolved = Plan(
        generator=generator,
        seed=seed,
        size=_state_size(dof, generator, sum(view.count for view in views.values())),
        views=views,
        names={candidate.name: candidate.names for candidate, _ in chosen},
        dense=dense,
        rules=tuple(str(rule) for rule in rules),
    )
    state, scale = _initial(resolved, chosen)
    result = copy_without(model, [candidate.parameter for candidate, _ in chosen])
    assemble(result, resolved, state, scale, strict)
    return result


def materialize(model: nn.Module) -> nn.Module:
    """An ordinary copy of a transformed `model`: full weights under their original names, computing what `model` computes.

    Raises:
        FxrpgError: `model` is not transformed.
    """
    plan_of(model)
    result = copy_module(model)
    disassemble(result)
    return result


def _initial(plan: Plan, chosen: Sequence[tuple[Candidate, Role]]) -> tuple[Tensor, Tensor]:
    """The state at the start and each weight's scale (float32), such that weights start with their own deviation.

    The state's deviation is the root mean square of the weights': scales then lie around one, and learning rates and
    weight decay act as on the dense model. Scales are rounded to 16 significant bits, because the last bits of a measured
    deviation depend on the number of threads.
    """
    parameter = chosen[0][0].parameter
    deviations = {candidate.name: _deviation(candidate.parameter, role) for candidate, role in chosen}
    energy = sum(view.count * deviations[name] ** 2 for name, view in plan.views.items())
    mean = rounded(math.sqrt(energy / plan.generated))
    scale = torch.empty(len(plan.views), dtype=torch.float64, device="cpu")
    for name, view in plan.views.items():
        scale[view.tensor] = rounded(deviations[name] / mean)
    scale = scale.to(torch.float32)
    if parameter.is_meta:
        return torch.empty(plan.size, dtype=parameter.dtype, device="meta"), scale
    state = plan.generator.init_state(plan.size, plan.seed, mean)
    return state.to(dtype=parameter.dtype, device=parameter.device), scale


def _deviation(parameter: Tensor, role: Role) -> float:
    """The weight's own standard deviation; its layer's rule where it has none (meta device, zeros, a constant)."""
    if parameter.is_meta:
        return role.std
    found = parameter.detach().to(torch.float64).std(correction=0).item()
    return found if math.isfinite(found) and found > 1e-12 else role.std


def _state_size(dof: Any, generator: Generator, weights: int) -> int:
    fix = f"Pass an int from 1 to {weights}, or a fraction in (0, 1]."
    must = f"must be an int in [1, {weights}] (the generated weights) or a fraction in (0, 1]"
    if isinstance(dof, bool) or not hasattr(dof, "__float__"):
        raise FxrpgError("dof", must, repr(dof), fix)
    value = float(dof)
    exact = isinstance(dof, float) is False or value > 1
    if not math.isfinite(value) or value <= 0 or (exact and value != int(value)) or value > weights:
        raise FxrpgError("dof", must, repr(dof), fix)
    return generator.state_size(int(value) if exact else value, weights)


def _checked_rules(plan: Any) -> tuple[Rule, ...]:
    rules = (plan,) if isinstance(plan, Rule) else tuple(plan)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise FxrpgError(
                "plan", "must hold fxrpg.Rule objects", repr(rule), 'Write fxrpg.Rule("layer1.*", "dense").'
            )
    return rules


def _check_modules(model: nn.Module) -> None:
    """Refuse what has no weights yet, or none that autograd could train."""
    for name, module in model.named_modules():
        where = name or type(model).__name__
        if any(nn.parameter.is_lazy(p) for p in module._parameters.values()):
            fix = "Run one forward pass, which initialises lazy modules, then transform."
            raise FxrpgError(where, "parameters must be initialised", f"the lazy {type(module).__name__}", fix)
        if ".quantized." in f"{type(module).__module__}." and "qat" not in type(module).__module__:
            fix = "Transform the float model; quantise the ring instead of the weights."
            raise FxrpgError(
                where, "weights must be floating-point parameters", f"the quantised {type(module).__name__}", fix
            )


def _check_alike(chosen: list[Candidate]) -> None:
    """All weights of one state have its type and device."""
    first = chosen[0].parameter
    for candidate in chosen:
        other = candidate.parameter
        if type(other.data) is not Tensor:
            fix = f'Transform the plain model first, or leave it dense with Rule("{candidate.name}", "dense").'
            raise FxrpgError(candidate.name, "must be a plain tensor", f"a {type(other.data).__name__}", fix)
        if (other.dtype, other.device) != (first.dtype, first.device):
            raise FxrpgError(
                candidate.name,
                f"weights of one state must share type and device ({first.dtype} on {first.device}, as {chosen[0].name})",
                f"{other.dtype} on {other.device}",
                f'Cast or move the model first, or leave it dense with Rule("{candidate.name}", "dense").',
            )
