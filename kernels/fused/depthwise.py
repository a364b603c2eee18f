"""Depthwise convolutions of one and two dimensions with a generated weight: every channel has a filter of its own.

One kernel serves the forward op and the input's gradient, with axes as in `conv`. No tensor cores: a program multiplies
and adds for a block of channels at a block of positions, tap by tap. It generates a row of the kernel at a time, spread
over its threads: a tap's column alone would be made by every thread again, at the cost of many taps.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from fxrpg.dispatch import Tile
from fxrpg.kernels.fused.conv import Geometry, Strides, classes, located, written_at
from fxrpg.kernels.fused.epilogue import Epilogue, finished
from fxrpg.kernels.fused.generate import layer_scale
from fxrpg.kernels.fused.launch import cdiv, launch, padded
from fxrpg.kernels.fused.weight import Weight
from fxrpg.tiles.rounding import cast
from fxrpg.view import Form

SUMS = 2048
"""Partial sums of a state's gradient that a warp holds in registers."""


@triton.jit
def depthwise_kernel(
    y, x, bias, factor, shift, scale, slot, channels, positions, rows, columns, height, width, y_strides, x_strides,
    BEGIN: tl.constexpr, TILE: tl.constexpr, args, SPEC: tl.constexpr, EPILOGUE: tl.constexpr, ACROSS: tl.constexpr,
    DOWN: tl.constexpr, KERNEL_WIDTH: tl.constexpr, LAST: tl.constexpr, TRANSPOSED: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A block of channels at a tile of positions (batch * rows * columns of them).

    Args:
        height, width: of x.
        DOWN, ACROSS: the spatial axes.
        LAST: whether channels of x lie together in memory.
        TRANSPOSED: whether the weight as a matrix is one row of taps by channels, as that of a transposed op is.
        WIDTH: taps for which the weight is generated at a time.
    """
    form = BEGIN(args, SPEC)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    image, p, q = located(m, rows, columns)
    top, left = p * DOWN.mul + DOWN.base, q * ACROSS.mul + ACROSS.base
    channel = c[:, None] * (1 if LAST else x_strides.channel)
    from_x = x + (image * x_strides.batch + top * x_strides.row + left * x_strides.column)[None, :] + channel
    total = tl.zeros((BLOCK_C, BLOCK_M), tl.float32)
    for t in range(DOWN.taps):
        row = (DOWN.first + t * DOWN.step) * KERNEL_WIDTH
        h = top + t * DOWN.delta
        there = (m < positions) & (h >= 0) & (h < height)
        for first in range(0, KERNEL_WIDTH, WIDTH):
            if TRANSPOSED:
                column = (row + first) * channels + tl.program_id(1) * BLOCK_C
                weight = tl.trans(TILE(tl.arange(0, 1), column, BLOCK_C, form, SPEC, x.dtype.element_ty))
            else:
                weight = TILE(tl.minimum(c, channels - 1), row + first, WIDTH, form, SPEC, x.dtype.element_ty)
            for i in tl.static_range(WIDTH):
                over = tl.cast(first + i, tl.int32)
                s = (over - ACROSS.first) // ACROSS.step
                w = left + s * ACROSS.delta
                taken = (s >= 0) & (s < ACROSS.taps) & (s * ACROSS.step + ACROSS.first == over)
                mask = (c < channels)[:, None] & (there & (w >= 0) & (w < tl.where(taken, width, 0)))[None, :]
                place = t * DOWN.delta * x_strides.row + s * ACROSS.delta * x_strides.column
                value = tl.load(from_x + place, mask=mask, other=0.0).to(tl.float32)
                total += column_of(weight.to(tl.float32), i, WIDTH)[:, None] * value
    total = finished(total * layer_scale(scale, slot), c, c < channels, bias, factor, shift, EPILOGUE)
    place = written_at(image, p, q, c, y_strides, ACROSS, DOWN)
    inside = (c < channels)[:, None] & (m < positions)[None, :]
    tl.store(y + place, cast(total, y.dtype.element_ty), mask=inside)


@triton.jit
def column_of(weight, i, WIDTH: tl.constexpr):
    """Column i of a tile [rows, WIDTH]."""
    return tl.sum(tl.where(tl.arange(0, WIDTH)[None, :] == i, weight, 0.0), 1)


@triton.jit
def depthwise_state_grad_kernel(
    still, moved, scale, slot, channels, positions, positions_each, rows, columns, height, width,
    still_strides, moved_strides,
    BEGIN: tl.constexpr, ACCUMULATE: tl.constexpr, args, SPEC: tl.constexpr, ACROSS: tl.constexpr, DOWN: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dW[c, tap] = sum over positions of still[c] moved[c], read where the tap says, for a block of channels and of taps.

    Args:
        rows, columns: of `still`.
        height, width: of `moved`.
    """
    form = BEGIN(args, SPEC)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    up, over = tap // ACROSS.taps * DOWN.delta + DOWN.base, tap % ACROSS.taps * ACROSS.delta + ACROSS.base
    inside = (c < channels)[:, None] & (tap < DOWN.taps * ACROSS.taps)[None, :]
    from_still = still + c[:, None] * still_strides.channel
    from_moved = moved + (up * moved_strides.row + over * moved_strides.column)[None, None, :]
    from_moved += c[:, None, None] * moved_strides.channel
    first = tl.program_id(2) * positions_each
    total = tl.zeros((BLOCK_C, BLOCK_M, BLOCK_T), tl.float32)
    for m0 in range(first, tl.minimum(first + positions_each, positions), BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        image, p, q = located(m, rows, columns)
        place = image * still_strides.batch + p * still_strides.row + q * still_strides.column
        a = tl.load(from_still + place[None, :], mask=(c < channels)[:, None] & (m < positions)[None, :], other=0.0)
        h, w = (p * DOWN.mul)[:, None] + up[None, :], (q * ACROSS.mul)[:, None] + over[None, :]
        there = (m < positions)[:, None] & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        place = image * moved_strides.batch + p * DOWN.mul * moved_strides.row + q * ACROSS.mul * moved_strides.column
        b = tl.load(from_moved + place[None, :, None], mask=inside[:, None, :] & there[None, :, :], other=0.0)
        total += a.to(tl.float32)[:, :, None] * b.to(tl.float32)
    found = tl.sum(total, 1) * layer_scale(scale, slot)
    if TRANSPOSED:
        for i in range(BLOCK_T):
            place = (tl.program_id(1) * BLOCK_T + i) * channels + tl.program_id(0) * BLOCK_C
            there = c < tl.where(tl.program_id(1) * BLOCK_T + i < DOWN.taps * ACROSS.taps, channels, 0)
            ACCUMULATE(
                column_of(found, i, BLOCK_T)[None, :], there[None, :], tl.arange(0, 1), place, BLOCK_C, form, SPEC
            )
    else:
        ACCUMULATE(found, inside, tl.minimum(c, channels - 1), tl.program_id(1) * BLOCK_T, BLOCK_T, form, SPEC)


def convolve(
    y: Tensor,
    x: Tensor,
    weight: Weight,
    geometry: Geometry,
    tile: Tile,
    backward: bool,
    epilogue: Epilogue | None = None,
) -> None:
    """Fill y [N, C, H', W'] from x [N, C, H, W] by the convolution; if `backward`, by the adjoint of it.

    Args:
        y: of any strides; where `backward`, the gradient of the op's input.
        x: of any strides; where `backward`, the gradient of the op's output.
        weight: of shape [C, 1, *kernel].
        geometry: of the forward op, with C groups.
        tile: n channels and m positions a program.
        epilogue: what is done to y before it is stored.
    """
    view, epilogue, channels = weight.view, epilogue or Epilogue(), y.shape[1]
    transposed, n = geometry.transposed, _channels_of(tile, x)
    form = weight.form(math.gcd(n, channels) if transposed else 1, x.dtype)
    for (rows, down), (columns, across) in classes(y, view, geometry, backward):
        positions = y.shape[0] * rows * columns
        launch(
            depthwise_kernel, (cdiv(positions, tile.m), cdiv(channels, n)), y,
            y, x, *epilogue.tensors(y), weight.scale, view.tensor, channels, positions, rows, columns, *x.shape[2:],
            Strides(*y.stride()), Strides(*x.stride()),
            BEGIN=form.begin, TILE=form.tile, args=form.args, SPEC=form.spec, EPILOGUE=epilogue.finish,
            ACROSS=across, DOWN=down, KERNEL_WIDTH=view.shape[-1], LAST=x.stride(1) == 1, TRANSPOSED=transposed,
            WIDTH=1 if transposed else min(16, padded(view.shape[-1], 1)),
            BLOCK_C=n, BLOCK_M=tile.m, warps=tile.warps, stages=tile.stages,
        )  # fmt: skip


def state_grad(form: Form, weight: Weight, grad: Tensor, x: Tensor, geometry: Geometry, tile: Tile) -> None:
    """Add the state's gradient by `form.accumulate`.

    Args:
        form: for columns that begin at multiples of one (of a transposed op, of gcd(n, C), n channels a program).
        grad: of the output, [N, C, H', W'], of any strides.
        x: the input, [N, C, H, W], of any strides.
        tile: n channels, k taps (16 make all of a 3x3 kernel's at once), and m positions at a time, or as many as a program
            has registers for.
    """
    view, channels, transposed = weight.view, x.shape[1], geometry.transposed
    still, moved = (x, grad) if transposed else (grad, x)
    (rows, down), (columns, across) = next(iter(classes(still, view, geometry, transposed)))
    positions, n = x.shape[0] * rows * columns, _channels_of(tile, x)
    together = max(1, min(tile.m, SUMS * tile.warps // (n * tile.k)))
    each = max(1, cdiv(cdiv(positions, together), tile.splits)) * together
    grid = cdiv(channels, n), cdiv(down.taps * across.taps, tile.k), cdiv(positions, each)
    launch(
        depthwise_state_grad_kernel, grid, x,
        still, moved, weight.scale, view.tensor, channels, positions, each, rows, columns, *moved.shape[2:],
        Strides(*still.stride()), Strides(*moved.stride()),
        BEGIN=form.begin, ACCUMULATE=form.accumulate, args=form.args, SPEC=form.spec, ACROSS=across, DOWN=down,
        TRANSPOSED=transposed, BLOCK_C=n, BLOCK_M=together, BLOCK_T=tile.k, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _channels_of(tile: Tile, x: Tensor) -> int:
    """Channels of a program: few where they do not lie together, since each then takes a load, and registers, of its own."""
    return tile.n if x.stride(1) == 1 else min(tile.n, 16)
