"""Casts and products of tiles, the same on a GPU and in Triton's interpreter, which truncates to bfloat16 and multiplies
the bit patterns of one."""

from __future__ import annotations

import triton
import triton.language as tl

from fxrpg.device import interpreted

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def cast(value, DTYPE: tl.constexpr):
    """`value` in DTYPE, rounded to nearest, ties to even."""
    if INTERPRETED and value.dtype == tl.float32 and tl.bfloat16 == DTYPE:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(value == value, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b, summed in float32. PRECISION of float32 operands: "ieee", "tf32"."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def masked(value, mask):
    """`value` where `mask` holds, else zero: by its bits, since the interpreter of Triton 3.6 has no constants of 16 bits."""
    if value.dtype.primitive_bitwidth == 16:
        bits = tl.where(mask, value.to(tl.uint16, bitcast=True), 0).to(tl.uint16)
    else:
        bits = tl.where(mask, value.to(tl.uint32, bitcast=True), 0).to(tl.uint32)
    return bits.to(value.dtype, bitcast=True)
