"""A stored weight behind the interface of generated ones: the baseline of budgets and benches, and a gradient's workspace."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxrpg.tiles.rounding import cast
from fxrpg.view import Form


class DenseSpec(NamedTuple):
    """What kernels specialise on: whether the number of columns is a multiple of 16, and addresses need 64 bits."""

    even: bool
    wide: bool


@triton.jit
def dense_begin(args, SPEC: tl.constexpr):
    """args: (matrix [rows, columns], contiguous; int64 [1], its columns)."""
    columns = tl.load(args[1])
    if not SPEC.wide:
        columns = columns.to(tl.int32)
    if SPEC.even:
        columns = tl.multiple_of(columns, 16)
    return (args[0], columns)


@triton.jit
def _places(rows, col0, WIDTH: tl.constexpr, form):
    return rows[:, None].to(form[1].dtype) * form[1] + (col0 + tl.arange(0, WIDTH))[None, :]


@triton.jit
def dense_tile(rows, col0, WIDTH: tl.constexpr, form, SPEC: tl.constexpr, DTYPE: tl.constexpr):
    """Stored values of a tile, which must lie in the matrix."""
    return cast(tl.load(form[0] + _places(rows, col0, WIDTH, form)), DTYPE)


@triton.jit
def dense_accumulate(grad, mask, rows, col0, WIDTH: tl.constexpr, form, SPEC: tl.constexpr):
    """Store a tile's gradient: every element belongs to one tile, so nothing is added."""
    tl.store(form[0] + _places(rows, col0, WIDTH, form), grad, mask=mask)


def dense_form(matrix: Tensor) -> Form:
    """The form of a contiguous matrix [rows, columns]."""
    columns = matrix.shape[1]
    numbers = torch.full((1,), columns, dtype=torch.int64, device=matrix.device)
    spec = DenseSpec(columns % 16 == 0, matrix.numel() >= 1 << 31)
    return Form(dense_begin, dense_tile, dense_accumulate, (matrix, numbers), spec)
