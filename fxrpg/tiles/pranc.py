"""PRANC's integers as Triton device functions: fixed-point numbers, their digits, and random bits unpacked to bytes.

Tensor cores sum products of bytes exactly, so a sum over the basis is made of bytes: of the bits that are drawn and of the
digits of a fixed-point number. A word's bits are masked four at a time, bit s of each of its bytes, and the bytes of
32-bit integers are then taken apart by `joined`, which leaves them where they are in registers. No layout is assumed:
another one is only slower.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fixed_scales(largest, BITS: tl.constexpr):
    """(2^(BITS - e), 2^(e - BITS)), float64, for the least e with largest < 2^e: `fixed_point.fixed_point`'s scale and unit.

    Args:
        largest: magnitude of the largest number, float32 or less. If it is not finite the unit is NaN.
    """
    field = (largest.to(tl.float64).to(tl.int64, bitcast=True) >> 52) & 0x7FF
    exponent = tl.where(field == 0, 0, field - 1022)
    unit = ((exponent + (1023 - BITS)) << 52).to(tl.float64, bitcast=True)
    scale = ((-exponent + (1023 + BITS)) << 52).to(tl.float64, bitcast=True)
    return scale, tl.where(field == 0x7FF, float("nan"), unit)


@triton.jit
def fixed(number, scale):
    """`number` times `scale` as the nearest integer, ties to even, int32; zero if it is not finite."""
    x = number.to(tl.float64) * scale
    x = tl.where(tl.abs(x) < 2147483648.0, x, 0.0)
    return ((x + 6755399441055744.0) - 6755399441055744.0).to(tl.int32)  # 1.5 * 2^52: the sum has no fraction left


@triton.jit
def digit_bytes(q):
    """An int32 whose four bytes are signed digits of `q`: q = sum_l byte_l 2^(8 l). For |q| <= 2^30."""
    return (q + 0x808080) ^ 0x808080


@triton.jit
def joined(a, b, c, d):
    """Four tensors side by side in two new last axes, of two each."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def bytes_of(packed, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The bytes of 32-bit integers, the lowest first: [..., n] -> int8 [ROWS, COLUMNS], as many in the same order."""
    taken = joined(
        packed.to(tl.int8), (packed >> 8).to(tl.int8), (packed >> 16).to(tl.int8), (packed >> 24).to(tl.int8)
    )
    return taken.reshape(ROWS, COLUMNS)


@triton.jit
def bits_of(words):
    """Bit s of every byte of uint32 words, as bytes 0 and 1: [rows, columns] -> uint32 [rows, columns, 2, 2, 2] over s."""
    even = joined(words & 0x01010101, (words >> 2) & 0x01010101, (words >> 4) & 0x01010101, (words >> 6) & 0x01010101)
    odd = joined(
        (words >> 1) & 0x01010101, (words >> 3) & 0x01010101, (words >> 5) & 0x01010101, (words >> 7) & 0x01010101
    )
    return tl.join(even, odd)


@triton.jit
def packed_bits(words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """The bits of each row's words, four to an integer: uint32 [ROWS, 8 * WORDS], bit 8 c + s of word w in byte c of
    integer s * WORDS + w. In this order the threads of a tensor core's tile draw no word twice."""
    return bits_of(words).permute(0, 2, 3, 4, 1).reshape(ROWS, 8 * WORDS)


@triton.jit
def turned_bits(words, WORDS: tl.constexpr, COLUMNS: tl.constexpr):
    """As `packed_bits` with words along rows: int8 [8 * WORDS, 4 * COLUMNS], bit 8 c + s of word w of element i in row
    `turned_row(w, s)` and column 4 i + c."""
    bits = bits_of(words).reshape(WORDS // 8, 8, COLUMNS, 2, 2, 2)
    return bytes_of(bits.permute(3, 4, 0, 5, 1, 2), 8 * WORDS, 4 * COLUMNS)


@triton.jit
def turned_row(word, s, WORDS: tl.constexpr):
    """The row in which `turned_bits` puts bit s of the bytes of a word."""
    return ((s >> 1) * (WORDS // 8) + word // 8) * 16 + (s & 1) * 8 + word % 8


@triton.jit
def byte_column(w0, w1, w2, w3, C: tl.constexpr):
    """Byte C of four words side by side in one."""
    low = ((w0 >> (8 * C)) & 0xFF) | (((w1 >> (8 * C)) & 0xFF) << 8)
    return low | (((w2 >> (8 * C)) & 0xFF) << 16) | (((w3 >> (8 * C)) & 0xFF) << 24)


@triton.jit
def transposed_signs(w0, w1, w2, w3, WORDS: tl.constexpr, COLUMNS: tl.constexpr):
    """Signs with elements along rows of bytes: int8 +-1 [32 * WORDS, 4 * COLUMNS], from the words [WORDS, COLUMNS] of the
    elements 4 x, 4 x + 1, 4 x + 2 and 4 x + 3. Rows are the basis vectors, columns the elements, both in order."""
    by_byte = joined(
        byte_column(w0, w1, w2, w3, 0), byte_column(w0, w1, w2, w3, 1),
        byte_column(w0, w1, w2, w3, 2), byte_column(w0, w1, w2, w3, 3),
    )  # fmt: skip
    bits = bits_of(by_byte.reshape(WORDS, 4 * COLUMNS)).reshape(WORDS, COLUMNS, 4, 2, 2, 2)
    return bytes_of(signs_of(bits.permute(0, 2, 3, 4, 5, 1)), 32 * WORDS, 4 * COLUMNS)


@triton.jit
def signs_of(bits):
    """Bytes 1 and -1 for bytes 0 and 1."""
    return (bits * 0xFE) | 0x01010101


@triton.jit
def uniform_sum(low, high, plain):
    """sum q v for uniform values v = 512 h + 2 l + 257, of which l and h are the signed bytes: float64, rounded once.

    Args:
        low, high, plain: sum q l, sum q h and sum q, int64. The result may be wider: it is added in two parts that a
            float64 holds.
    """
    upper = 512 * (high >> 16) + 2 * (low >> 16) + 257 * (plain >> 16)
    lower = 512 * (high & 0xFFFF) + 2 * (low & 0xFFFF) + 257 * (plain & 0xFFFF)
    return upper.to(tl.float64) * 65536.0 + lower.to(tl.float64)
