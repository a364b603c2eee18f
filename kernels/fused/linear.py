"""Matrix products with a generated weight: forward, the input's gradient, and the state's, none of which stores a weight.

The weight is the left operand, [outputs, terms]: its values go from the registers where they are made to the product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxrpg.dispatch import Choice, Tile
from fxrpg.kernels.fused.epilogue import Epilogue, finished
from fxrpg.kernels.fused.generate import layer_scale
from fxrpg.kernels.fused.launch import cdiv, launch
from fxrpg.kernels.fused.weight import Weight, precision
from fxrpg.kernels.linear import reads_columns
from fxrpg.tiles.rounding import cast, masked, product
from fxrpg.view import Form


@triton.jit
def weight_tile(
    row0, column0, n, n0, k0, terms, form, TILE: tl.constexpr, SPEC: tl.constexpr, DTYPE: tl.constexpr,
    TRANSPOSED: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Values for outputs and the terms k0 .. k0 + BLOCK_K - 1, [BLOCK_N, BLOCK_K]; zero past the last term.

    Of the part of the weight that begins at (row0, column0). Its rows are the outputs `n`; if TRANSPOSED, its columns are,
    from n0 on, and its rows are the terms.
    """
    k = k0 + tl.arange(0, BLOCK_K)
    if TRANSPOSED:
        weight = tl.trans(TILE(row0 + tl.minimum(k, terms - 1), column0 + n0, BLOCK_N, form, SPEC, DTYPE))
    else:
        weight = TILE(row0 + n, column0 + k0, BLOCK_K, form, SPEC, DTYPE)
    if MASKED:
        weight = masked(weight, (k < terms)[None, :])
    return weight


