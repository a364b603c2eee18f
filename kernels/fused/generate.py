"""Whole weights, generated tile by tile, and the state's gradient from that of a weight: what staged ops run on."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxrpg.kernels.fused.gather import gather
from fxrpg.kernels.fused.launch import cdiv, launch, padded
from fxrpg.tiles.rounding import cast
from fxrpg.view import Form, View


@triton.jit
def layer_scale(table, slot):
    """Row `slot` of the table of scales: (256 * high + low) * 2^exponent, exact (`weights.decode_scales`)."""
    high, low = tl.load(table + 3 * slot).to(tl.float32), tl.load(table + 3 * slot + 1).to(tl.float32)
    exponent = tl.load(table + 3 * slot + 2).to(tl.int32)
    half = exponent >> 1
    return (256 * high + low) * power_of_two(half) * power_of_two(exponent - half)


@triton.jit
def power_of_two(exponent):
    """2^exponent for -127 < exponent < 128, float32, by its bits."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def generate_kernel(
    out, scale, slot, columns, fan_in, inner, stride_row, stride_kernel, stride_inner, count,
    BEGIN: tl.constexpr, TILE: tl.constexpr, args, SPEC: tl.constexpr, LOGICAL: tl.constexpr, SCALED: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of the weight, rounded to the type of `out`, scaled in float32 and rounded again."""
    form = BEGIN(args, SPEC)
    rows, col0, element, there = tile_at(columns, count, WIDE, BLOCK_ROWS, BLOCK_COLUMNS)
    value = TILE(rows, col0, BLOCK_COLUMNS, form, SPEC, out.dtype.element_ty)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    if SCALED:
        value = cast(value.to(tl.float32) * layer_scale(scale, slot), out.dtype.element_ty)
    where = element
    if not LOGICAL:
        where = place_of(element, fan_in, inner, stride_row, stride_kernel, stride_inner)
    tl.store(out + where, value, mask=there)


@triton.jit
def accumulate_kernel(
    grad, columns, fan_in, inner, stride_row, stride_kernel, stride_inner, count,
    BEGIN: tl.constexpr, ACCUMULATE: tl.constexpr, args, SPEC: tl.constexpr, LOGICAL: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of the unscaled weight's gradient, added into the state's."""
    form = BEGIN(args, SPEC)
    rows, col0, element, there = tile_at(columns, count, WIDE, BLOCK_ROWS, BLOCK_COLUMNS)
    where = element
    if not LOGICAL:
        where = place_of(element, fan_in, inner, stride_row, stride_kernel, stride_inner)
    value = tl.load(grad + where, mask=there, other=0.0).to(tl.float32)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    ACCUMULATE(value, there, rows, col0, BLOCK_COLUMNS, form, SPEC)


