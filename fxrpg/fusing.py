"""Run an op with its weight generated inside the kernel, where that is possible and pays: what staged ops try first."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxrpg.dispatch import Choice, Problem, card_of, choose, note
from fxrpg.lowering import current_mode, kernels_wanted
from fxrpg.view import View
from fxrpg.weights import as_stored

Where = tuple[Tensor, Tensor, str]
"""A generated weight as an op is given it: (state, scale, view)."""

_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def decide(
    dense: Any, direction: str, xs: Sequence[Tensor], state: Tensor, view: View, config: tuple[Any, ...],
    vectors: Sequence[Tensor | None] = (),
) -> Choice:  # fmt: skip
    """How one direction of the op `dense` (a staging.DenseOp) runs here and now.

    Args:
        xs: the op's inputs (shapes, types and devices are read).
        vectors: what the epilogue adds and multiplies: (bias, factor, shift).
    """
    if not kernels_wanted(state.device):
        return note(Choice(path="staged"))
    dtype = xs[0].dtype if xs[0].is_floating_point() else state.dtype
    problem: Problem | str = _refusal(dense, xs, state, view)
    problem = problem or _misfit(vectors, xs[0], dense, view, config)
    problem = problem or dense.problem(direction, xs, view, dtype, *config)
    cost = "own" if isinstance(problem, str) else view.generator.cost(view, problem.step)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return note(choose(problem, cost, card_of(state.device), current_mode(), deterministic))


def _refusal(dense: Any, xs: Sequence[Tensor], state: Tensor, view: View) -> str:
    """Why no kernel of any op covers the call; "" where one may."""
    if not dense.fused:
        return f"{dense.name} has no fused kernel"
    if view.whole is not view:
        return "only a part of the weight is used" if view.parent else "channels of the weight were pruned"
    if state.dtype == torch.float64:
        return "float64 has no fused kernels"
    if any(x.device != state.device for x in xs):
        return "the state is on another device"
    for x in xs:
        if x.layout != torch.strided:
            return f"the input's layout is {x.layout}"
        if dense.autocast == "lower" and x.dtype not in _TYPES:  # others take indices, or are not fused
            return f"{x.dtype} has no fused kernels"
    return ""


def _misfit(vectors: Sequence[Tensor | None], x: Tensor, dense: Any, view: View, config: tuple[Any, ...]) -> str:
    """Why bias, factor and shift are not for a kernel: torch broadcasts what is no vector of channels, or raises."""
    for vector, dtype in zip(vectors, (x.dtype, torch.float32, torch.float32), strict=False):
        if vector is not None and vector.shape != (dense.channels(view, *config),):
            return "what the epilogue adds is no vector of the output's channels"
        if vector is not None and (vector.dtype, vector.device) != (dtype, x.device):
            return "what the epilogue adds is of another type or device"
    return ""


def forward(
    dense: Any, xs: Sequence[Tensor], bias: Tensor | None, where: Where, config: tuple[Any, ...],
    factor: Tensor | None = None, shift: Tensor | None = None, activation: str = "none",
) -> Tensor | None:  # fmt: skip
    """activation(op(xs) * factor + shift), or None where that must be staged."""
    state, scale, text = where
    view = View.parse(text)
    choice = decide(dense, "forward", xs, state, view, config, (bias, factor, shift))
    if choice.path != "fused":
        return None
    return importlib.import_module(dense.fused).forward(
        choice, (view, state, scale), xs, (bias, factor, shift, activation), config
    )


def input_grad(dense: Any, grad: Tensor, xs: Sequence[Tensor], where: Where, config: tuple[Any, ...]) -> Tensor | None:
    """The gradient of the op's only input, or None where that must be staged."""
    state, scale, text = where
    view = View.parse(text)
    choice = decide(dense, "input_grad", xs, state, view, config)
    if choice.path != "fused":
        return None
    return importlib.import_module(dense.fused).input_grad(choice, (view, state, scale), grad, xs, config)


def state_grad(dense: Any, grad: Tensor, xs: Sequence[Tensor], where: Where, config: tuple[Any, ...]) -> Tensor | None:
    """The gradient of the state, in its type, or None where that must be staged."""
    state, scale, text = where
    view = View.parse(text)
    if not state.is_floating_point():
        return None
    choice = decide(dense, "state_grad", xs, state, view, config)
    if choice.path != "fused":
        return None
    found = importlib.import_module(dense.fused).state_grad(choice, (view, state, scale), grad, xs, config)
    return as_stored(view.generator.masked_gradient(found, state), state)
