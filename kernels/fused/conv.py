"""Convolutions of one and two dimensions with a generated weight, as implicit matrix products.

One kernel serves four cases: a convolution and a transposed one, forward and for the input's gradient. They differ in
whether the weight's rows are outputs or terms, and in where a tap reads: at `q * mul + base + t * delta`, for the position
q of what is computed and the t-th tap that reaches it.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxrpg.dispatch import Tile
from fxrpg.kernels.fused.epilogue import Epilogue, finished
from fxrpg.kernels.fused.generate import layer_scale
from fxrpg.kernels.fused.launch import cdiv, launch
from fxrpg.kernels.fused.linear import sum_splits, weight_tile
from fxrpg.kernels.fused.weight import Weight, precision
from fxrpg.tiles.rounding import cast, product
from fxrpg.view import Form, View


class Axis(NamedTuple):
    """One spatial axis, for some of the positions along it: those that the same taps reach.

    Args:
        taps, first, step: the kernel's positions first + t * step, t < taps.
        mul, base, delta: tap t of position q reads at q * mul + base + t * delta.
        spread, place: position q is written at q * spread + place.
    """

    taps: int
    first: int
    step: int
    mul: int
    base: int
    delta: int
    spread: int
    place: int


class Strides(NamedTuple):
    """Strides of a batch of images, in elements."""

    batch: int
    channel: int
    row: int
    column: int


@triton.jit
def located(position, rows, columns):
    """(image, row, column) of a position among those of a batch; the image in 64 bits, as its offset in memory needs."""
    line = position // columns
    return (line // rows).to(tl.int64), line % rows, position % columns


@triton.jit
def written_at(image, p, q, channel, strides, ACROSS: tl.constexpr, DOWN: tl.constexpr):
    """Where channels at positions (p, q) are stored, [channels, positions]."""
    place = image * strides.batch + (p * DOWN.spread + DOWN.place) * strides.row
    place += (q * ACROSS.spread + ACROSS.place) * strides.column
    return place[None, :] + channel[:, None] * strides.channel


@triton.jit
def conv_kernel(
    y, x, bias, factor, shift, scale, slot, positions, rows, columns, height, width,
    outputs, terms, blocks, blocks_each, inner, group_rows, group_columns, y_strides, x_strides, size,
    BEGIN: tl.constexpr, TILE: tl.constexpr, args, SPEC: tl.constexpr, TRANSPOSED: tl.constexpr, MASKED: tl.constexpr,
    SPLIT: tl.constexpr, EPILOGUE: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr, DOWN: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr, GROUPS: tl.constexpr, LAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Outputs of one group at a tile of positions (batch * rows * columns of them); if SPLIT, a part of each sum.

    Args:
        height, width: of x.
        outputs, terms: channels of y and of x in a group.
        blocks: of BLOCK_K terms, in `terms`; a program sums `blocks_each` of taps * blocks.
        inner: columns of the weight as a matrix from one position of the kernel to the next.
        group_rows, group_columns: where in that matrix the next group begins.
        size: elements of y.
        DOWN, ACROSS: the spatial axes.
        LAST: whether channels of x lie together in memory.
    """
    form = BEGIN(args, SPEC)
    tiles = tl.cdiv(outputs, BLOCK_N)
    stripe = tl.program_id(0) % (tiles * GROUPS)  # neighbours share positions
    group = stripe // tiles if GROUPS > 1 else 0
    n0 = (stripe - group * tiles) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) // (tiles * GROUPS) * BLOCK_M + tl.arange(0, BLOCK_M)
    image, p, q = located(m, rows, columns)
    top, left = p * DOWN.mul + DOWN.base, q * ACROSS.mul + ACROSS.base
    k = tl.arange(0, BLOCK_K)
    channel_stride = 1 if LAST else x_strides.channel
    from_x = x + image * x_strides.batch + tl.cast(group * terms, tl.int64) * channel_stride
    row = tl.minimum(n, outputs - 1)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = tl.program_id(1) * blocks_each
    for i in range(first, tl.minimum(first + blocks_each, DOWN.taps * ACROSS.taps * blocks)):
        tap = i // blocks
        k0 = (i - tap * blocks) * BLOCK_K
        t, s = tap // ACROSS.taps, tap % ACROSS.taps
        h, w = top + t * DOWN.delta, left + s * ACROSS.delta
        there = ((m < positions) & (h >= 0) & (h < height) & (w >= 0) & (w < width))[None, :]
        place = h * x_strides.row + w * x_strides.column
        if MASKED:
            there = there & (k0 + k < terms)[:, None]
        value = tl.load((from_x + place)[None, :] + (k0 + k)[:, None] * channel_stride, mask=there, other=0.0)
        column = ((DOWN.first + t * DOWN.step) * KERNEL_WIDTH + ACROSS.first + s * ACROSS.step) * inner
        column += group * group_columns
        weight = weight_tile(
            group * group_rows, column, row, n0, k0, terms, form, TILE, SPEC, value.dtype, TRANSPOSED, MASKED,
            BLOCK_N, BLOCK_K,
        )  # fmt: skip
        total = product(weight, value, total, PRECISION)
    channel = group * outputs + n
    inside = (n < outputs)[:, None] & (m < positions)[None, :]
    place = written_at(image, p, q, channel, y_strides, ACROSS, DOWN)
    if SPLIT:
        tl.store(y + tl.program_id(1).to(tl.int64) * size + place, total, mask=inside)
    else:
        total = finished(total * layer_scale(scale, slot), channel, n < outputs, bias, factor, shift, EPILOGUE)
        tl.store(y + place, cast(total, y.dtype.element_ty), mask=inside)


