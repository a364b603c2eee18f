"""The public verbs: transform a model, materialize it again, fit it to existing weights, and see what became of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from fxrpg.assemble import assemble, check_untransformed, copy_module, copy_without, disassemble, plan_of
from fxrpg.errors import FxrpgError
from fxrpg.examples import example_roles
from fxrpg.generator import Generator, generator_from
from fxrpg.packing import rounded
from fxrpg.passes.pipeline import graph_roles
from fxrpg.plan import Choice, Plan, candidates, checked_seed, choose
from fxrpg.region_search import check_examples, install_regions
from fxrpg.roles import Role
from fxrpg.rule import Dof, Rule, Scoping
from fxrpg.scopes import lay_out


def transform(
    model: nn.Module,
    *,
    dof: Dof = None,
    method: str | Generator = "ring",
    scope: Scoping = "model",
    seed: int = 0,
    plan: Sequence[Rule] = (),
    strict: bool = False,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A copy of `model` whose planned weights are generated from `dof` free numbers; `model` itself is untouched.

    A `torch.fx.GraphModule` is rewritten as a graph and comes back as one; any other module keeps its own forward code.
    The free numbers are parameters of the result: `fxrpg_ring`, `fxrpg_alpha`, or for masks a `<weight>_score` beside each
    weight's place; with several scopes `fxrpg_ring_<scope>`. Ring and PRANC weights start, layer by layer, with the
    standard deviation that they have in `model`, or with their layer's default where they have none (constants, zeros,
    the meta device). Initialise, load or tie weights before: generated ones are read-only.

    By default a ring takes all conv and linear weights but the first and the last such layer's, PRANC all of them and their
    biases, PEMN all of them; `plan` says otherwise.

    Args:
        model: any module; on the meta device too.
        dof: degrees of freedom. An int is exact (so is a whole float above 1); a float in (0, 1] is a fraction of the
            generated weights: 1 is a single number, 1.0 as many as there are weights. For "pemn" see `fxrpg.Pemn`. With
            several scopes an int is split by share of weights (rings in whole blocks), a fraction holds for each, and a
            dict (scope's name -> size; "" is what belongs to no scope) gives each its own.
        method: "ring", "pranc", "pemn", or settings such as `fxrpg.Ring(block=1, layout="shuffle")`.
        scope: which weights share a state: "model"; "stage", "block" or "position" (of repeated blocks), "layer"; or a
            function from a parameter's name to its scope's name. See `fxrpg.scopes.scoping_of`.
        seed: 0 <= seed < 2^64. The same seed gives the same bits on every machine.
        plan: rules that decide before the method's default does; the first that matches a parameter counts.
        strict: raise when an op consumes a generated weight without a lowering, instead of materializing it.
        example_inputs, example_kwargs: arguments that the model can be called with. Then raw parameters that functions
            take as their weights count as weights too (`fxrpg.examples.example_roles`), and batch norms and activations
            are drawn into the ops before them where that is proved to change nothing (`region_search.install_regions`).

    Raises:
        FxrpgError: an argument out of range, a rule that matches nothing, no weight to generate, a module that cannot be
            transformed, or that does not run on the example inputs.

    Warns:
        UserWarning: a PRANC basis of which one pass over the model draws more than 1e11 values.
    """
    _check_modules(model)
    examples = check_examples(example_inputs, example_kwargs)
    generator, rules = generator_from(method), _checked_rules(plan)
    roles = graph_roles(model) if isinstance(model, fx.GraphModule) else example_roles(model, examples)
    found = candidates(model, roles)
    chosen, dense = choose(found, generator, rules)
    scopes, views, scope_of = lay_out(chosen, model, dof=dof, scope=scope, seed=checked_seed(seed))
    for one in {scope.generator for scope in scopes}:
        one.check([view for view in views.values() if view.generator == one])
    names = {choice.candidate.name: choice.candidate.names for choice in chosen}
    resolved = Plan(checked_seed(seed), scopes, views, scope_of, names, dense, tuple(map(str, rules)))
    return _transformed(model, resolved, chosen, strict, examples)


def materialize(model: nn.Module) -> nn.Module:
    """An ordinary copy of a transformed `model`: full weights under their original names, computing what `model` computes.

    Raises:
        FxrpgError: `model` is not transformed.
    """
    plan_of(model)
    result = copy_module(model)
    disassemble(result)
    return result


