"""Rows of a generated table at integer indices, and the state's gradient: no more of the table is made than is asked for."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxrpg.kernels.fused.generate import layer_scale
from fxrpg.kernels.fused.launch import cdiv, launch, padded
from fxrpg.tiles.rounding import cast
from fxrpg.view import Form, View

STEP = 64
"""Columns of tiles begin at multiples of it."""


@triton.jit
def embedding_kernel(
    out, index, scale, slot, indices, rows, columns,
    BEGIN: tl.constexpr, TILE: tl.constexpr, args, SPEC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[i, c] = W[index[i], c], scaled in float32 and rounded; NaN where the table has no such row."""
    form = BEGIN(args, SPEC)
    i = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col0 = tl.program_id(1) * BLOCK_COLUMNS
    column = col0 + tl.arange(0, BLOCK_COLUMNS)
    row = tl.load(index + i, mask=i < indices, other=0)
    there = (row >= 0) & (row < rows)
    value = TILE(tl.where(there, row, 0), col0, BLOCK_COLUMNS, form, SPEC, out.dtype.element_ty)
    value = tl.where(there[:, None], value.to(tl.float32) * layer_scale(scale, slot), float("nan"))
    inside = (i < indices)[:, None] & (column < columns)[None, :]  # [BLOCK_ROWS, BLOCK_COLUMNS]
    tl.store(out + i[:, None] * columns + column[None, :], cast(value, out.dtype.element_ty), mask=inside)


@triton.jit
def embedding_state_grad_kernel(
    grad, index, share, scale, slot, indices, rows, columns, padding,
    BEGIN: tl.constexpr, ACCUMULATE: tl.constexpr, args, SPEC: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the gradient of every row that was asked for into the state's; of the row `padding`, nothing.

    SHARED: multiply that of index i by share[i].
    """
    form = BEGIN(args, SPEC)
    i = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col0 = tl.program_id(1) * BLOCK_COLUMNS
    column = col0 + tl.arange(0, BLOCK_COLUMNS)
    row = tl.load(index + i, mask=i < indices, other=-1)
    there = (row >= 0) & (row < rows) & (row != padding)
    inside = there[:, None] & (column < columns)[None, :]
    value = tl.load(grad + i[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
    value *= layer_scale(scale, slot)
    if SHARED:
        value *= tl.load(share + i, mask=there, other=0.0)[:, None]
    ACCUMULATE(value, inside, tl.where(there, row, 0), col0, BLOCK_COLUMNS, form, SPEC)


def forward(view: View, state: Tensor, scale: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The rows `index` of the scaled table.

    Args:
        view: of the table, [rows, columns].
        state, scale: as stored: the state, and the table of scales in which the view has a row.
        index: int32 or int64, of any shape.
        dtype: of the result.

    Returns:
        Tensor [*index.shape, columns]; None where `_form` is. On a GPU a row that the table does not have is NaN.

    Raises:
        IndexError: on the CPU, as torch does, for a row that the table does not have.
    """
    form = _form(view, state, dtype)
    if form is None:
        return None
    rows, columns = view.shape
    if index.device.type == "cpu" and bool(((index < 0) | (index >= rows)).any()):
        raise IndexError("index out of range in self")
    out = torch.empty(*index.shape, columns, dtype=dtype, device=index.device)
    grid, blocks = _tiles(index.numel(), columns)
    launch(
        embedding_kernel, grid, out,
        out, index.reshape(-1).contiguous(), scale, view.tensor, index.numel(), rows, columns,
        BEGIN=form.begin, TILE=form.tile, args=form.args, SPEC=form.spec, **blocks,
    )  # fmt: skip
    return out


def state_grad(
    view: View, state: Tensor, scale: Tensor, grad: Tensor, index: Tensor, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor | None:
    """The state's gradient from that of the rows: summed in float32, by atomic additions.

    Args:
        view, state, scale, index: as in `forward`.
        grad: [*index.shape, columns].
        padding_idx: a row without gradient; -1 for none.
        scale_grad_by_freq: divide a row's gradient by the number of times that it was asked for.

    Returns:
        float32 tensor of the state's shape; None where `_form` is, and where a GPU must add in a fixed order.
    """
    refused = grad.dtype == torch.float64 or (grad.is_cuda and torch.are_deterministic_algorithms_enabled())
    form = None if refused or not state.is_floating_point() else _form(view, state, torch.float32)
    if form is None:
        return None
    rows, columns = view.shape
    index, grad = index.reshape(-1).contiguous(), grad.reshape(-1, columns).contiguous()
    out = torch.zeros(state.shape, dtype=torch.float32, device=grad.device)
    share = _shares(index, rows) if scale_grad_by_freq else out
    form = form.into(out)
    grid, blocks = _tiles(index.numel(), columns)
    launch(
        embedding_state_grad_kernel, grid, grad,
        grad, index, share, scale, view.tensor, index.numel(), rows, columns, padding_idx,
        BEGIN=form.begin, ACCUMULATE=form.accumulate, args=form.args, SPEC=form.spec, SHARED=scale_grad_by_freq, **blocks,
    )  # fmt: skip
    return view.generator.masked_gradient(out, state)


def _form(view: View, state: Tensor, dtype: torch.dtype) -> Form | None:
    """The device form; None for a generator without one, in float64, and for a table that is not rows of columns."""
    if torch.float64 in (state.dtype, dtype) or view.order != (0, 1) or view.kept:
        return None
    return view.generator.form(view.generator.kernel_state(state, view), view, STEP, dtype)


def _tiles(indices: int, columns: int) -> tuple[tuple[int, int], dict[str, int]]:
    """(grid, sides of a tile); indices go on the axis without a limit."""
    block_rows = min(8, padded(indices, 1))
    block_columns = min(1024 // block_rows, padded(columns, STEP))
    return (cdiv(indices, block_rows), cdiv(columns, block_columns)), {
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLUMNS": block_columns,
    }


def _shares(index: Tensor, rows: int) -> Tensor:
    """1 / how often each index occurs, float32 [n], without waiting for the device."""
    index = index.clamp(0, rows - 1)
    return 1 / index.new_zeros(rows).index_add_(0, index, torch.ones_like(index))[index]