@triton.jit
def conv_state_grad_kernel(
    left, right, scale, slot, positions, positions_each, rows, columns, height, width,
    outputs, terms, inner, group_rows, group_columns, left_strides, right_strides,
    BEGIN: tl.constexpr, ACCUMULATE: tl.constexpr, args, SPEC: tl.constexpr, PRECISION: tl.constexpr,
    ACROSS: tl.constexpr, DOWN: tl.constexpr, MOVED: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dW[n, tap, k] = sum over positions of left[n] right[k], one of which is read where the tap says, for one tile.

    Args:
        rows, columns: of the positions, that is of the image that is read where it is.
        height, width: of the other, which `MOVED` names: "left" or "right".
    """
    form = BEGIN(args, SPEC)
    taps: tl.constexpr = DOWN.taps * ACROSS.taps
    tiles = tl.cdiv(outputs, BLOCK_N)
    group = tl.program_id(0) // tiles if GROUPS else 0
    n = (tl.program_id(0) - group * tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    tap, k0 = tl.program_id(1) % taps, tl.program_id(1) // taps * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    from_left = left + (group * outputs + n).to(tl.int64)[:, None] * left_strides.channel
    from_right = right + (group * terms + k).to(tl.int64)[None, :] * right_strides.channel
    up, over = tap // ACROSS.taps * DOWN.delta + DOWN.base, tap % ACROSS.taps * ACROSS.delta + ACROSS.base
    first = tl.program_id(2) * positions_each
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m0 in range(first, tl.minimum(first + positions_each, positions), BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        image, p, q = located(m, rows, columns)
        h, w = p * DOWN.mul + up, q * ACROSS.mul + over
        there = (m < positions) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        if MOVED == "left":
            place_left = image * left_strides.batch + h * left_strides.row + w * left_strides.column
            place_right = image * right_strides.batch + p * right_strides.row + q * right_strides.column
        else:
            place_left = image * left_strides.batch + p * left_strides.row + q * left_strides.column
            place_right = image * right_strides.batch + h * right_strides.row + w * right_strides.column
        a = tl.load(from_left + place_left[None, :], mask=there[None, :] & (n < outputs)[:, None], other=0.0)
        b = tl.load(from_right + place_right[:, None], mask=there[:, None] & (k < terms)[None, :], other=0.0)
        total = product(a, b, total, PRECISION)
    inside = (n < outputs)[:, None] & (k < terms)[None, :]
    row = group * group_rows + tl.minimum(n, outputs - 1)
    ACCUMULATE(
        total * layer_scale(scale, slot), inside, row, tap * inner + group * group_columns + k0, BLOCK_K, form, SPEC
    )


class Geometry(NamedTuple):
    """What torch's convolution is told besides its tensors, each list once a spatial axis."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


def gathered(size: int, taps: int, stride: int, padding: int, dilation: int) -> list[tuple[int, Axis]]:
    """An axis along which each output reads its taps of the input: [(positions, axis)], for outputs of `size`."""
    return [(size, Axis(taps, 0, 1, stride, -padding, dilation, 1, 0))]


def scattered(size: int, taps: int, stride: int, padding: int, dilation: int) -> list[tuple[int, Axis]]:
    """An axis of the adjoint, by classes of positions that the same taps reach: [(positions, axis)], `size` in all.

    Position h receives from (h + padding - r * dilation) / stride where that is whole: for h = stride * q + place it is
    whole for the same r, which lie `step` apart. No zeros are inserted between the strides, and none is multiplied.
    """
    found = []
    step = stride // math.gcd(stride, dilation)
    for place in range(min(stride, size)):
        first = next((r for r in range(min(step, taps)) if (place + padding - r * dilation) % stride == 0), taps)
        base, delta = (place + padding - first * dilation) // stride, -(step * dilation // stride)
        count = cdiv(taps - first, step)
        found.append(
            (cdiv(size - place, stride), Axis(count, min(first, taps - 1), step, 1, base, delta, stride, place))
        )
    return found


def convolve(
    y: Tensor,
    x: Tensor,
    weight: Weight,
    geometry: Geometry,
    tile: Tile,
    backward: bool,
    epilogue: Epilogue | None = None,
) -> None:
    """Fill y [N, C', H', W'] from x [N, C, H, W] by the convolution; if `backward`, by the adjoint of it.

    Args:
        y: dense in memory; where `backward`, the gradient of the op's input.
        x: of any strides; where `backward`, the gradient of the op's output.
        weight, geometry: of the forward op.
        epilogue: what is done to y before it is stored.
    """
    view, epilogue = weight.view, epilogue or Epilogue()
    groups, outputs, terms = geometry.groups, y.shape[1] // geometry.groups, x.shape[1] // geometry.groups
    inner, group_rows, group_columns = weight_layout(view, geometry)
    form = weight.form(math.gcd(tile.n if backward else tile.k, inner, group_columns), x.dtype)
    blocks = cdiv(terms, tile.k)
    for (rows, down), (columns, across) in classes(y, weight.view, geometry, backward):
        positions, steps = y.shape[0] * rows * columns, down.taps * across.taps * blocks
        # classes of positions interleave: only an op that has but one can be summed in parts
        each = cdiv(steps, tile.splits) if down.spread == across.spread == 1 else steps
        splits = cdiv(steps, each) if steps else 1
        out = y if splits == 1 else y.new_empty(splits, y.numel(), dtype=torch.float32)
        launch(
            conv_kernel, (cdiv(outputs, tile.n) * groups * cdiv(positions, tile.m), splits), y,
            out, x, *epilogue.tensors(y), weight.scale, view.tensor, positions, rows, columns, *x.shape[2:],
            outputs, terms, blocks, each, inner, group_rows, group_columns,
            Strides(*y.stride()), Strides(*x.stride()), y.numel(),
            BEGIN=form.begin, TILE=form.tile, args=form.args, SPEC=form.spec, TRANSPOSED=backward,
            MASKED=terms % tile.k != 0, SPLIT=splits > 1, EPILOGUE=epilogue.finish, PRECISION=precision(x.dtype, True),
            ACROSS=across, DOWN=down, KERNEL_WIDTH=view.shape[-1], GROUPS=groups, LAST=x.stride(1) == 1,
            BLOCK_N=tile.n, BLOCK_M=tile.m, BLOCK_K=tile.k, warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
        if splits > 1:
            channels_together = y.stride(1) == 1
            sum_splits(y, out, 1 if channels_together else rows * columns, y.shape[1], weight, epilogue)


def classes(y: Tensor, view: View, geometry: Geometry, backward: bool) -> Any:
    """The launches that fill `y`: pairs of (positions, axis), down and across."""
    axis = scattered if geometry.transposed != backward else gathered
    kernel = view.shape[2:] if len(view.shape) == 4 else (1, view.shape[2])
    numbers = zip(y.shape[2:], kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    return itertools.product(*(axis(*each) for each in numbers))


def weight_layout(view: View, geometry: Geometry) -> tuple[int, int, int]:
    """In the weight as a matrix: columns of one position of the kernel, rows and columns from a group to the next."""
    inner = view.shape[view.order[-1]]
    if geometry.transposed:
        return inner, 0, inner // geometry.groups
    return inner, view.shape[0] // geometry.groups, 0


def state_grad(form: Form, weight: Weight, grad: Tensor, x: Tensor, geometry: Geometry, tile: Tile) -> None:
    """Add the state's gradient by `form.accumulate`.

    Args:
        grad: of the output, [N, C', H', W'], of any strides.
        x: the input, [N, C, H, W].
    """
    view, transposed = weight.view, geometry.transposed
    (rows, down), (columns, across) = next(iter(classes(x if transposed else grad, view, geometry, transposed)))
    outputs, terms = grad.shape[1] // geometry.groups, x.shape[1] // geometry.groups
    moved = grad if transposed else x
    positions = x.shape[0] * rows * columns
    each = cdiv(cdiv(positions, tile.m), tile.splits) * tile.m
    grid = (
        cdiv(outputs, tile.n) * geometry.groups,
        down.taps * across.taps * cdiv(terms, tile.k),
        cdiv(positions, max(1, each)),
    )
    launch(
        conv_state_grad_kernel, grid, x,
        grad, x, weight.scale, view.tensor, positions, each, rows, columns, *moved.shape[2:],
        outputs, terms, *weight_layout(view, geometry), Strides(*grad.stride()), Strides(*x.stride()),
        BEGIN=form.begin, ACCUMULATE=form.accumulate, args=form.args, SPEC=form.spec, PRECISION=precision(x.dtype, True),
        ACROSS=across, DOWN=down, MOVED="left" if transposed else "right", GROUPS=geometry.groups > 1,
        BLOCK_N=tile.n, BLOCK_M=tile.m, BLOCK_K=tile.k, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
