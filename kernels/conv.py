"""Convolutions of one to three dimensions, transposed, grouped and depthwise ones included."""

from __future__ import annotations

from math import gcd, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxrpg.dispatch import NARROW, Problem
from fxrpg.epilogue import define_epilogue_op
from fxrpg.lowering import Generated, compiles, lowers
from fxrpg.roles import Role, conv_role
from fxrpg.staging import DenseOp, define_staged_op
from fxrpg.view import View

aten = torch.ops.aten


CONVS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED_CONVS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
CONV_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_LAYERS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def conv_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    """torch's convolution of as many dimensions as `stride` has. x is [N, C, *spatial] or [C, *spatial]."""
    if transposed:
        return TRANSPOSED_CONVS[len(stride) - 1](x, weight, bias, stride, padding, output_padding, groups, dilation)
    return CONVS[len(stride) - 1](x, weight, bias, stride, padding, dilation, groups)


def conv_input_grads(grad: Tensor, xs: tuple[Tensor], weight: Tensor, needed: list[bool], *config: Any) -> list:
    grad, x = _batched(grad, weight.dim()), _batched(xs[0], weight.dim())
    dx = aten.convolution_backward.default(grad, x, weight, None, *config, [True, False, False])[0]
    return [dx.view(xs[0].shape) if dx.dim() != xs[0].dim() else dx]


def conv_weight_grad(grad: Tensor, xs: tuple[Tensor], shape: tuple[int, ...], *config: Any) -> Tensor:
    grad, x = _batched(grad, len(shape)), _batched(xs[0], len(shape))
    weight = x.new_empty(shape)  # only its sizes are read
    return aten.convolution_backward.default(grad, x, weight, None, *config, [False, True, False])[1]


def conv_bias_grad(grad: Tensor, stride: list[int], *config: Any) -> Tensor:
    return _batched(grad, len(stride) + 2).transpose(0, 1).flatten(1).sum(1)


def _batched(x: Tensor, dims: int) -> Tensor:
    return x if x.dim() == dims else x.unsqueeze(0)


def conv_flops(xs: list, weight: tuple[int, ...], out: tuple[int, ...], *config: Any) -> int:
    """Every position of the smaller image, that which is not upsampled, meets every weight once."""
    transposed, dims = config[3], len(weight) - 2
    image = xs[0] if transposed else out
    batch = image[0] if len(image) == dims + 2 else 1
    return 2 * batch * prod(image[-dims:]) * prod(weight)


