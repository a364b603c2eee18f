"""Grouped products: every run of rows with a matrix of its own, as the experts of a mixture take them."""

from __future__ import annotations

from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from fxrpg.lowering import Generated, NotLowered, lowers
from fxrpg.roles import Role
from fxrpg.staging import DenseOp, define_staged_op


def grouped_ref(x: Tensor, offs: Tensor, weight: Tensor, bias: None) -> Tensor:
    """Rows offs[g - 1] .. offs[g] - 1 of x [rows, in] times W[g] of W [groups, in, out]."""
    if _alone(x):
        return torch.einsum("ri,rg,gio->ro", x, _groups(x, offs), weight)
    return torch._grouped_mm(x.contiguous(), weight, offs=offs.contiguous())


def grouped_input_grads(grad: Tensor, xs: tuple[Tensor, Tensor], weight: Tensor, needed: list[bool]) -> list:
    return [grouped_ref(grad, xs[1], weight.mT, None), None]


def grouped_weight_grad(grad: Tensor, xs: tuple[Tensor, Tensor], shape: tuple[int, ...]) -> Tensor:
    if _alone(grad):
        return torch.einsum("ri,rg,ro->gio", xs[0], _groups(*xs), grad)
    return torch._grouped_mm(xs[0].contiguous().t(), grad.contiguous(), offs=xs[1].contiguous())


def _alone(x: Tensor) -> bool:
    """Whether torch's own op cannot take `x`: float64, and fake tensors of any type but bfloat16."""
    return x.dtype == torch.float64 or type(x) is not Tensor


def _groups(x: Tensor, offs: Tensor) -> Tensor:
    """Which group each row belongs to, as zeros and ones [rows, groups]."""
    group = torch.searchsorted(offs.contiguous(), torch.arange(len(x), device=x.device, dtype=offs.dtype), right=True)
    return (group[:, None] == torch.arange(len(offs), device=x.device)).to(x.dtype)


def grouped_flops(xs: list, weight: tuple[int, ...], out: tuple[int, ...]) -> int:
    return 2 * prod(xs[0]) * out[-1]


define_staged_op(
    DenseOp(
        name="grouped",
        inputs=("x", "offs"),
        config="",
        forward=grouped_ref,
        input_grads=grouped_input_grads,
        weight_grad=grouped_weight_grad,
        flops=grouped_flops,
    )
)


def grouped_role(shape: tuple[int, ...], *_: Any) -> Role | None:
    """A stack of matrices [groups, in, out]."""
    return Role("linear", (0, 2, 1), 1 / sqrt(3 * shape[1]), 1) if len(shape) == 3 else None


@lowers(torch._grouped_mm, keyword="mat2", role=grouped_role)
@lowers(torch.nn.functional.grouped_mm, keyword="mat_b", role=grouped_role)
def grouped_mm(mat_a: Any, weight: Generated, *, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    if offs is None or bias is not None or out_dtype is not None or len(weight.shape) != 3:
        raise NotLowered(
            "a grouped product is lowered for rows in groups, each with a matrix, without bias or out_dtype"
        )
    return torch.ops.fxrpg.grouped.default(mat_a, offs, None, *weight[:3])
