"""Where weights come to be: the weight of a view from the state, and the state's gradient from the weight's.

Each is made by what is there: Triton kernels, C code on the CPU, or the generator itself in plain torch, to the same bits.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from fxrpg import native
from fxrpg.lowering import current_mode, kernels_wanted
from fxrpg.view import View


def native_wanted(view: View, *tensors: Tensor) -> bool:
    """Whether C code generates the view on the CPU: in every mode but the reference's, unless Triton's interpreter does."""
    mode = current_mode()
    if not view.generator.native or mode == "materialized" or kernels_wanted(tensors[0].device):
        return False
    return native.wanted(*tensors)


def encode_scales(values: Tensor) -> Tensor:
    """The buffer `fxrpg_scale` for positive scales of 16 significant bits: float32 [n, 3], rows (high, low, exponent).

    A scale is (256 * high + low) * 2^exponent. All entries are integers of at most eight bits, which every floating type
    holds exactly: no cast of the model, no average over equal models, changes a scale.
    """
    mantissa, exponent = torch.frexp(values.to(torch.float64).cpu())
    whole = torch.round(mantissa * (1 << 16))
    high = torch.floor(whole / 256)
    return torch.stack([high, whole - 256 * high, exponent.to(torch.float64) - 16], 1).to(torch.float32)


def decode_scales(buffer: Tensor) -> Tensor:
    """The scales that rows (high, low, exponent) stand for, float32, of shape [n] (or [] for one row)."""
    high, low, exponent = buffer.to(torch.float32).round().unbind(-1)
    return torch.ldexp(high * 256 + low, exponent)


def scale_of(scale: Tensor, view: View) -> Tensor:
    """The layer's scale, a 0-dimensional float32 tensor."""
    return decode_scales(scale[view.tensor])


def weight_dtype(state: Tensor, scale: Tensor) -> torch.dtype:
    """The type of weights: the state's; of a frozen state, which is bytes, that of the scales, which casts follow too."""
    return state.dtype if state.is_floating_point() else scale.dtype


def generate_weight(state: Tensor, scale: Tensor, text: str, dtype: torch.dtype | None = None) -> Tensor:
    """The weight of the view `text`, scaled, in `dtype` (`weight_dtype` by default).

    The scale is one float32 multiplication (float64 for float64), then one rounding to `dtype`.
    """
    return made(View.parse(text), state, scale, dtype or weight_dtype(state, scale))


def made(view: View, state: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Every generated weight, whole or a part, is a result of this function, but for those of `plain_weight`."""
    if kernels_wanted(state.device) and view.whole is view and not view.ranks:
        found = importlib.import_module(view.generator.pair).generate(view, state.detach(), scale, dtype)
        if found is not None:
            return found
    if native_wanted(view, state, scale):
        whole = view if view.parent else view.whole
        found = importlib.import_module(view.generator.native).generate(
            whole, state.detach(), _factor(scale, view), dtype
        )
        if found is not None:
            return found if view.parent else view.narrowed(found)
    if view.parent:
        values = view.generator.materialize_part(state, view, dtype)
    else:
        values = view.narrowed(view.generator.materialize(state, view.whole, dtype))
    if dtype.itemsize >= 4:
        return values.mul_(_factor(scale, view))
    return values.float().mul_(_factor(scale, view)).to(dtype)


def _factor(scale: Tensor, view: View) -> Any:
    """The layer's scale as something to multiply by: on the CPU a number, which takes fewer small ops than a tensor."""
    if scale.device.type != "cpu" or torch._C._len_torch_dispatch_stack():
        return scale_of(scale, view)
    high, low, exponent = scale[view.tensor].tolist()
    return math.ldexp(256 * round(high) + round(low), round(exponent))


def plain_weight(state: Tensor, scale: Tensor, text: str, dtype: torch.dtype | None = None) -> Tensor:
    """`generate_weight` in plain torch ops that autograd and torch.func follow: slow, saves what it likes, the reference."""
    if not state.is_floating_point():
        return generate_weight(state, scale, text, dtype)  # frozen: nothing to follow
    view = View.parse(text)
    wide = torch.promote_types(state.dtype, torch.float32)
    values = view.narrowed(view.generator.reference(state, view.whole))
    return (values.to(wide) * scale_of(scale, view).to(wide)).to(dtype or state.dtype)


def accumulate_gradient(grad: Tensor, state: Tensor, scale: Tensor, text: str) -> Tensor:
    """Gradient of the state from the gradient of the scaled weight: summed in float32 (float64 for float64)."""
    view = View.parse(text)
    wide = torch.promote_types(grad.dtype, torch.promote_types(state.dtype, torch.float32))
    grad = grad.to_dense() if grad.layout != torch.strided else grad
    if native_wanted(view, grad, state, scale):
        found = _native_gradient(None, grad.to(wide), state, scale, view)
        if found is not None:
            return as_stored(found, state)
    scaled = grad.to(wide) * scale_of(scale, view)
    if view.parent:
        return as_stored(view.generator.accumulate_part(scaled, state, view), state)
    scaled = view.widened(scaled)
    if kernels_wanted(state.device) and view.whole is view and wide == torch.float32 and not view.ranks:
        found = importlib.import_module(view.generator.pair).accumulate(scaled, state.detach(), view)
        if found is not None:
            return as_stored(found, state)
    return as_stored(view.generator.accumulate(scaled, state, view.whole), state)


def collects(grad: Tensor, state: Tensor, scale: Tensor, text: str) -> bool:
    """Whether `add_gradient` takes the gradient of a weight."""
    view = View.parse(text)
    wide = torch.promote_types(grad.dtype, torch.float32)
    return view.generator.collects and wide == state.dtype and native_wanted(view, grad, state, scale)


def add_gradient(into: Tensor | None, grad: Tensor, state: Tensor, scale: Tensor, text: str) -> Tensor:
    """`into`, a gradient of the state (None is zero), with what `accumulate_gradient` finds added; in place if it can be."""
    found = _native_gradient(into, grad.to(state.dtype), state, scale, View.parse(text))
    if found is not None:
        return found
    part = accumulate_gradient(grad, state, scale, text)
    return part if into is None else into.add_(part)


def _native_gradient(into: Tensor | None, grad: Tensor, state: Tensor, scale: Tensor, view: View) -> Tensor | None:
    """`into` with the gradient of the state added by C code, or that alone; None where no C code covers it."""
    whole, widened = (view, grad) if view.parent else (view.whole, view.widened(grad))
    module = importlib.import_module(view.generator.native)
    return module.accumulate(into, widened, state.detach(), whole, _factor(scale, view))


def as_stored(grad: Tensor, state: Tensor) -> Tensor:
    """A gradient in the type and the layout of its state: scores of a channels_last model are channels_last too."""
    same = (grad.dtype, grad.stride()) == (state.dtype, state.stride())
    return grad if same else torch.empty_like(state).copy_(grad)


def tangent_weight(direction: Tensor, state: Tensor, scale: Tensor, text: str) -> Tensor:
    """The derivative of the scaled weight along a direction of the state: the adjoint of `accumulate_gradient`."""
    view = View.parse(text)
    values = view.narrowed(view.generator.tangent(direction, state.detach(), view.whole))
    return values * scale_of(scale, view).to(values.dtype)
