"""The project's integer random functions: same bits on every device, thread count and library version.

Everything here is counter-based 32-bit integer arithmetic, so a value can be computed alone, in any order. Changing one
constant changes every model ever saved: the golden vectors in the tests hold them, FORMAT_VERSION names them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxrpg.device import kept, settled

FORMAT_VERSION = 1
SEED_LIMIT = 1 << 64

# What a stream of random words is for; part of its key.
PERMUTE, SIGN, CELL, INIT, ROW, COLUMN, PROTOTYPE, SCORE, COORDINATE = range(1, 10)

NEAR_NORMAL_DEVIATION = (8 * ((1 << 32) - 1) / 12) ** 0.5
"""Standard deviation of a sum of eight 16-bit uniform integers."""

_MASK, _MASK_64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_GOLDEN, _GOLDEN_64 = 0x9E3779B9, 0x9E3779B97F4A7C15  # 2^32 and 2^64 over the golden ratio
_WEYL = 0x9E3779B1  # the prime next to it
_MIX_1, _MIX_2 = 0x7FEB352D, 0x846CA68B  # C. Wellons' lowbias32 (public domain)


def _signed(word: int) -> int:
    """The int32 with the bits of `word`: torch has no 32-bit unsigned arithmetic."""
    return word - (1 << 32) if word >= 1 << 31 else word


def mix32(h: Tensor) -> Tensor:
    """A 32-bit mixing bijection on every element of an int32 tensor (the bits of a uint32)."""
    return _mix32_(h.clone())


def _mix32_(h: Tensor) -> Tensor:
    """`mix32` in place, with one temporary for the whole chain."""
    shifted = torch.empty_like(h)
    for shift, mask, factor in ((16, 0xFFFF, _MIX_1), (15, 0x1FFFF, _MIX_2), (16, 0xFFFF, 1)):
        torch.bitwise_right_shift(h, shift, out=shifted)
        h.bitwise_xor_(shifted.bitwise_and_(mask))  # int32 shifts carry the sign bit in: mask it away
        if factor != 1:
            h.mul_(_signed(factor))
    return h


@functools.lru_cache(maxsize=1 << 16)
def derive_key(seed: int, *labels: int) -> int:
    """A 32-bit key from a 64-bit seed, the format version and labels below 2^64 (purpose, tensor id, round...).

    The words pass one by one through a 64-bit state, mixed by the finaliser of SplitMix64: two seeds or labels part ways
    with all the 64 bits that they differ in, and only the key is cut to its upper half.
    """
    h = 0
    for word in (FORMAT_VERSION, seed, *labels):
        h = (h ^ word) + _GOLDEN_64 & _MASK_64
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
        h = (h ^ h >> 27) * 0x94D049BB133111EB & _MASK_64
        h ^= h >> 31
    return h >> 32


def random_words(first: int, count: int, seed: int, *labels: int, device: torch.device | str = "cpu") -> Tensor:
    """Words `first .. first + count - 1` of the stream (seed, labels), as int32 bit patterns.

    Two mixing rounds with two keys, so that streams of different keys are not reorderings of one another.

    Returns:
        int32 tensor of shape [count].
    """
    index = torch.arange(first, first + count, dtype=torch.int64, device=device)
    return words_at(index, seed, *labels)


def stream_keys(seed: int, *labels: int) -> tuple[int, int]:
    """The two keys, of the outer and the inner mixing round, of the stream (seed, labels)."""
    return derive_key(seed, *labels, 0), derive_key(seed, *labels, 1)


def words_at(index: Tensor, seed: int, *labels: int) -> Tensor:
    """The stream's words at the given int64 counters (any shape, any order), as int32 bit patterns."""
    outer, inner = stream_keys(seed, *labels)
    h = mix32(index.to(torch.int32) ^ _signed(outer))
    high = (index >> 32).to(torch.int32) * _signed(_GOLDEN)
    return mix32(h + high + _signed(inner))


def crossed_words(rows: Tensor, columns: Tensor) -> Tensor:
    """A word for every pair of a column's and a row's random word: int32 [columns, rows], one mixing round each.

    A basis draws one word for each (element, group of basis vectors), by far the most words of all: the two streams are
    hashed in full, their crossing once.
    """
    return _mix32_(columns[:, None] + rows[None, :])


def near_normal(
    count: int, seed: int, *labels: int, chunk: int = 1 << 20, device: torch.device | str = "cpu"
) -> Tensor:
    """`count` values of zero mean and unit variance, near normal, exact on every machine.

    Each is the sum of eight 16-bit uniform integers (Irwin-Hall), divided once: no logarithm or cosine whose last bits
    differ between libraries.

    Returns:
        float64 tensor of shape [count].
    """
    out = torch.empty(count, dtype=torch.float64, device=device)
    for start in range(0, count, chunk):
        n = min(chunk, count - start)
        words = random_words(4 * start, 4 * n, seed, *labels, device=device).view(n, 4)
        total = ((words & 0xFFFF) + (words >> 16 & 0xFFFF)).sum(1)
        out[start : start + n] = (total - 4 * 0xFFFF).to(torch.float64) / NEAR_NORMAL_DEVIATION
    return out


