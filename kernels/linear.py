"""Linear layers, and the matrix products that are linear layers in other words."""

from __future__ import annotations

import operator
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxrpg.dispatch import Problem
from fxrpg.epilogue import define_epilogue_op
from fxrpg.kernels.contraction import product, product_role
from fxrpg.lowering import Generated, NotLowered, compiles, lowers, shape_of
from fxrpg.roles import Role, linear_role
from fxrpg.staging import DenseOp, define_staged_op
from fxrpg.view import View

aten = torch.ops.aten


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """y = x W^T + bias for W [out, in]; with `transposed`, y = x W + bias for W [in, out]. x is [..., in]."""
    return F.linear(x, weight.t() if transposed else weight, bias)


def linear_input_grads(grad: Tensor, xs: tuple[Tensor], weight: Tensor, needed: list[bool], transposed: bool) -> list:
    matrix = weight.t() if transposed else weight
    # in one matrix: of a gradient that is not contiguous (attention's), matmul would make a batch of small products
    return [(grad.reshape(-1, grad.shape[-1]) @ matrix).view(*grad.shape[:-1], matrix.shape[1])]


def linear_weight_grad(grad: Tensor, xs: tuple[Tensor], shape: tuple[int, ...], transposed: bool) -> Tensor:
    rows, inputs = grad.reshape(-1, grad.shape[-1]), xs[0].reshape(-1, xs[0].shape[-1])
    return inputs.t() @ rows if transposed else rows.t() @ inputs


def linear_bias_grad(grad: Tensor, transposed: bool) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0)


def linear_flops(xs: list, weight: tuple[int, ...], out: tuple[int, ...], transposed: bool) -> int:
    return 2 * prod(out) * xs[0][-1]


def reads_columns(view: View, transposed: bool) -> bool:
    """Whether the columns of the weight as a matrix in logical order meet those of x; else its rows do."""
    return (view.order == (0, 1)) != transposed


def linear_problem(
    direction: str, xs: tuple[Tensor], view: View, dtype: torch.dtype, transposed: bool
) -> Problem | str:
    """The op as `dispatch.choose` takes it."""
    rows, columns = view.count // view.fan_in, view.fan_in
    if not xs[0].dim() or xs[0].shape[-1] != (columns if reads_columns(view, transposed) else rows):
        return "the input does not fit the weight"
    positions = xs[0].numel() // xs[0].shape[-1]
    if not positions:
        return "an empty batch"
    if direction == "state_grad" or reads_columns(view, transposed) == (direction == "forward"):
        sides = {"outputs": rows, "positions": positions, "terms": columns}
    else:
        sides = {"outputs": columns, "positions": positions, "terms": rows}
    return Problem(op="linear", direction=direction, **sides, weights=view.count, step=64, dtype=dtype)


define_staged_op(
    DenseOp(
        name="linear",
        inputs=("x",),
        config="bool transposed",
        forward=linear_ref,
        input_grads=linear_input_grads,
        weight_grad=linear_weight_grad,
        bias_grad=linear_bias_grad,
        flops=linear_flops,
        fused="fxrpg.kernels.fused.linear",
        problem=linear_problem,
        channels=lambda view, transposed: view.shape[1 if transposed else 0],
    )
)
define_epilogue_op("linear", channel_axis=lambda *config: -1, layers=(nn.Linear,))


def matmul_role(shape: tuple[int, ...], transposed: bool, *operands: Any) -> Role | None:
    """In x @ W the matrix W is [in, out]."""
    return linear_role(shape, not transposed) if len(shape) == 2 else product_role(1)(shape, transposed, *operands)


@lowers(F.linear, aten.linear.default, transposable=True, role=linear_role)
def linear(input: Any, weight: Generated, bias: Any = None) -> Any:
    if isinstance(input, Tensor) and input.layout != torch.strided:
        raise NotLowered(f"linear is lowered for strided tensors, found {input.layout}")
    return torch.ops.fxrpg.linear.default(input, bias, *weight[:3], weight.transposed)


@lowers(
    torch.matmul, Tensor.matmul, Tensor.__matmul__, operator.matmul, aten.matmul.default,
    keyword="other", transposable=True, role=matmul_role,
)  # fmt: skip
@lowers(torch.mm, Tensor.mm, aten.mm.default, keyword="mat2", transposable=True, role=matmul_role)
def matmul(input: Any, weight: Generated) -> Any:
    """x @ W: for a matrix W a linear layer whose weight is seen as [in, out]."""
    if len(weight.shape) != 2:
        return product(input, weight, 1)
    return torch.ops.fxrpg.linear.default(input, None, *weight[:3], not weight.transposed)


@lowers(
    torch.addmm, aten.addmm.default,
    position=2, keyword="mat2", transposable=True, role=matmul_role, bias="input",
)  # fmt: skip
def addmm(input: Any, mat1: Any, weight: Generated, *, beta: float = 1, alpha: float = 1) -> Any:
    """bias + x @ W, as torch.export and GPT-2's Conv1D write a linear layer."""
    if beta != 1 or alpha != 1:
        raise NotLowered(f"addmm is lowered for beta = alpha = 1, found beta = {beta}, alpha = {alpha}")
    if len(shape_of(input) or ()) != 1:
        raise NotLowered("addmm is lowered for a bias that is known to have 1 dimension")
    return torch.ops.fxrpg.linear.default(mat1, input, *weight[:3], not weight.transposed)


@compiles(nn.Linear)
def linear_layer(layer: nn.Linear, weight: Generated, input: Tensor) -> Tensor:
    return linear(input, weight, layer.bias)
