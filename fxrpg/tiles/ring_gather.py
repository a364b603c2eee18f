"""The ring's gradient read back through the inverse permutation: device functions of the sums that have a fixed order."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fxrpg.tiles.hashing import divided, unshuffled, word_at
from fxrpg.view import View


@triton.jit
def _original(y, bijection, SPEC: tl.constexpr):
    """`hashing.Bijection.inverse`, in uint32. Its holes follow those of the bijection in memory."""
    a, b, b_reciprocal, domain, keys, holes = bijection
    left, right = divided(y, b, b_reciprocal)
    left, right = unshuffled(left, right, keys, a, b, SPEC.rounds)
    x, domain = left * b + right, domain.to(tl.uint32)
    outside = x >= domain
    walked = tl.load(holes + (a * b - domain) + tl.where(outside, x - domain, 0), mask=outside, other=0)
    return tl.where(outside, walked.to(tl.uint32), x)


@triton.jit
def ring_gather(grad, use, cell0, WIDTH: tl.constexpr, form, SPEC: tl.constexpr):
    """What one use of each of the cells cell0 .. cell0 + WIDTH - 1 adds to its gradient, float32 [U, WIDTH].

    For the layout "arc" and a ring of whole blocks: the arc passes a cell once a lap, and its u-th use is in lap u.

    Args:
        grad: the float32 gradient of unscaled values, elements in logical order, then zeros to a whole block.
        use: number of the use, int32 [U]; of one that there is not, such as -1, comes zero.
    """
    RUN: tl.constexpr = SPEC.block if SPEC.block < 32 else 32
    RUNS: tl.constexpr = SPEC.block // RUN
    count, first, rows = form[2].to(tl.int32), form[4].to(tl.int32), form[6].to(tl.int32)
    run = cell0 // RUN + tl.arange(0, WIDTH // RUN)
    row = run // RUNS
    block = use[:, None] * rows + row[None, :] - first
    there = (block >= 0) & (block < tl.cdiv(count, SPEC.block)) & (row < rows)[None, :]
    block = tl.where(there, block, 0).to(tl.uint32)
    if SPEC.permute:
        block = _original(block, form[8], SPEC)
    first_element = block * SPEC.block + (run % RUNS * RUN).to(tl.uint32)[None, :]  # [U, runs]
    lane = tl.arange(0, RUN).to(tl.uint32)[None, None, :]
    value = tl.load(grad + (first_element[:, :, None] + lane), mask=there[:, :, None], other=0.0)
    if SPEC.reflect:
        word = word_at(first_element >> 5, form[9][0], form[9][1]) >> (first_element & 31)
        bits = value.to(tl.uint32, bitcast=True) ^ ((word[:, :, None] >> lane) << 31)
        value = bits.to(tl.float32, bitcast=True)
    return tl.reshape(value, (use.shape[0], WIDTH))


def gather_of(ring: Any, view: View, size: int) -> tuple[Any, int] | None:
    """`Form.gather` for a view of a ring of `size` cells: None where a cell's uses do not follow from its place."""
    if ring.layout != "arc" or size % ring.block or view.count + 2 * size >= 1 << 31:
        return None
    return ring_gather, -(-(view.offset % size + -(-view.count // ring.block) * ring.block) // size)
