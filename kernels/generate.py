"""The ops that turn a view into a full weight and a weight's gradient into the state's: what nothing else could lower."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx.traceback as traceback
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

from fxrpg.generator import View
from fxrpg.lowering import LIBRARY, accumulate_gradient, generate_weight

LIBRARY.define("generate(Tensor state, Tensor scale, str view) -> Tensor")
LIBRARY.define("accumulate(Tensor grad, Tensor state, Tensor scale, str view) -> Tensor")
LIBRARY.impl("generate", generate_weight, "CompositeExplicitAutograd")
LIBRARY.impl("accumulate", accumulate_gradient, "CompositeExplicitAutograd")


@torch.library.register_fake("fxrpg::generate", lib=LIBRARY)
def generate_fake(state: Tensor, scale: Tensor, view: str) -> Tensor:
    return state.new_empty(View.parse(view).shape)


@torch.library.register_fake("fxrpg::accumulate", lib=LIBRARY)
def accumulate_fake(grad: Tensor, state: Tensor, scale: Tensor, view: str) -> Tensor:
    return torch.empty_like(state)


class _Generate(torch.autograd.Function):
    """Autograd of `generate`: saves the state, never the weight."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, scale: Tensor, view: str) -> Tensor:
        ctx.save_for_backward(state, scale)
        ctx.view = view
        with torch._C._AutoDispatchBelowAutograd(), _recomputed_in_backward():
            return torch.ops.fxrpg.generate.default(state, scale, view)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        state, scale = ctx.saved_tensors
        return torch.ops.fxrpg.accumulate.default(grads[0], state, scale, ctx.view), None, None


LIBRARY.impl("generate", _Generate.apply, "Autograd")


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


def _save_accumulate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.view = inputs[3]


def _differentiate_accumulate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # accumulate is linear in the weight's gradient, and generate is its adjoint
    return torch.ops.fxrpg.generate.default(grad, ctx.saved_tensors[0], ctx.view), None, None, None


torch.library.register_autograd(
    "fxrpg::accumulate", _differentiate_accumulate, setup_context=_save_accumulate, lib=LIBRARY
)
