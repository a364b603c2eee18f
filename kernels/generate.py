"""The ops that turn a view into a full weight and a weight's gradient into the state's: what nothing else could lower."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx.traceback as traceback
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

from fxrpg.collecting import asked_for
from fxrpg.lowering import current_mode, lowering_mode
from fxrpg.recording import autograd_kernel
from fxrpg.staging import LIBRARY, empty_weight
from fxrpg.view import View
from fxrpg.weights import (
    accumulate_gradient,
    add_gradient,
    collects,
    generate_weight,
    plain_weight,
    tangent_weight,
    weight_dtype,
)

LIBRARY.define("generate(Tensor state, Tensor scale, str view) -> Tensor")
LIBRARY.define("accumulate(Tensor grad, Tensor state, Tensor scale, str view) -> Tensor")
LIBRARY.define("tangent(Tensor direction, Tensor state, Tensor scale, str view) -> Tensor")
LIBRARY.impl("generate", generate_weight, "CompositeExplicitAutograd")
LIBRARY.impl("tangent", tangent_weight, "CompositeExplicitAutograd")
LIBRARY.impl("accumulate", accumulate_gradient, "CompositeExplicitAutograd")


@torch.library.register_fake("fxrpg::generate", lib=LIBRARY)
def generate_fake(state: Tensor, scale: Tensor, view: str) -> Tensor:
    return empty_weight(state, scale, view, weight_dtype(state, scale))


@torch.library.register_fake("fxrpg::tangent", lib=LIBRARY)
def tangent_fake(direction: Tensor, state: Tensor, scale: Tensor, view: str) -> Tensor:
    return direction.new_empty(View.parse(view).shape)


@torch.library.register_fake("fxrpg::accumulate", lib=LIBRARY)
def accumulate_fake(grad: Tensor, state: Tensor, scale: Tensor, view: str) -> Tensor:
    return torch.empty_like(state)


@contextlib.contextmanager
def _recomputed_in_backward() -> Iterator[None]:
    """Tag what AOTAutograd traces here "must recompute": a generated weight is never kept for backward in compiled code."""
    if not traceback.has_preserved_node_meta():
        yield
        return
    meta = traceback.current_meta
    before = meta.get("recompute")
    meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    try:
        yield
    finally:
        meta.pop("recompute")
        if before is not None:
            meta["recompute"] = before


def _generate(state: Tensor, scale: Tensor, view: str) -> Tensor:
    with _recomputed_in_backward():
        return _generate_kernel(state, scale, view)


def _save_generate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    state, scale, ctx.view = inputs
    ctx.save_for_backward(state, scale)  # never the weight
    ctx.mode = current_mode()  # backward may run in a thread of autograd's own


def _differentiate_generate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    state, scale = ctx.saved_tensors
    with lowering_mode(ctx.mode):
        asked = None if torch.is_grad_enabled() else asked_for(ctx)
        if asked is False:
            return None, None, None
        if not asked or not collects(grad, state, scale, ctx.view):
            return torch.ops.fxrpg.accumulate.default(grad, state, scale, ctx.view), None, None
        ctx.collector.add(lambda into: add_gradient(into, grad, state, scale, ctx.view))
        return None, None, None


def _save_accumulate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _grad, state, scale, ctx.view = inputs
    ctx.save_for_backward(state, scale)


def _differentiate_accumulate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # accumulate is linear in the weight's gradient; how it depends on the state is of no smooth kind
    return torch.ops.fxrpg.tangent.default(grad, *ctx.saved_tensors, ctx.view), None, None, None


def _save_tangent(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _direction, state, scale, ctx.view = inputs
    ctx.save_for_backward(state, scale)


def _differentiate_tangent(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.fxrpg.accumulate.default(grad, *ctx.saved_tensors, ctx.view), None, None, None


def _plain_accumulate(grad: Tensor, state: Tensor, scale: Tensor, view: str) -> Tensor:
    """The adjoint as the gradient of a linear map; torch.func differentiates it again."""
    pull: Any = torch.func.vjp(lambda s: plain_weight(s, scale, view), state)[1]
    return pull(grad)[0]


def _plain_tangent(direction: Tensor, state: Tensor, scale: Tensor, view: str) -> Tensor:
    return torch.func.jvp(lambda s: plain_weight(s, scale, view), (state,), (direction,))[1]


_generate_kernel = autograd_kernel(
    torch.ops.fxrpg.generate.default, _save_generate, _differentiate_generate, plain_weight, state=0
)
_accumulate_kernel = autograd_kernel(
    torch.ops.fxrpg.accumulate.default, _save_accumulate, _differentiate_accumulate, _plain_accumulate
)
_tangent_kernel = autograd_kernel(
    torch.ops.fxrpg.tangent.default, _save_tangent, _differentiate_tangent, _plain_tangent
)
LIBRARY.impl("generate", _generate, "Autograd")
LIBRARY.impl("tangent", _tangent_kernel, "Autograd")
LIBRARY.impl("accumulate", _accumulate_kernel, "Autograd")