@triton.jit
def linear_kernel(
    y, x, bias, factor, shift, scale, slot, positions, outputs, terms, terms_each,
    BEGIN: tl.constexpr, TILE: tl.constexpr, args, SPEC: tl.constexpr, TRANSPOSED: tl.constexpr, MASKED: tl.constexpr,
    SPLIT: tl.constexpr, EPILOGUE: tl.constexpr, PRECISION: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k W[n, k] x[m, k] for a tile of outputs and positions; if SPLIT, a part of the sum.

    VECTOR: multiply and add element by element, for so few positions that tensor cores would idle.
    """
    form = BEGIN(args, SPEC)
    tiles = tl.cdiv(outputs, BLOCK_N)  # neighbours share positions; one axis, the only one of the grid without a limit
    n0 = tl.program_id(0) % tiles * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(n, outputs - 1)
    from_x = x + m[None, :].to(tl.int64) * terms
    first = tl.program_id(1) * terms_each
    if VECTOR:
        total = tl.zeros((BLOCK_N, BLOCK_K, BLOCK_M), tl.float32)
    else:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k0 in range(first, tl.minimum(first + terms_each, terms), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        there = (m < positions)[None, :]
        if MASKED:
            there = there & (k < terms)[:, None]
        value = tl.load(from_x + k[:, None], mask=there, other=0.0)  # [BLOCK_K, BLOCK_M]
        weight = weight_tile(
            0, 0, row, n0, k0, terms, form, TILE, SPEC, value.dtype, TRANSPOSED, MASKED, BLOCK_N, BLOCK_K
        )
        if VECTOR:
            total += weight.to(tl.float32)[:, :, None] * value.to(tl.float32)[None, :, :]
        else:
            total = product(weight, value, total, PRECISION)
    if VECTOR:
        total = tl.sum(total, 1)
    inside = (n < outputs)[:, None] & (m < positions)[None, :]
    if SPLIT:
        place = (tl.program_id(1).to(tl.int64) * positions + m[None, :]) * outputs + n[:, None]
        tl.store(y + place, total, mask=inside)
    else:
        total = finished(total * layer_scale(scale, slot), n, n < outputs, bias, factor, shift, EPILOGUE)
        tl.store(y + m[None, :].to(tl.int64) * outputs + n[:, None], cast(total, y.dtype.element_ty), mask=inside)


@triton.jit
def splits_kernel(
    y, parts, bias, factor, shift, scale, slot, size, inner, outputs, SPLITS: tl.constexpr, EPILOGUE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of the parts [SPLITS, size] in order, scaled and finished; the channel advances every `inner` elements."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(parts + split * size + place, mask=place < size, other=0.0)
    n = place // inner % outputs
    total = finished(total[:, None] * layer_scale(scale, slot), n, place < size, bias, factor, shift, EPILOGUE)
    tl.store(y + place[:, None], cast(total, y.dtype.element_ty), mask=(place < size)[:, None])


@triton.jit
def linear_state_grad_kernel(
    left, right, scale, slot, positions, positions_each, rows, columns,
    BEGIN: tl.constexpr, ACCUMULATE: tl.constexpr, args, SPEC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dW[r, c] = sum_m left[m, r] right[m, c] for one tile and a part of the positions, added into the state's gradient."""
    form = BEGIN(args, SPEC)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k0 = tl.program_id(1) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    first = tl.program_id(2) * positions_each
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m0 in range(first, tl.minimum(first + positions_each, positions), BLOCK_M):
        m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
        there = m < positions
        a = tl.load(left + m[None, :] * rows + n[:, None], mask=there[None, :] & (n < rows)[:, None], other=0.0)
        b = tl.load(right + m[:, None] * columns + k[None, :], mask=there[:, None] & (k < columns)[None, :], other=0.0)
        total = product(a, b, total, PRECISION)
    inside = (n < rows)[:, None] & (k < columns)[None, :]
    ACCUMULATE(total * layer_scale(scale, slot), inside, tl.minimum(n, rows - 1), k0, BLOCK_K, form, SPEC)


def multiply(
    weight: Weight, x: Tensor, tile: Tile, transposed: bool = False, epilogue: Epilogue | None = None
) -> Tensor:
    """y = x W^T for the weight as a matrix W [rows, columns]; with `transposed`, y = x W.

    Args:
        x: [..., columns] (or [..., rows]), of any strides.
        epilogue: what is done to y before it is stored.

    Returns:
        Tensor of x's type, contiguous.
    """
    view, epilogue = weight.view, epilogue or Epilogue()
    rows, columns = view.count // view.fan_in, view.fan_in
    outputs, terms = (columns, rows) if transposed else (rows, columns)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    positions = x.numel() // terms
    each = cdiv(cdiv(terms, tile.k), tile.splits) * tile.k
    splits = cdiv(terms, each)
    out = y if splits == 1 else x.new_empty(splits, y.numel(), dtype=torch.float32)
    form = weight.form(math.gcd(tile.n if transposed else tile.k, 64), x.dtype)
    launch(
        linear_kernel, (cdiv(outputs, tile.n) * cdiv(positions, tile.m), splits), x,
        out, x, *epilogue.tensors(y), weight.scale, view.tensor, positions, outputs, terms, each,
        BEGIN=form.begin, TILE=form.tile, args=form.args, SPEC=form.spec, TRANSPOSED=transposed,
        MASKED=terms % tile.k != 0, SPLIT=splits > 1, EPILOGUE=epilogue.finish, PRECISION=precision(x.dtype),
        VECTOR=tile.m < 16, BLOCK_N=tile.n, BLOCK_M=tile.m, BLOCK_K=tile.k, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        sum_splits(y, out, 1, outputs, weight, epilogue)
    return y


def sum_splits(y: Tensor, parts: Tensor, inner: int, outputs: int, weight: Weight, epilogue: Epilogue) -> None:
    """Fill y, dense in memory, with the finished sums of `parts` [splits, y.numel()]."""
    block = 1024
    launch(
        splits_kernel, (cdiv(y.numel(), block),), y,
        y, parts, *epilogue.tensors(y), weight.scale, weight.view.tensor, y.numel(), inner, outputs,
        SPLITS=len(parts), EPILOGUE=epilogue.finish, BLOCK=block,
    )  # fmt: skip


def add_state_grad(form: Form, weight: Weight, left: Tensor, right: Tensor, tile: Tile) -> None:
    """Add the state's gradient, dW = left^T right times the layer's scale, by `form.accumulate`.

    Args:
        left: [positions, rows] of the weight as a matrix.
        right: [positions, columns].
    """
    rows, columns = weight.view.count // weight.view.fan_in, weight.view.fan_in
    left, right = left.reshape(-1, rows).contiguous(), right.reshape(-1, columns).contiguous()
    positions = len(left)
    each = cdiv(cdiv(positions, tile.m), tile.splits) * tile.m
    launch(
        linear_state_grad_kernel, (cdiv(rows, tile.n), cdiv(columns, tile.k), cdiv(positions, max(1, each))), left,
        left, right, weight.scale, weight.view.tensor, positions, each, rows, columns,
        BEGIN=form.begin, ACCUMULATE=form.accumulate, args=form.args, SPEC=form.spec, PRECISION=precision(left.dtype),
        BLOCK_N=tile.n, BLOCK_M=tile.m, BLOCK_K=tile.k, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def forward(choice: Choice, where: Any, xs: Any, finish: Any, config: Any) -> Tensor:
    """The op `fxrpg.linear` with an epilogue; see `fusing.forward`."""
    view, state, scale = where
    weight = Weight.of(view, state, scale, choice.tables)
    return multiply(weight, xs[0], choice.tile, not reads_columns(view, *config), Epilogue(*finish))


def input_grad(choice: Choice, where: Any, grad: Tensor, xs: Any, config: Any) -> Tensor:
    """The gradient of x."""
    view, state, scale = where
    weight = Weight.of(view, state, scale, choice.tables)
    return multiply(weight, grad, choice.tile, reads_columns(view, *config))


def state_grad(choice: Choice, where: Any, grad: Tensor, xs: Any, config: Any) -> Tensor:
    """The gradient of the state, float32."""
    view, state, scale = where
    weight = Weight.of(view, state, scale)
    left, right = (grad, xs[0]) if reads_columns(view, *config) else (xs[0], grad)
    form, found = weight.gradient(math.gcd(choice.tile.k, 64), left.dtype)
    add_state_grad(form, weight, left, right, choice.tile)
    return found
