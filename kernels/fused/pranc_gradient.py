"""The way back of PRANC's pair: gradients of the coefficients from that of a weight, exact sums of integers.

The gradient is an integer of 30 bits times a power of two for every element, four signed bytes. A program sums some
elements for some coefficients, a second kernel the programs in their order: no atomics, the same bits on every tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxrpg.basis import LAWS
from fxrpg.fixed_point import GRADIENT_BITS
from fxrpg.hashing import COLUMN, ROW
from fxrpg.kernels.fused.launch import cdiv, launch
from fxrpg.kernels.fused.streams import stream
from fxrpg.tiles.hashing import mix32
from fxrpg.tiles.pranc import (
    bytes_of,
    digit_bytes,
    fixed,
    fixed_scales,
    transposed_signs,
    turned_bits,
    turned_row,
    uniform_sum,
)
from fxrpg.view import View

BITS = tl.constexpr(GRADIENT_BITS)
LONGEST = 1 << 16
"""Elements whose products an int32 surely sums: two bytes have 14 bits."""

MOST = {"rademacher": 1 << 30, "khatri_rao": 1 << 30, "uniform": 1 << 26}
"""Elements of a weight by law, as many as sums and addresses hold."""

MOST_OUTPUTS = 1 << 22
"""Outputs of a weight, as many as a grid holds."""


@triton.jit
def fixed_kernel(out, sums, grad, largest, count, BLOCK: tl.constexpr):
    """The gradient in fixed point, as `digit_bytes`, and the sum of each block."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale, _ = fixed_scales(tl.load(largest), BITS)
    q = fixed(tl.load(grad + i, mask=i < count, other=0.0), scale)
    tl.store(out + i, digit_bytes(q), mask=i < count)
    tl.store(sums + tl.program_id(0), tl.sum(q.to(tl.int64), 0))


