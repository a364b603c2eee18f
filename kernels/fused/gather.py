"""The state's gradient gathered number by number, in sums of a fixed order: no atomics, the same bits every time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxrpg.kernels.fused.launch import cdiv, launch
from fxrpg.view import Form, View

LEVELS = 6
"""Sums of up to 2^LEVELS terms are one tree."""
ALIGNED = 64
"""Gradients are padded with zeros to a multiple of so many elements: a whole block of every method."""


@triton.jit
def halved(slot, count, LEVELS: tl.constexpr):
    """Which of `count` terms stand in the slots 0 .. 2^LEVELS - 1, and whether any does.

    Terms added in halves, n into ceil(n / 2), as slots are in whole halves: the tree of `Ring.gather_gradient`.
    """
    term, there = slot * 0, slot >= 0
    for i in tl.static_range(LEVELS):
        half = (count + (1 << (LEVELS - i)) - 1) >> (LEVELS - i)
        both = (count + (1 << (LEVELS - i - 1)) - 1) >> (LEVELS - i - 1)
        term += ((slot >> i) & 1) * half
        there = there & (term < both)
    return term, there


@triton.jit
def gather_kernel(
    out, grad, size, uses, uses_each,
    BEGIN: tl.constexpr, GATHER: tl.constexpr, args, SPEC: tl.constexpr, LEVELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradients of WIDTH numbers of the state: `uses_each` uses of each in a tree, such trees one after the other."""
    form = BEGIN(args, SPEC)
    cell0 = tl.program_id(0) * WIDTH
    term, there = halved(tl.arange(0, 1 << LEVELS), uses_each, LEVELS)
    total = tl.zeros((1 << LEVELS, WIDTH), tl.float32)
    for first in range(0, uses, uses_each):
        use = tl.where(there & (first + term < uses), first + term, -1)
        total += GATHER(grad, use, cell0, WIDTH, form, SPEC)
    total = tl.reshape(total, (1 << LEVELS, WIDTH))
    for i in tl.static_range(LEVELS):  # a sum of two is the same in any order
        total = tl.sum(tl.reshape(total, (2, 1 << (LEVELS - i - 1), WIDTH)), 0)
    cell = cell0 + tl.arange(0, WIDTH)
    tl.store(out + cell, tl.reshape(total, (WIDTH,)), mask=cell < size)


def gather(grad: Tensor, form: Form, view: View) -> Tensor:
    """The state's gradient, float32 [view.size], from that of the unscaled weight, of `view.shape` and any strides.

    The same bits on every device and for every tile. Sums of up to 64 terms are those of `Ring.gather_gradient`.

    Args:
        form: one whose `gather` is there.
    """
    assert form.gather is not None
    function, uses = form.gather
    each = cdiv(uses, cdiv(uses, 1 << LEVELS))
    levels = (each - 1).bit_length()
    width = 2048 >> max(levels, 2)
    values = view.to_logical(grad).float()
    values = torch.nn.functional.pad(values, (0, -view.count % ALIGNED)).contiguous()
    out = torch.empty(view.size, dtype=torch.float32, device=grad.device)
    launch(
        gather_kernel, (cdiv(view.size, width),), out, out, values, view.size, uses, each,
        BEGIN=form.begin, GATHER=function, args=form.args, SPEC=form.spec, LEVELS=levels, WIDTH=width,
    )  # fmt: skip
    return out
