"""Smaller forms of a transformed model: few bits, fewer numbers, packed for inference. Each returns a new model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxrpg.assemble import copy_module, plan_of, put_state, replan, states_in, take_state
from fxrpg.errors import FxrpgError
from fxrpg.generator import Generator
from fxrpg.owner import SCALE, tensor_at
from fxrpg.plan import Plan, Scope
from fxrpg.scopes import shares
from fxrpg.view import View

ORDERS = ("magnitude", "index")


def freeze(model: nn.Module) -> nn.Module:
    """A copy of `model` for inference: scores become masks of one bit a weight, quantised rings their codes.

    What is frozen is a buffer of bytes, not trained any more; the model computes what it did, bit for bit. States that
    have no such form (a ring that is not quantised, a basis) stay as they are.

    Raises:
        FxrpgError: `model` is not transformed, or has no state to freeze.
    """
    plan = plan_of(model)
    chosen = [state for state, (name, *_) in states_in(model).items() if _can_freeze(plan.scope(name))]
    if not chosen:
        found = "a frozen one" if any(scope.frozen for scope in plan.scopes) else ", ".join(_methods(plan))
        fix = "Save the model as it is; of a ring, freeze what fxrpg.quantize returns."
        raise FxrpgError("freeze", "needs a mask or a quantised ring", found, fix)
    dtype = _one_dtype(model, chosen)

    def change(scope: Scope) -> Scope:
        if not _can_freeze(scope):
            return scope
        return dataclasses.replace(scope, frozen=True, state=scope.generator.frozen_name(scope.state))

    def packed(state: Tensor, scope: Scope, view: View) -> Tensor:
        return scope.generator.freeze(state, view) if _can_freeze(scope) else state

    result = _rebuilt(model, plan.with_scopes(change), packed)
    result._buffers[SCALE] = result.get_buffer(SCALE).to(dtype)
    return result


def quantize(model: nn.Module, bits: int = 8, *, block: int = 0) -> nn.Module:
    """A copy of `model` whose rings are read in 8 or 4 bits, and which can be finetuned so.

    The ring stays a parameter in full precision: weights read it rounded to whole steps, symmetric about zero, and
    gradients pass straight through the rounding. `fxrpg.freeze` then packs the codes, in memory and in files.

    Args:
        model: the result of `transform` with a ring.
        bits: 8 or 4.
        block: ring cells that share a step (one float32 each in files); 0 is one step for the ring.

    Raises:
        FxrpgError: `model` is not transformed, is frozen, or has no ring; bits or block out of range.
    """
    plan = plan_of(model)
    _check_trainable(plan, "quantize")
    if bits is None:  # what a ring takes for full precision
        raise FxrpgError("quantize, bits", "must be 8 or 4", "None", "Pass one of them.")
    return _rebuilt(model, _with_settings(plan, lambda generator: generator.quantised(bits, block), "bits"))


def prune(model: nn.Module, amount: float) -> nn.Module:
    """A copy of `model` in whose rings and coefficients the fraction `amount` of least magnitude is zero and stays zero.

    Pruned numbers get no gradient and are not stored in files. (arXiv:2107.07110, Section 5.2, fine-grained pruning.)
    Train a pruned model with an optimizer of its own: momentum from before would move what was pruned.

    Raises:
        FxrpgError: `model` is not transformed, is frozen, or has masks only; `amount` is not in (0, 1).
    """
    plan = plan_of(model)
    _check_trainable(plan, "prune")
    if isinstance(amount, bool) or not isinstance(amount, float) or not 0 < amount < 1:
        raise FxrpgError("prune, amount", "must be a float in (0, 1)", repr(amount), "Pass such as 0.5.")

    def change(state: Tensor, scope: Scope, view: View) -> Tensor:
        size = state.numel()
        return state if scope.generator.masks else _largest(state, size - round(amount * size))

    return _rebuilt(model, _with_settings(plan, lambda generator: generator.pruned(), "sparse"), change)


def truncate(model: nn.Module, k: int, *, order: str = "magnitude") -> nn.Module:
    """A copy of a PRANC `model` reconstructed from k of its coefficients; other methods' weights stay.

    Args:
        model: the result of `transform` with PRANC.
        k: how many; with several scopes each keeps its share.
        order: "magnitude" keeps the largest (the paper's sorted prefix; which they are is stored, one bit each): a smaller
            file, as many draws; "index" the first k, as if the model had been transformed with dof=k: fewer draws too.

    Raises:
        FxrpgError: `model` is not transformed or has no PRANC basis; k is out of range; an unknown order.
    """
    plan = plan_of(model)
    bases = {scope.state: scope.size for scope in plan.scopes if scope.generator.method == "pranc"}
    if not bases:
        fix = "Of a ring, use fxrpg.prune."
        raise FxrpgError("truncate", "needs a PRANC basis", f"the method {', '.join(_methods(plan))!r}", fix)
    whole = isinstance(k, int) and not isinstance(k, bool)
    if not whole or not len(bases) <= k <= sum(bases.values()):
        must = f"must be an int in [{len(bases)}, {sum(bases.values())}], the coefficients there are"
        raise FxrpgError("truncate, k", must, repr(k), "Pass fewer coefficients than the model has.")
    if order not in ORDERS:
        raise FxrpgError("truncate, order", f"must be one of {ORDERS}", repr(order), "Pass one of them.")
    sizes = shares(k, bases)

    def settings(scope: Scope) -> Scope:
        if scope.state not in sizes:
            return scope
        if order == "magnitude":
            return dataclasses.replace(scope, generator=scope.generator.pruned())
        return dataclasses.replace(scope, size=sizes[scope.state])

    def cut(state: Tensor, scope: Scope, view: View) -> Tensor:
        size = sizes.get(scope.state)
        if size is None:
            return state
        return _largest(state, size) if order == "magnitude" else state[:size].clone()

    return _rebuilt(model, plan.with_scopes(settings), cut)


def _with_settings(plan: Plan, change: Callable[[Generator], Generator], setting: str) -> Plan:
    """The plan with the settings changed of every method that has `setting`; of all, to hear why not, if none has."""

    def has(scope: Scope) -> bool:
        return any(f.name == setting for f in dataclasses.fields(scope.generator))

    able = [has(scope) for scope in plan.scopes]

    def changed(scope: Scope) -> Scope:
        return dataclasses.replace(scope, generator=change(scope.generator)) if has(scope) or not any(able) else scope

    return plan.with_scopes(changed)


def _rebuilt(
    model: nn.Module, plan: Plan, change: Callable[[Tensor, Scope, View], Tensor] = lambda state, *_: state
) -> nn.Module:
    """A copy of `model` that follows `plan`, each state replaced by `change(state, scope now, a view that reads it)`."""
    before, result = plan_of(model), copy_module(model)
    for name, (first, *_) in states_in(result).items():
        old: Any = tensor_at(result, name)
        new = change(old.detach(), before.scope(first), before.views[first].whole)
        take_state(result, name)
        put_state(result, plan.state_of(first), new)
        if new.is_floating_point():
            tensor_at(result, plan.state_of(first)).requires_grad_(old.requires_grad)
    replan(result, plan)
    return result


def _can_freeze(scope: Scope) -> bool:
    return scope.generator.freezes and not scope.frozen


def _one_dtype(model: nn.Module, states: Sequence[str]) -> torch.dtype:
    """The one type of states that are to be frozen, bytes not telling it. Raises FxrpgError if they have several, or NaN."""
    held = {state: tensor_at(model, state) for state in states}
    for state, tensor in held.items():
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            fix = "Freeze a model from before it diverged."
            raise FxrpgError(f"freeze, {state}", "needs finite numbers", "NaN or infinity", fix)
    dtypes = {tensor.dtype for tensor in held.values()}
    if len(dtypes) > 1:
        found = ", ".join(sorted(map(str, dtypes)))
        raise FxrpgError("freeze", "needs weights of one type where they are frozen", found, "Cast the model first.")
    return dtypes.pop()


def _largest(state: Tensor, count: int) -> Tensor:
    """`state` with zeros in the place of all but its `count` numbers of largest magnitude; of equal ones the first stay."""
    order = torch.argsort(state.abs(), descending=True, stable=True)
    return state.index_fill(0, order[max(count, 1) :], 0)


def _methods(plan: Plan) -> list[str]:
    return sorted({scope.generator.method for scope in plan.scopes})


def _check_trainable(plan: Plan, verb: str) -> None:
    if any(scope.frozen for scope in plan.scopes):
        fix = f"Call fxrpg.{verb} on the model before it was frozen."
        raise FxrpgError(verb, "needs a model that is not frozen", "a frozen one", fix)
