"""Bilinear layers."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxrpg.lowering import Generated, compiles, lowers
from fxrpg.roles import bilinear_role
from fxrpg.staging import DenseOp, define_staged_op

aten = torch.ops.aten


def bilinear_ref(x1: Tensor, x2: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y_k = x1^T W_k x2 + bias_k for W [out, in1, in2]; x1 is [..., in1], x2 is [..., in2]."""
    return F.bilinear(x1, x2, weight, bias)


def bilinear_input_grads(grad: Tensor, xs: tuple[Tensor, Tensor], weight: Tensor, needed: list[bool]) -> list:
    x1, x2 = xs
    dx1 = torch.einsum("...k,kij,...j->...i", grad, weight, x2) if needed[0] else None
    dx2 = torch.einsum("...k,kij,...i->...j", grad, weight, x1) if needed[1] else None
    return [dx1, dx2]


def bilinear_weight_grad(grad: Tensor, xs: tuple[Tensor, Tensor], shape: tuple[int, ...]) -> Tensor:
    return torch.einsum("...k,...i,...j->kij", grad, *xs)


def bilinear_bias_grad(grad: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0)


def bilinear_flops(xs: list, weight: tuple[int, ...], out: tuple[int, ...]) -> int:
    return 2 * prod(xs[0][:-1]) * (prod(weight) + weight[0] * weight[2])


define_staged_op(
    DenseOp(
        name="bilinear",
        inputs=("x1", "x2"),
        config="",
        forward=bilinear_ref,
        input_grads=bilinear_input_grads,
        weight_grad=bilinear_weight_grad,
        bias_grad=bilinear_bias_grad,
        flops=bilinear_flops,
        autocast="state",
    )
)


@lowers(F.bilinear, aten.bilinear.default, position=2, role=bilinear_role)
def bilinear(input1: Any, input2: Any, weight: Generated, bias: Any = None) -> Any:
    return torch.ops.fxrpg.bilinear.default(input1, input2, bias, *weight[:3])


@compiles(nn.Bilinear)
def bilinear_layer(layer: nn.Bilinear, weight: Generated, input1: Tensor, input2: Tensor) -> Tensor:
    return bilinear(input1, input2, weight, layer.bias)
