"""PRANC's generate and reduce pair: weights from coefficients on integer tensor cores, the same bits as `Pranc.materialize`.

A coefficient is an integer of 31 bits times a power of two (`fixed_point.fixed_point`), five digits of 7 bits. What is
summed over the basis is digits times drawn bytes, int8 to int32: exact, whatever the tiles. With bits b of a word, signs are
1 - 2 b, and uniform values 512 h + 2 l + 257 of the signed bytes h, l. The way back is in `pranc_gradient`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxrpg.basis import LAWS
from fxrpg.fixed_point import COEFFICIENT_BITS
from fxrpg.generators.pranc import Pranc
from fxrpg.hashing import COLUMN, ROW
from fxrpg.kernels.fused import pranc_gradient
from fxrpg.kernels.fused.generate import layer_scale
from fxrpg.kernels.fused.launch import cdiv, launch
from fxrpg.kernels.fused.streams import keys, stream
from fxrpg.tiles.hashing import mix32, wide_word_at
from fxrpg.tiles.pranc import bytes_of, fixed, fixed_scales, packed_bits, signs_of, uniform_sum
from fxrpg.tiles.rounding import cast
from fxrpg.view import View

BITS = tl.constexpr(COEFFICIENT_BITS)
LONGEST = 1 << 16
"""Coefficients whose products an int32 surely sums: a byte has 7 bits and a digit 6."""

NARROW = (torch.float32, torch.bfloat16, torch.float16)
"""Types whose numbers keep 31 bits in fixed point."""

MOST = {"rademacher": 1 << 27, "khatri_rao": 1 << 24, "uniform": 1 << 21}
"""Coefficients by law: as many as sums and addresses hold, and as `Pranc.materialize` rounds only once, like these kernels."""


@triton.jit
def digits_kernel(
    planes, sums, state, largest, size, length,
    UNIFORM: tl.constexpr, SIGNED: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Digits of the coefficients as the products take them: int8 planes [5 or 10, length], and their sums.

    Signs: in the order of `packed_bits` for WORDS words at a time; SIGNED has the negated digits in planes 5 to 9.
    Uniform: two entries a coefficient; planes 0 to 4 meet the low byte of a value, 5 to 9 the high.
    """
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    if UNIFORM:
        k = p // 2
    else:
        step, within = p // (32 * WORDS), p % (32 * WORDS)
        k = 32 * (step * WORDS + within // 4 % WORDS) + 8 * (p % 4) + within // (4 * WORDS)
    scale, _ = fixed_scales(tl.load(largest), BITS)
    q = fixed(tl.load(state + k, mask=k < size, other=0.0), scale)
    counted = q.to(tl.int64)
    if UNIFORM:
        counted = tl.where(p % 2 == 0, counted, 0)
    tl.store(sums + tl.program_id(0), tl.sum(counted, 0))
    for digit in tl.static_range(5):
        d = ((q + 64) & 127) - 64
        q = (q - d) >> 7
        here, there = d, -d
        if UNIFORM:
            here, there = tl.where(p % 2 == 0, d, 0), tl.where(p % 2 == 0, 0, d)
        tl.store(planes + digit * length + p, here.to(tl.int8), mask=p < length)
        if UNIFORM or SIGNED:
            tl.store(planes + (digit + 5) * length + p, there.to(tl.int8), mask=p < length)


@triton.jit
def rounded(value, scale, slot, DTYPE: tl.constexpr, SCALED: tl.constexpr):
    """float64 values in DTYPE, rounded as torch rounds, by way of float32; SCALED once more."""
    value = cast(value.to(tl.float32), DTYPE)
    return cast(value.to(tl.float32) * layer_scale(scale, slot), DTYPE) if SCALED else value


@triton.jit(do_not_specialize=["slot", "outer", "inner"])
def combine_kernel(
    out, planes, columns, sum_of_all, largest, scale, slot, outer, inner, count, length,
    UNIFORM: tl.constexpr, DEVIATION: tl.constexpr, SCALED: tl.constexpr,
    BLOCK: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of a weight of independent values: bytes of the basis [BLOCK, STEP] times digits [STEP, 16]."""
    STEP: tl.constexpr = 4 * WORDS if UNIFORM else 32 * WORDS
    PLANES: tl.constexpr = 10 if UNIFORM else 5
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    row = wide_word_at(i, outer.to(tl.uint32), inner.to(tl.uint32))
    n = tl.arange(0, 16)
    total = tl.zeros((BLOCK, 16), tl.int64)
    for chunk in range(0, length, CHUNK):
        part = tl.zeros((BLOCK, 16), tl.int32)
        for p in range(chunk, min(chunk + CHUNK, length), STEP):
            column = tl.load(columns + p // STEP * WORDS + tl.arange(0, WORDS)).to(tl.uint32, bitcast=True)
            words = mix32(row[:, None] + column[None, :])  # [BLOCK, WORDS]
            if UNIFORM:
                drawn = bytes_of(words ^ 0x80808080, BLOCK, STEP)
            else:
                drawn = bytes_of(packed_bits(words, BLOCK, WORDS), BLOCK, STEP)
            at = n[None, :].to(tl.int64) * length + (p + tl.arange(0, STEP))[:, None]
            digits = tl.load(planes + at, mask=(n < PLANES)[None, :], other=0)  # [STEP, 16]
            part = tl.dot(drawn, digits, part, out_dtype=tl.int32)
        total += part.to(tl.int64)
    weighted = total << (7 * (n % 5))[None, :].to(tl.int64)
    low = tl.sum(tl.where((n < 5)[None, :], weighted, 0), 1)
    plain = tl.load(sum_of_all)
    _, unit = fixed_scales(tl.load(largest), BITS)
    if UNIFORM:
        high = tl.sum(tl.where(((n >= 5) & (n < 10))[None, :], weighted, 0), 1)
        value = uniform_sum(low, high, plain + tl.zeros_like(low)) * unit / DEVIATION
    else:
        value = (plain - 2 * low).to(tl.float64) * unit
    value = rounded(value, scale, slot, out.dtype.element_ty, SCALED)
    tl.store(out + i, value, mask=i < count)


@triton.jit
def flipped(planes, p, length, flips, DIGIT: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr):
    """One digit of the coefficients times the signs of each row: int8 [ROWS, STEP]. `flips` has bytes of ones for -1."""
    four = p // 4 + tl.arange(0, STEP // 4)
    plus = tl.load(planes + DIGIT * (length // 4) + four).to(tl.uint32, bitcast=True)[None, :]
    minus = tl.load(planes + (DIGIT + 5) * (length // 4) + four).to(tl.uint32, bitcast=True)[None, :]
    return bytes_of(plus ^ ((plus ^ minus) & flips), ROWS, STEP)


@triton.jit(do_not_specialize=["slot", "outer", "inner"])
def khatri_rao_kernel(
    out, planes, columns, largest, scale, slot, outer, inner, outputs, fan_in, length, SCALED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """A tile of a weight of rank-one vectors: signs of outputs times signs of inputs times digits, one sum a digit.

    Args:
        planes: of `digits_kernel`, four digits an int32.
    """
    STEP: tl.constexpr = 32 * WORDS
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    j = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    left = wide_word_at(i.to(tl.int64), outer.to(tl.uint32), inner.to(tl.uint32))
    right = wide_word_at(outputs + j.to(tl.int64), outer.to(tl.uint32), inner.to(tl.uint32))
    sum0 = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.int32)
    sum1, sum2, sum3, sum4 = sum0, sum0, sum0, sum0
    for p in range(0, length, STEP):
        column = tl.load(columns + p // 32 + tl.arange(0, WORDS)).to(tl.uint32, bitcast=True)
        flips = packed_bits(mix32(left[:, None] + column[None, :]), BLOCK_ROWS, WORDS) * 255
        signs = signs_of(packed_bits(mix32(right[:, None] + column[None, :]), BLOCK_COLUMNS, WORDS))
        drawn = tl.trans(bytes_of(signs, BLOCK_COLUMNS, STEP))  # [STEP, BLOCK_COLUMNS]
        sum0 = tl.dot(flipped(planes, p, length, flips, 0, BLOCK_ROWS, STEP), drawn, sum0, out_dtype=tl.int32)
        sum1 = tl.dot(flipped(planes, p, length, flips, 1, BLOCK_ROWS, STEP), drawn, sum1, out_dtype=tl.int32)
        sum2 = tl.dot(flipped(planes, p, length, flips, 2, BLOCK_ROWS, STEP), drawn, sum2, out_dtype=tl.int32)
        sum3 = tl.dot(flipped(planes, p, length, flips, 3, BLOCK_ROWS, STEP), drawn, sum3, out_dtype=tl.int32)
        sum4 = tl.dot(flipped(planes, p, length, flips, 4, BLOCK_ROWS, STEP), drawn, sum4, out_dtype=tl.int32)
    total = (((sum4.to(tl.int64) * 128 + sum3) * 128 + sum2) * 128 + sum1) * 128 + sum0
    _, unit = fixed_scales(tl.load(largest), BITS)
    value = rounded(total.to(tl.float64) * unit, scale, slot, out.dtype.element_ty, SCALED)
    where = i.to(tl.int64)[:, None] * fan_in + j[None, :]
    tl.store(out + where, value, mask=(i < outputs)[:, None] & (j < fan_in)[None, :])


def generation_tiles(law: str, rows: int) -> dict[str, int]:
    """Rows of a tile, words drawn at a time and warps, by law: no spills on sm_90, and the fewest instructions a value."""
    if law == "khatri_rao":
        return {"block": 128, "words": 4, "warps": 8} if rows > 64 else {"block": 64, "words": 4, "warps": 4}
    return {"block": 128, "words": 32 if law == "uniform" else 8, "warps": 4}


def generate(
    view: View, state: Tensor, scale: Tensor | None, dtype: torch.dtype, *, chunk: int = LONGEST, **tiles: int
) -> Tensor | None:
    """The (scaled) weight of a view, the bits of `Pranc.materialize`.

    Args:
        state: coefficients [k].
        scale: table of scales, or None for unscaled values.
        chunk: products that one int32 sums, whole tiles and at most `LONGEST`; of the law "khatri_rao" it sums all.
        tiles: `block`, `words` and `warps` in place of those of `generation_tiles`.

    Returns:
        A fresh contiguous tensor of `view.shape` and `dtype`; None for what only plain torch does: float64, the law "normal",
        pruned channels, and more coefficients than sums of integers hold here.
    """
    law = _law(view)
    if view.kept or not (state.dtype in NARROW and dtype in NARROW and view.size <= MOST.get(law, 0)):
        return None
    rows = view.count // view.fan_in
    tiles = generation_tiles(law, rows) | tiles
    out = torch.empty(view.count, dtype=dtype, device=state.device)
    largest = torch.linalg.vector_norm(state, float("inf"))
    words = cdiv(cdiv(view.size, 2 if law == "uniform" else 32), tiles["words"]) * tiles["words"]
    planes, sums = _digits(state.contiguous(), largest, law, words, tiles["words"])
    columns = stream(view, COLUMN, words, state.device)
    side, length = tiles["block"], planes.shape[1]
    scaled = columns if scale is None else scale, view.tensor, *keys(view, ROW)
    constants = {"warps": tiles["warps"], "WORDS": tiles["words"], "SCALED": scale is not None}
    if law == "khatri_rao":
        launch(
            khatri_rao_kernel, (cdiv(rows, side), cdiv(view.fan_in, 64)), out,
            out, planes.view(torch.int32), columns, largest, *scaled, rows, view.fan_in, length,
            BLOCK_ROWS=side, BLOCK_COLUMNS=64, stages=1, **constants,
        )  # fmt: skip
    else:
        launch(
            combine_kernel, (cdiv(view.count, side),), out,
            out, planes, columns, sums.sum(), largest, *scaled, view.count, length,
            UNIFORM=law == "uniform", DEVIATION=LAWS[law].deviation, BLOCK=side, CHUNK=chunk, **constants,
        )  # fmt: skip
    return view.from_logical(out)


def _digits(state: Tensor, largest: Tensor, law: str, words: int, together: int) -> tuple[Tensor, Tensor]:
    """(planes, sums) of `digits_kernel` for so many words of the basis, `together` at a time."""
    length = words * (4 if law == "uniform" else 32)
    planes = torch.empty(5 if law == "rademacher" else 10, length, dtype=torch.int8, device=state.device)
    sums = torch.empty(cdiv(length, 1024), dtype=torch.int64, device=state.device)
    launch(
        digits_kernel, (len(sums),), planes,
        planes, sums, state, largest, len(state), length,
        UNIFORM=law == "uniform", SIGNED=law == "khatri_rao", WORDS=together, BLOCK=1024,
    )  # fmt: skip
    return planes, sums


def _law(view: View) -> str:
    generator = view.generator
    assert isinstance(generator, Pranc)
    return generator.law


def accumulate(grad: Tensor, state: Tensor, view: View, **tiles: int) -> Tensor | None:
    """The gradient of the coefficients, as `Pranc.accumulate` computes it.

    Args:
        grad: of the unscaled weight, float32 of `view.shape`, any strides.
        state: coefficients [k]; their values matter where zeros are pruned.
        tiles: in place of those of `pranc_gradient.gradient_tiles`.

    Returns:
        float32 [k], the same bits (of uniform vectors and millions of elements, all but the last); None for what only plain
        torch does, as for `generate`.
    """
    law = _law(view)
    if view.kept or grad.dtype != torch.float32 or state.dtype not in NARROW or view.size > MOST.get(law, 0):
        return None
    if view.count > pranc_gradient.MOST[law] or view.count // view.fan_in > pranc_gradient.MOST_OUTPUTS:
        return None
    return pranc_gradient.projected(law, view.to_logical(grad), state, view, **tiles)