@triton.jit
def project_kernel(
    partial, numbers, rows, columns, count, chunk, UNIFORM: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums of one chunk of elements for WORDS words of each: int32 partial[chunk, side of the basis, 16].

    Column 4 c + l sums digit l times the byte c that is drawn, or one bit of it: every element has four rows of bytes in the
    right operand, which are zero but where c is theirs.
    """
    HEIGHT: tl.constexpr = WORDS if UNIFORM else 8 * WORDS
    column = tl.load(columns + tl.program_id(0) * WORDS + tl.arange(0, WORDS)).to(tl.uint32, bitcast=True)
    n = tl.arange(0, 16)
    digit, byte = (8 * (n % 4)).to(tl.uint32)[:, None], (8 * (n // 4)).to(tl.uint32)[:, None]
    part = tl.zeros((HEIGHT, 16), tl.int32)
    start = tl.program_id(1) * chunk
    end = min(start + chunk, count)
    for first in range(start, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        row = tl.load(rows + i, mask=i < end, other=0).to(tl.uint32, bitcast=True)
        q = tl.load(numbers + i, mask=i < end, other=0).to(tl.uint32, bitcast=True)
        words = mix32(column[:, None] + row[None, :])  # [WORDS, BLOCK]
        drawn = bytes_of(words ^ 0x80808080, HEIGHT, 4 * BLOCK) if UNIFORM else turned_bits(words, WORDS, BLOCK)
        digits = tl.trans(bytes_of(((q[None, :] >> digit) & 0xFF) << byte, 16, 4 * BLOCK))
        part = tl.dot(drawn, digits, part, out_dtype=tl.int32)
    line = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    tl.store(partial + line[:, None] * 16 + n[None, :], part)


@triton.jit
def khatri_rao_project_kernel(
    partial, numbers, rows, columns, outputs, inputs, length,
    BLOCK_ROWS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of some outputs' rows for 32 * WORDS vectors: int64 partial[block of outputs, vector].

    The gradient's digits times the signs of inputs, then their sums times the signs of outputs.
    """
    WIDE: tl.constexpr = 32 * WORDS
    i = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.load(columns + tl.program_id(0) * WORDS + tl.arange(0, WORDS)).to(tl.uint32, bitcast=True)[:, None]
    sum0 = tl.zeros((BLOCK_ROWS, WIDE), tl.int32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    for first in range(0, inputs, BLOCK):
        x = first + 4 * tl.arange(0, BLOCK // 4)[None, :]
        at = rows + outputs + x
        w0 = mix32(column + tl.load(at, mask=x < inputs, other=0).to(tl.uint32, bitcast=True))  # [WORDS, BLOCK / 4]
        w1 = mix32(column + tl.load(at + 1, mask=x + 1 < inputs, other=0).to(tl.uint32, bitcast=True))
        w2 = mix32(column + tl.load(at + 2, mask=x + 2 < inputs, other=0).to(tl.uint32, bitcast=True))
        w3 = mix32(column + tl.load(at + 3, mask=x + 3 < inputs, other=0).to(tl.uint32, bitcast=True))
        signs = tl.trans(transposed_signs(w0, w1, w2, w3, WORDS, BLOCK // 4))  # [BLOCK, WIDE]
        j = first + tl.arange(0, BLOCK)
        inside = (i < outputs)[:, None] & (j < inputs)[None, :]
        q = tl.load(numbers + i.to(tl.int64)[:, None] * inputs + j[None, :], mask=inside, other=0)
        sum0 = tl.dot(q.to(tl.int8), signs, sum0, out_dtype=tl.int32)
        sum1 = tl.dot((q >> 8).to(tl.int8), signs, sum1, out_dtype=tl.int32)
        sum2 = tl.dot((q >> 16).to(tl.int8), signs, sum2, out_dtype=tl.int32)
        sum3 = tl.dot((q >> 24).to(tl.int8), signs, sum3, out_dtype=tl.int32)
    total = sum0.to(tl.int64) + (sum1.to(tl.int64) << 8) + (sum2.to(tl.int64) << 16) + (sum3.to(tl.int64) << 24)
    k = tl.arange(0, WIDE)
    column = tl.load(columns + tl.program_id(0) * WORDS + k // 32).to(tl.uint32, bitcast=True)
    row = tl.load(rows + i, mask=i < outputs, other=0).to(tl.uint32, bitcast=True)
    negative = (mix32(row[:, None] + column[None, :]) >> (k % 32).to(tl.uint32)[None, :]) & 1
    total = tl.where(negative == 1, -total, total)
    tl.store(partial + tl.program_id(1).to(tl.int64) * length + tl.program_id(0) * WIDE + k, tl.sum(total, 0))


@triton.jit
def byte_sum(partial, line, stride, byte, parts):
    """sum over parts of column `byte` of four digits: int64, of the shape of `line`."""
    n = tl.arange(0, 4)[None, :]
    at = partial + (line * 16 + 4 * byte)[:, None] + n
    total = tl.zeros(at.shape, tl.int64)
    for part in range(parts):
        total += tl.load(at + part * stride.to(tl.int64)).to(tl.int64)
    return tl.sum(total << (8 * n).to(tl.int64), 1)


@triton.jit
def reduce_kernel(
    out, partial, state, largest, sum_of_all, size, parts, stride,
    LAW: tl.constexpr, DEVIATION: tl.constexpr, SPARSE: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK coefficients from the sums of all programs, one after another."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    safe = tl.minimum(k, size - 1).to(tl.int64)
    _, unit = fixed_scales(tl.load(largest), BITS)
    plain = tl.load(sum_of_all)
    if LAW == "rademacher":
        word, s = safe // 32, safe % 8
        line = word // WORDS * (8 * WORDS) + turned_row(word % WORDS, s, WORDS)
        found = (plain - 2 * byte_sum(partial, line, stride, safe % 32 // 8, parts)).to(tl.float64)
    elif LAW == "uniform":
        low = byte_sum(partial, safe // 2, stride, safe % 2 * 2, parts)
        high = byte_sum(partial, safe // 2, stride, safe % 2 * 2 + 1, parts)
        found = uniform_sum(low, high, plain + tl.zeros_like(low))
    else:
        total = tl.zeros((BLOCK,), tl.int64)
        for part in range(parts):
            total += tl.load(partial + part * stride.to(tl.int64) + safe)
        found = total.to(tl.float64)
    found = found * unit
    if LAW == "uniform":
        found = found / DEVIATION
    if SPARSE:
        found = found * (tl.load(state + safe) != 0).to(tl.float64)
    tl.store(out + k, found.to(tl.float32), mask=k < size)


def gradient_tiles(law: str, view: View) -> dict[str, int]:
    """Words and elements of a tile, outputs of one (Khatri-Rao) or elements of a program, and warps, by law.

    No spills on sm_90, and the fewest instructions a value. Elements are split between programs until there are a few for
    each of some 130 processors.
    """
    if law == "khatri_rao":
        rows, warps = (128, 8) if view.count // view.fan_in > 64 else (64, 4)
        return {"words": 2, "block": 32, "chunk": rows, "warps": warps}
    words = 128 if law == "uniform" else 32
    across = cdiv(view.size, words * (2 if law == "uniform" else 32))
    chunk = cdiv(view.count, max(1, 1024 // across))
    return {"words": words, "block": 64, "chunk": min(LONGEST, max(1024, chunk)), "warps": 4}


def projected(law: str, grad: Tensor, state: Tensor, view: View, **tiles: int) -> Tensor:
    """The gradient of the coefficients, float32 [k], from that of the weight's elements, float32 [count] in logical order.

    Args:
        tiles: in place of those of `gradient_tiles`.
    """
    device = grad.device
    tiles = gradient_tiles(law, view) | tiles
    words, chunk = tiles["words"], tiles["chunk"]
    tall = cdiv(cdiv(view.size, 2 if law == "uniform" else 32), words)
    columns = stream(view, COLUMN, tall * words, device)
    largest = torch.linalg.vector_norm(grad, float("inf"))
    numbers = torch.empty(view.count, dtype=torch.int32, device=device)
    sums = torch.empty(cdiv(view.count, 1024), dtype=torch.int64, device=device)
    launch(fixed_kernel, (len(sums),), grad, numbers, sums, grad, largest, view.count, BLOCK=1024)
    constants = {"WORDS": words, "BLOCK": tiles["block"], "warps": tiles["warps"]}
    if law == "khatri_rao":
        outputs = view.count // view.fan_in
        rows = stream(view, ROW, outputs + view.fan_in, device)
        parts, stride = cdiv(outputs, chunk), tall * 32 * words
        partial = torch.empty(parts, stride, dtype=torch.int64, device=device)
        launch(
            khatri_rao_project_kernel, (tall, parts), grad,
            partial, numbers, rows, columns, outputs, view.fan_in, stride, BLOCK_ROWS=chunk, stages=1, **constants,
        )  # fmt: skip
    else:
        rows = stream(view, ROW, view.count, device)
        parts, stride = cdiv(view.count, chunk), tall * words * (16 if law == "uniform" else 128)
        partial = torch.empty(parts, stride, dtype=torch.int32, device=device)
        launch(
            project_kernel, (tall, parts), grad,
            partial, numbers, rows, columns, view.count, chunk, UNIFORM=law == "uniform", **constants,
        )  # fmt: skip
    out = torch.empty(view.size, dtype=torch.float32, device=device)
    launch(
        reduce_kernel, (cdiv(view.size, 64),), out,
        out, partial, state.contiguous(), largest, sums.sum(), view.size, parts, stride,
        LAW=law, DEVIATION=LAWS[law].deviation, SPARSE=view.generator.sparse, WORDS=words, BLOCK=64,
    )  # fmt: skip
    return out
