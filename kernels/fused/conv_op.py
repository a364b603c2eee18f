"""The op `fxrpg.conv` on fused kernels: which of them runs, and in which layout its images lie."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fxrpg.dispatch import NARROW, Choice
from fxrpg.kernels.conv import output_size
from fxrpg.kernels.fused import conv, depthwise, linear
from fxrpg.kernels.fused.conv import Geometry, weight_layout
from fxrpg.kernels.fused.epilogue import Epilogue
from fxrpg.kernels.fused.weight import Weight
from fxrpg.view import View


def forward(choice: Choice, where: Any, xs: Any, finish: Any, config: Any) -> Tensor:
    """The op with an epilogue; see `fusing.forward`. The output is channels_last where x is."""
    view, state, scale = where
    weight, epilogue = Weight.of(view, state, scale, choice.tables), Epilogue(*finish)
    geometry, dims = _with_two_axes(config), len(config[0])
    x = _as_images(xs[0], dims)
    if _is_matrix_product(x, view, geometry):
        rows = linear.multiply(weight, x.permute(0, 2, 3, 1), choice.tile, False, epilogue)
        return _as_given(rows.permute(0, 3, 1, 2).contiguous(memory_format=suggest_memory_format(x)), xs[0], dims)
    kernel = (1,) * (2 - dims) + tuple(view.shape[2:])
    size = output_size(x.shape[2:], kernel, *geometry[:3], geometry.output_padding, geometry.transposed)
    channels = view.shape[1] * geometry.groups if geometry.transposed else view.shape[0]
    y = _empty((x.shape[0], channels, *size), x)
    _kernels(x, y, geometry).convolve(y, x, weight, geometry, choice.tile, False, epilogue)
    return _as_given(y, xs[0], dims)


def input_grad(choice: Choice, where: Any, grad: Tensor, xs: Any, config: Any) -> Tensor:
    """The gradient of x, in x's layout."""
    view, state, scale = where
    weight = Weight.of(view, state, scale, choice.tables)
    geometry, dims = _with_two_axes(config), len(config[0])
    x, grad = _as_images(xs[0], dims), _as_images(grad, dims)
    if _is_matrix_product(grad, view, geometry):
        rows = linear.multiply(weight, grad.permute(0, 2, 3, 1), choice.tile, True)
        return _as_given(rows.permute(0, 3, 1, 2).contiguous(memory_format=suggest_memory_format(x)), xs[0], dims)
    dx = _empty(tuple(x.shape), x)
    _kernels(x, grad, geometry).convolve(dx, grad, weight, geometry, choice.tile, True)
    return _as_given(dx, xs[0], dims)


def state_grad(choice: Choice, where: Any, grad: Tensor, xs: Any, config: Any) -> Tensor:
    """The gradient of the state, float32."""
    view, state, scale = where
    weight = Weight.of(view, state, scale)
    geometry, dims = _with_two_axes(config), len(config[0])
    x, grad = _as_images(xs[0], dims), _as_images(grad, dims)
    inner, _, group_columns = weight_layout(view, geometry)
    form, found = weight.gradient(math.gcd(choice.tile.k, inner, group_columns), x.dtype)
    _kernels(x, grad, geometry).state_grad(form, weight, grad, x, geometry, choice.tile)
    return found


def _kernels(x: Tensor, y: Tensor, geometry: Geometry) -> Any:
    """The module whose kernels fit: one channel a group needs no matrix product."""
    return depthwise if geometry.groups > 1 and geometry.groups == x.shape[1] == y.shape[1] else conv


def _is_matrix_product(x: Tensor, view: View, geometry: Geometry) -> bool:
    """Whether the op is a linear layer on the channels of each position, which lie together."""
    plain = not geometry.transposed and geometry.groups == 1 and view.fan_in == view.shape[1]
    still = all(s == 1 for s in geometry.stride) and not any(geometry.padding)
    return plain and still and x.permute(0, 2, 3, 1).is_contiguous()


def _with_two_axes(config: Any) -> Geometry:
    """The op's config for images; that of one axis gets a first one that does nothing."""
    stride, padding, dilation, transposed, output_padding, groups = config
    if len(stride) == 2:
        return Geometry(*config)
    return Geometry([1, *stride], [0, *padding], [1, *dilation], transposed, [0, *output_padding], groups)


def _as_images(x: Tensor, dims: int) -> Tensor:
    """[N, C, H, W] from a batch or a single one of images or of lines; places within an image fit 32 bits, as kernels count."""
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    x = x if dims == 2 else x.unsqueeze(2)
    reach = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    return x if reach < NARROW else x.contiguous()


def _as_given(y: Tensor, x: Tensor, dims: int) -> Tensor:
    """`y` [N, C, H, W] with the dimensions that the op's input has."""
    y = y if dims == 2 else y.squeeze(2)
    return y if x.dim() == dims + 2 else y.squeeze(0)


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uninitialised images in the layout that torch's convolutions, and their fake kernels, give what they make of `like`."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=suggest_memory_format(like))