@torch.inference_mode(False)  # tensors made in inference mode could never be trained
def _transformed(model: nn.Module, plan: Plan, chosen: Sequence[Choice], strict: bool, examples: Any) -> nn.Module:
    """A copy of `model` that follows `plan`, with regions for what the examples show."""
    states, scale = _initial(plan, {choice.candidate.name: choice for choice in chosen})
    result = copy_without(model, [choice.candidate.parameter for choice in chosen])
    assemble(result, plan, states, scale, strict)
    install_regions(result, examples)
    return result


def _initial(plan: Plan, chosen: Mapping[str, Choice]) -> tuple[dict[str, Tensor], Tensor]:
    """The states at the start and each weight's scale (float32), such that weights start with their own deviation.

    Scales are rounded to 16 significant bits, because the last bits of a measured deviation depend on the number of
    threads.
    """
    scale = torch.empty(len(plan.views), dtype=torch.float64, device="cpu")
    units: dict[int, float] = {}
    for i, scope in enumerate(plan.scopes):
        names = [name for name in plan.views if plan.scope_of[name] == i]
        deviations = [_deviation(chosen[name].candidate.parameter, chosen[name].role) for name in names]
        units[i], scales = scope.generator.scales([plan.views[name] for name in names], deviations)
        for name, value in zip(names, scales, strict=True):
            scale[plan.views[name].tensor] = rounded(value)
    states = {}
    for state, names in plan.states.items():
        scope, views = plan.scope(names[0]), [plan.views[name] for name in names]
        parameters = [chosen[name].candidate.parameter for name in names]
        _check_alike(names, parameters)
        like = parameters[0]
        if like.is_meta:
            states[state] = torch.empty(scope.generator.state_shape(views[0]), dtype=like.dtype, device="meta")
        else:
            first = scope.generator.init_state(views, units[plan.scope_of[names[0]]])
            states[state] = first.to(dtype=like.dtype, device=like.device)
    return states, scale.to(torch.float32)


def _deviation(parameter: Tensor, role: Role) -> float:
    """The weight's own standard deviation; its layer's rule where it has none (meta device, zeros, a constant)."""
    if parameter.is_meta:
        return role.std
    found = parameter.detach().to(torch.float64).std(correction=0).item()
    return found if math.isfinite(found) and found > 1e-12 else role.std


def _checked_rules(plan: Any) -> tuple[Rule, ...]:
    rules = (plan,) if isinstance(plan, Rule) else tuple(plan) if isinstance(plan, Iterable) else (plan,)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise FxrpgError(
                "plan", "must hold fxrpg.Rule objects", repr(rule), 'Write fxrpg.Rule("layer1.*", "dense").'
            )
    return rules


def _check_modules(model: Any) -> None:
    """Refuse what is no module or transformed already, what has no weights yet, or none that autograd could train."""
    if not isinstance(model, nn.Module):
        fix = "Pass a module; of an exported program, what its method module() returns."
        raise FxrpgError("transform", "model must be a torch.nn.Module", type(model).__name__, fix)
    if hasattr(model, "_orig_mod"):
        raise FxrpgError(
            "transform", "model must not be compiled yet", type(model).__name__, "Transform first, then compile."
        )
    check_untransformed(model)
    for name, module in model.named_modules():
        where = name or type(model).__name__
        if any(nn.parameter.is_lazy(p) for p in module._parameters.values()):
            fix = "Run one forward pass, which initialises lazy modules, then transform."
            raise FxrpgError(where, "parameters must be initialised", f"the lazy {type(module).__name__}", fix)
        plain = type(module).__name__ in ("FloatFunctional", "FXFloatFunctional")  # additions that observers may watch
        if not plain and ".quantized." in f"{type(module).__module__}." and "qat" not in type(module).__module__:
            fix = "Transform the float model; quantise the ring instead of the weights."
            raise FxrpgError(
                where, "weights must be floating-point parameters", f"the quantised {type(module).__name__}", fix
            )


def _check_alike(names: Sequence[str], parameters: Sequence[nn.Parameter]) -> None:
    """All weights of one state have its type and device."""
    first = parameters[0]
    for name, other in zip(names, parameters, strict=True):
        if type(other.data) is not Tensor:
            fix = f'Transform the plain model first, or leave it dense with Rule("{name}", "dense").'
            raise FxrpgError(name, "must be a plain tensor", f"a {type(other.data).__name__}", fix)
        if (other.dtype, other.device) != (first.dtype, first.device):
            raise FxrpgError(
                name,
                f"weights of one state must share type and device ({first.dtype} on {first.device}, as {names[0]})",
                f"{other.dtype} on {other.device}",
                f'Cast or move the model first, or leave it dense with Rule("{name}", "dense").',
            )