def conv_problem(
    direction: str, xs: tuple[Tensor], view: View, dtype: torch.dtype, stride: list[int], padding: list[int],
    dilation: list[int], transposed: bool, output_padding: list[int], groups: int,
) -> Problem | str:  # fmt: skip
    """The op as `dispatch.choose` takes it."""
    dims = len(stride)
    if dims > 2:
        return "convolutions of three dimensions have no fused kernel"
    x, kernel, (inputs, outputs) = xs[0], view.shape[2:], _channels(view, transposed, groups)
    if not _fits(x, view, stride, padding, dilation, transposed, output_padding, groups):
        return "the input or the settings do not fit the weight"
    image = output_size(x.shape[-dims:], kernel, stride, padding, dilation, output_padding, transposed)
    batch = x.shape[0] if x.dim() == dims + 2 else 1
    there, back = batch * prod(image), batch * prod(x.shape[-dims:])
    if not there * back * view.count:
        return "an empty batch"
    if max(prod(image) * outputs, prod(x.shape[-dims:]) * inputs) >= NARROW:
        return "one image is larger than a kernel counts"
    inner = view.shape[view.order[-1]]
    kind = "depthwise" if groups == inputs == outputs and groups > 1 else "conv"
    if direction == "input_grad":
        sides = {"outputs": inputs // groups, "positions": back, "terms": outputs // groups}
    else:
        positions = back if direction == "state_grad" and transposed else there
        sides = {"outputs": outputs // groups, "positions": positions, "terms": inputs // groups}
    if kind == "depthwise":
        sides |= {"outputs": outputs, "terms": 1}
    return Problem(
        op=kind, direction=direction, **sides, taps=prod(kernel), weights=view.count,
        step=gcd(64, inner, inner // groups if transposed else 0), dtype=dtype,
    )  # fmt: skip


def _fits(
    x: Tensor, view: View, stride: list[int], padding: list[int], dilation: list[int], transposed: bool,
    output_padding: list[int], groups: int,
) -> bool:  # fmt: skip
    """Whether torch's own op would take the call: a kernel reads what it is told to, so torch is to raise its error."""
    kernel, dims = view.shape[2:], len(stride)
    settings = (kernel, padding, dilation, output_padding)
    if x.dim() not in (dims + 1, dims + 2) or any(len(values) != dims for values in settings):
        return False
    if min(groups, *stride, *dilation) < 1 or min(padding) < 0 or view.shape[0] % groups:
        return False
    if transposed and any(not 0 <= o < max(s, d) for o, s, d in zip(output_padding, stride, dilation, strict=True)):
        return False
    size = output_size(x.shape[-dims:], kernel, stride, padding, dilation, output_padding, transposed)
    return x.shape[-dims - 1] == _channels(view, transposed, groups)[0] and min(size) > 0


def _channels(view: View, transposed: bool, groups: int) -> tuple[int, int]:
    """(inputs, outputs) of all groups."""
    first, second = view.shape[:2]
    return (first, second * groups) if transposed else (second * groups, first)


def output_size(
    image: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, output_padding: Any, transposed: bool
) -> list[int]:
    """The spatial shape of the output."""
    found = []
    for n, k, s, p, d, o in zip(image, kernel, stride, padding, dilation, output_padding, strict=True):
        reach = d * (k - 1) + 1
        found.append((n - 1) * s - 2 * p + reach + o if transposed else (n + 2 * p - reach) // s + 1)
    return found


define_staged_op(
    DenseOp(
        name="conv",
        inputs=("x",),
        config="int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups",
        forward=conv_ref,
        input_grads=conv_input_grads,
        weight_grad=conv_weight_grad,
        bias_grad=conv_bias_grad,
        flops=conv_flops,
        fused="fxrpg.kernels.fused.conv_op",
        problem=conv_problem,
        channels=lambda view, *config: _channels(view, config[3], config[5])[1],
    )
)
define_epilogue_op("conv", channel_axis=lambda stride, *_: -1 - len(stride), layers=(*CONV_LAYERS, *TRANSPOSED_LAYERS))


def transposed_role(shape: tuple[int, ...], *_: Any) -> Role:
    """The weight of a transposed convolution is [in, out / groups, *kernel]."""
    return conv_role(shape, transposed=True)


def convolution_role(shape: tuple[int, ...], transposed: bool, *call: Any) -> Role:
    """`aten.convolution` tells by its seventh argument which of the two it is."""
    return conv_role(shape, transposed=bool(call[6]))


@lowers(F.conv1d, aten.conv1d.default, aten.conv1d.padding, role=conv_role)
@lowers(F.conv2d, aten.conv2d.default, aten.conv2d.padding, role=conv_role)
@lowers(F.conv3d, aten.conv3d.default, aten.conv3d.padding, role=conv_role)
def conv(
    input: Any,
    weight: Generated,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    dims = len(weight.shape) - 2
    dilation = _tuple(dilation, dims)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        input, padding = _pad_same(input, weight.shape[2:], dilation)
    lists = (_tuple(stride, dims), _tuple(padding, dims), dilation, False, [0] * dims)
    return torch.ops.fxrpg.conv.default(input, bias, *weight[:3], *lists, groups)


@lowers(F.conv_transpose1d, aten.conv_transpose1d.default, role=transposed_role)
@lowers(F.conv_transpose2d, aten.conv_transpose2d.input, role=transposed_role)
@lowers(F.conv_transpose3d, aten.conv_transpose3d.input, role=transposed_role)
def conv_transpose(
    input: Any,
    weight: Generated,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    dims = len(weight.shape) - 2
    lists = (_tuple(stride, dims), _tuple(padding, dims), _tuple(dilation, dims), True, _tuple(output_padding, dims))
    return torch.ops.fxrpg.conv.default(input, bias, *weight[:3], *lists, groups)


@lowers(aten.convolution.default, role=convolution_role)
def convolution(input: Any, weight: Generated, bias: Any, *config: Any) -> Any:
    return torch.ops.fxrpg.conv.default(input, bias, *weight[:3], *config)


def _tuple(value: Any, dims: int) -> list[int]:
    """`value` once per spatial dimension, as torch reads an int or a sequence of one."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _pad_same(input: Any, kernel: tuple[int, ...], dilation: list[int]) -> tuple[Any, list[int]]:
    """padding="same": the even part as padding of the op, an odd rest on the right as torch does."""
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    rest = [t % 2 for t in total]
    if any(rest):
        input = F.pad(input, [n for r in reversed(rest) for n in (0, r)])
    return input, [t // 2 for t in total]


@compiles(*CONV_LAYERS)
def conv_layer(layer: Any, weight: Generated, input: Tensor) -> Tensor:
    padding = layer.padding
    if layer.padding_mode != "zeros":
        input, padding = F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    return conv(input, weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)


@compiles(*TRANSPOSED_LAYERS)
def conv_transpose_layer(layer: Any, weight: Generated, input: Tensor, output_size: list[int] | None = None) -> Tensor:
    dims = len(layer.kernel_size)
    output_padding = layer._output_padding(
        input, output_size, layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation
    )
    where = (layer.stride, layer.padding, output_padding, layer.groups, layer.dilation)
    return conv_transpose(input, weight, layer.bias, *where)