@triton.jit
def tile_at(columns, count, WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """This program's tile: (rows, first column, elements in logical order, which of them there are)."""
    across = tl.cdiv(columns, BLOCK_COLUMNS)
    row = tl.program_id(0) // across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col0 = tl.program_id(0) % across * BLOCK_COLUMNS
    column = (col0 + tl.arange(0, BLOCK_COLUMNS))[None, :]
    element = row[:, None].to(tl.int64 if WIDE else tl.int32) * columns + column  # [BLOCK_ROWS, BLOCK_COLUMNS]
    return row, col0, element, (column < columns) & (element < count)


@triton.jit
def place_of(element, fan_in, inner, stride_row, stride_kernel, stride_inner):
    """Where elements of the weight, numbered in logical order, lie in memory."""
    row = element // fan_in
    rest = element - row * fan_in
    kernel = rest // inner
    return row.to(tl.int64) * stride_row + kernel * stride_kernel + (rest - kernel * inner) * stride_inner


class Tiling(NamedTuple):
    """How a weight is cut: as a matrix of so many columns, into how many tiles, and whether that takes 64 bits."""

    columns: int
    block_rows: int
    block_columns: int
    programs: int
    wide: bool


def tiling(view: View, form: Form) -> Tiling:
    """Tiles of about a thousand elements."""
    columns, rows = view.fan_in, view.count // view.fan_in
    if columns < 64 and form.spec.flat:  # short rows: element follows element
        columns, rows = view.count, 1
    block_rows = 1 if rows == 1 else min(8, padded(rows, 1))
    block_columns = min(1024 // block_rows, padded(columns, 64))
    programs = cdiv(columns, block_columns) * cdiv(rows, block_rows)
    return Tiling(columns, block_rows, block_columns, programs, view.count >= 1 << 30)


def generate_into(out: Tensor, form: Form, view: View, scale: Tensor | None) -> None:
    """Fill `out`, of the view's shape in any layout whose kernel axes lie together, with the (scaled) weight."""
    tile = tiling(view, form)
    launch(
        generate_kernel, (tile.programs,), out,
        out, form.args[0] if scale is None else scale, view.tensor, tile.columns, view.fan_in, *layout_of(out, view),
        view.count,
        BEGIN=form.begin, TILE=form.tile, args=form.args, SPEC=form.spec, LOGICAL=is_logical(out, view),
        SCALED=scale is not None, WIDE=tile.wide, BLOCK_ROWS=tile.block_rows, BLOCK_COLUMNS=tile.block_columns,
    )  # fmt: skip


def layout_of(weight: Tensor, view: View) -> tuple[int, int, int, int]:
    """(inner, stride of a row, of a kernel position, of an inner element) of the weight in memory."""
    row, *kernel = view.order
    inner = kernel.pop() if kernel else None
    stride_kernel = next((weight.stride(axis) for axis in reversed(kernel) if weight.shape[axis] > 1), 0)
    if inner is None:
        return 1, weight.stride(row), stride_kernel, 0
    return weight.shape[inner], weight.stride(row), stride_kernel, weight.stride(inner)


def is_even(weight: Tensor, view: View) -> bool:
    """Whether positions of the kernel are evenly spaced in memory, as `layout_of` takes them to be."""
    sides = [(weight.shape[axis], weight.stride(axis)) for axis in view.order[1:-1] if weight.shape[axis] > 1]
    return all(stride == length * step for (_, stride), (length, step) in itertools.pairwise(sides))


def is_logical(out: Tensor, view: View) -> bool:
    """Whether elements lie in memory in logical order."""
    return out.permute(view.order).is_contiguous()


def form_on(view: View, state: Tensor, dtype: torch.dtype | None = None) -> Form | None:
    """The form in which tiles of `tiling` are read from a `kernel_state`; None for a generator without device functions."""
    return view.generator.form(state, view, math.gcd(64, view.fan_in), dtype)


def form_of(view: View, state: Tensor, dtype: torch.dtype | None = None) -> Form | None:
    """The same from a state as it is stored."""
    return form_on(view, view.generator.kernel_state(state, view), dtype)


def generate(view: View, state: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The weight of `view`, a fresh contiguous tensor of `dtype`, scaled if there is a table of scales.

    Returns:
        Tensor of `view.shape`, bit-equal to `weights.generate_weight`; None where torch has to make it: in float64, and
        for a generator without device functions.
    """
    if torch.float64 in (dtype, state.dtype):
        return None
    form = form_of(view, state, dtype)
    if form is None:
        return None
    out = torch.empty(view.shape, dtype=dtype, device=state.device)
    generate_into(out, form, view, scale)
    return out


def accumulate(grad: Tensor, state: Tensor, view: View) -> Tensor | None:
    """The state's gradient from that of the *unscaled* weight: by atomic additions, or gathered where those are forbidden.

    Args:
        grad: of `view.shape`, any strides, float32 or narrower.
        state: the state as it is stored.

    Returns:
        Fresh float32 tensor of the state's shape; None where torch has to make it: in float64, for frozen states, pruned
        channels, generators without device functions and, under `torch.use_deterministic_algorithms`, those without a
        `Form.gather`.
    """
    if torch.float64 in (grad.dtype, state.dtype) or not state.is_floating_point() or view.kept:
        return None
    form = form_of(view, state)
    if form is None:
        return None
    if torch.are_deterministic_algorithms_enabled():
        return view.generator.masked_gradient(gather(grad, form, view), state) if form.gather else None
    found = torch.zeros(state.shape, dtype=torch.float32, device=state.device)
    accumulate_into(form.into(found), grad, view)
    return view.generator.masked_gradient(found, state)


def accumulate_into(form: Form, grad: Tensor, view: View) -> None:
    """Add the gradient of the unscaled weight by `form.accumulate`."""
    tile, grad = tiling(view, form), grad if is_even(grad, view) else grad.contiguous()
    launch(
        accumulate_kernel, (tile.programs,), grad, grad, tile.columns, view.fan_in, *layout_of(grad, view), view.count,
        BEGIN=form.begin, ACCUMULATE=form.accumulate, args=form.args, SPEC=form.spec, LOGICAL=is_logical(grad, view),
        WIDE=tile.wide, BLOCK_ROWS=tile.block_rows, BLOCK_COLUMNS=tile.block_columns,
    )  # fmt: skip
