"""The integer random functions of `fxrpg.hashing` as Triton device functions: the same bits, computed where they are used."""

from __future__ import annotations

import triton
import triton.language as tl

from fxrpg.hashing import Bijection


@triton.jit
def mix32(h):
    """`hashing.mix32` of a uint32 tensor."""
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def word_at(index, outer, inner):
    """`hashing.words_at` for counters below 2^32 (any integer type), given the stream's two keys as uint32."""
    return mix32(mix32(index.to(tl.uint32) ^ outer) + inner)


@triton.jit
def wide_word_at(index, outer, inner):
    """`hashing.words_at` for int64 counters."""
    high = (index >> 32).to(tl.uint32) * 0x9E3779B9
    return mix32(mix32(index.to(tl.uint32) ^ outer) + high + inner)


@triton.jit
def divided(x, n, reciprocal):
    """(x // n, x mod n) for uint32 x < 2^31 and n < 2^31, reciprocal = floor((2^32 - 1) / n): no division."""
    q = tl.umulhi(x, reciprocal)
    r = x - q * n  # the quotient is at most one too small
    return tl.where(r >= n, q + 1, q), tl.minimum(r, r - n)


@triton.jit
def remainder(x, n, reciprocal):
    """x mod n, as `divided`."""
    r = x - tl.umulhi(x, reciprocal) * n
    return tl.minimum(r, r - n)


@triton.jit
def scaled_square(x, key, n):
    """`hashing._scaled_square`: a number below n, the high bits of t * (t | 1) for t = x * WEYL + key."""
    t = x * 0x9E3779B1 + key
    return tl.umulhi(t * (t | 1), n)


@triton.jit
def wrapped(x, n):
    """x mod n for uint32 x < 2n: where x < n the difference wraps round and is the larger."""
    return tl.minimum(x, x - n)


@triton.jit
def shuffled(left, right, keys, a, b, ROUNDS: tl.constexpr):
    """The rounds of `hashing.Bijection` on halves below a and b, uint32."""
    for r in tl.static_range(ROUNDS):
        if r % 2 == 0:
            left = wrapped(left + scaled_square(right, keys[r], a), a)
        else:
            right = wrapped(right + scaled_square(left, keys[r], b), b)
    return left, right


@triton.jit
def unshuffled(left, right, keys, a, b, ROUNDS: tl.constexpr):
    """The inverse of `shuffled`."""
    for i in tl.static_range(ROUNDS):
        if (ROUNDS - 1 - i) % 2 == 0:
            left = wrapped(left + (a - scaled_square(right, keys[ROUNDS - 1 - i], a)), a)
        else:
            right = wrapped(right + (b - scaled_square(left, keys[ROUNDS - 1 - i], b)), b)
    return left, right


@triton.jit
def permuted(x, bijection, ROUNDS: tl.constexpr, WIDE: tl.constexpr):
    """`hashing.Bijection.__call__` on uint32 x below 2^31, or if WIDE on int64; `bijection` as `bijection_at` reads it."""
    a, b, b_reciprocal, count, keys, holes = bijection
    if WIDE:
        quotient = x // b.to(tl.int64)
        left, right = shuffled(quotient.to(tl.uint32), (x - quotient * b).to(tl.uint32), keys, a, b, ROUNDS)
        y = left.to(tl.int64) * b + right
    else:
        left, right = divided(x, b, b_reciprocal)
        left, right = shuffled(left, right, keys, a, b, ROUNDS)
        y = left * b + right
        count = count.to(tl.uint32)
    outside = y >= count
    walked = tl.load(holes + tl.where(outside, y - count, 0), mask=outside, other=0)
    return tl.where(outside, walked.to(y.dtype), y)


@triton.jit
def bijection_at(numbers):
    """(a, b, reciprocal of b, count, keys, pointer to the holes), read from int64 numbers as `numbers_of` lays them out."""
    keys = (
        tl.load(numbers + 4).to(tl.uint32),
        tl.load(numbers + 5).to(tl.uint32),
        tl.load(numbers + 6).to(tl.uint32),
        tl.load(numbers + 7).to(tl.uint32),
        tl.load(numbers + 8).to(tl.uint32),
        tl.load(numbers + 9).to(tl.uint32),
        tl.load(numbers + 10).to(tl.uint32),
        tl.load(numbers + 11).to(tl.uint32),
    )
    a, b, b_reciprocal = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    return a.to(tl.uint32), b.to(tl.uint32), b_reciprocal.to(tl.uint32), tl.load(numbers + 3), keys, numbers + 12


def numbers_of(bijection: Bijection | None) -> list[int]:
    """What `bijection_at` reads; of None, numbers of that many."""
    if bijection is None:
        return [1] * 12
    a, b = bijection.factors
    keys = (*bijection.keys, *[0] * (8 - len(bijection.keys)))
    return [a, b, ((1 << 32) - 1) // b, bijection.count, *keys, *bijection.holes]