@dataclass(frozen=True)
class Bijection:
    """A keyed permutation of 0 .. count-1 that stores nothing: a Feistel network on Z_a x Z_b (Black and Rogaway).

    Halves are added modulo a and b. The few images at or past `count` (a*b is the least product that covers it) are sent
    back into range through a small table, built once: cycle walking done ahead.

    Args:
        count: number of elements, 1 <= count < 2^60.
        keys: one 32-bit key per round.
    """

    count: int
    keys: tuple[int, ...]

    @staticmethod
    def keyed(count: int, seed: int, *labels: int) -> Bijection:
        """The permutation of 0 .. count-1 that belongs to (seed, labels). Small counts take eight rounds, others six."""
        rounds = 8 if count < 1 << 14 else 6
        return _shared(count, tuple(derive_key(seed, *labels, r) for r in range(rounds)))

    @property
    def factors(self) -> tuple[int, int]:
        """(a, b) with a <= b, a*b >= count and the least excess."""
        return _factors(self.count)

    def __call__(self, x: Tensor) -> Tensor:
        """Images of `x` (int64, 0 <= x < count), any shape."""
        return self._into_range(self._rounds(x), self.holes)

    def inverse(self, y: Tensor) -> Tensor:
        """Preimages of `y` (int64, 0 <= y < count), any shape."""
        return self._into_range(self._rounds_inverse(y), self.inverse_holes)

    def _rounds(self, x: Tensor) -> Tensor:
        a, b = self.factors
        left = torch.div(x, b, rounding_mode="floor")
        right = x - left * b
        for r, key in enumerate(self.keys):
            if r % 2 == 0:
                left = _wrap(left + _scaled_square(right, key, a), a)
            else:
                right = _wrap(right + _scaled_square(left, key, b), b)
        return left * b + right

    def _rounds_inverse(self, y: Tensor) -> Tensor:
        a, b = self.factors
        left = torch.div(y, b, rounding_mode="floor")
        right = y - left * b
        for r, key in reversed(list(enumerate(self.keys))):
            if r % 2 == 0:
                left = _wrap(left + (a - _scaled_square(right, key, a)), a)
            else:
                right = _wrap(right + (b - _scaled_square(left, key, b)), b)
        return left * b + right

    def _into_range(self, y: Tensor, holes: tuple[int, ...]) -> Tensor:
        if not holes:
            return y
        table = on_device(holes, y.device)
        return torch.where(y < self.count, y, table[(y - self.count).clamp_(min=0)])

    @functools.cached_property
    def holes(self) -> tuple[int, ...]:
        """Where the images count, count + 1, ... that lie out of range are sent."""
        return self._walk(self._rounds)

    @functools.cached_property
    def inverse_holes(self) -> tuple[int, ...]:
        """The same for the inverse."""
        return self._walk(self._rounds_inverse)

    def _walk(self, step: Callable[[Tensor], Tensor]) -> tuple[int, ...]:
        """Where each element of [count, a*b) ends when `step` is repeated until it falls below count.

        An element that never does lies on a cycle outside the range, which nothing in the range reaches: any value will do.
        """
        a, b = self.factors
        y = torch.arange(self.count, a * b, dtype=torch.int64, device="cpu")
        for _ in range(len(y)):
            y = torch.where(y >= self.count, step(y), y)
        return tuple(torch.where(y >= self.count, 0, y).tolist())


@kept(4096)
def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """`numbers`, int64, kept there: a copy at every call would stall a GPU, and cannot be captured in a CUDA graph."""
    return settled(torch.tensor(numbers, dtype=torch.int64, device=device))


@functools.lru_cache(maxsize=4096)
def _shared(count: int, keys: tuple[int, ...]) -> Bijection:
    return Bijection(count, keys)  # one object, so that its hole tables are built once


def _wrap(x: Tensor, n: int) -> Tensor:
    """x mod n for 0 <= x < 2n."""
    return torch.where(x >= n, x - n, x)


def _scaled_square(x: Tensor, key: int, n: int) -> Tensor:
    """A number below `n` from `x`: the high bits of t * (t | 1), t = x * WEYL + key, all modulo 2^32."""
    t = x * _WEYL + key & _MASK
    # t * (t | 1) overflows int64, which wraps; its low 32 bits are the ones wanted and are exact.
    return ((t * (t | 1) & _MASK) * n) >> 32


@functools.lru_cache(maxsize=4096)
def _factors(count: int, chunk: int = 1 << 20) -> tuple[int, int]:
    """(a, b), a in [sqrt(count)/2, sqrt(count)], with a*b >= count exceeded by least; of equals, the squarest.

    a = 1 would leave one half constant and permute by rotation alone: only counts below four get it.
    """
    root = math.isqrt(count)
    lowest = min(root, max(2, (root + 1) // 2))
    best: tuple[int, int, int] | None = None
    for top in range(root, lowest - 1, -chunk):
        a = np.arange(top, max(lowest, top - chunk + 1) - 1, -1, dtype=np.int64)
        excess = (-count) % a
        i = int(excess.argmin())
        if best is None or excess[i] < best[0]:
            best = int(excess[i]), int(a[i]), -(-count // int(a[i]))
        if best[0] == 0:
            break
    assert best is not None
    return best[1], best[2]
