"""Numbers as integers of few bits, so that sums of their products with integers are exact in float64."""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENT_BITS = 31
"""Bits that are kept of the largest coefficient, and twice as many of a float64: part of the format."""

GRADIENT_BITS = 30
"""The same for gradients: one fewer, so that four signed bytes hold one."""


def fixed_point(
    alphas: Tensor, bits: int, kept: int = COEFFICIENT_BITS, *, size: int | None = None, largest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`alphas` as rows of integers: alpha_k = sum_l limbs[l, k] * weights[l], to `kept` bits of the largest.

    How many rows there are depends on how many alphas; what they stand for does not.

    Args:
        alphas: floating-point [k].
        bits: of the largest basis value.
        kept: at most 31; float64 keeps twice as many.
        size, largest: of some of a longer row of alphas, how many there are in all, and the largest magnitude, float64 [].

    Returns:
        (limbs, weights), both float64: [l, k] integers of so few bits that a sum over k of products with the basis stays
        below 2^53, and their powers of two, [l, 1]. NaN where an alpha is not finite.
    """
    wanted = 2 * kept if alphas.dtype == torch.float64 else kept
    each = min(31, 53 - bits - max(1, (len(alphas) if size is None else size) - 1).bit_length())
    alphas = alphas.to(torch.float64)
    largest = alphas.abs().amax() if largest is None else largest
    broken = 0 * largest  # zero, or NaN if an alpha is not finite
    exponent = torch.frexp(torch.nan_to_num(largest, 1.0, 1.0))[1].to(torch.float64)
    exponent = exponent.clamp(min=-960)  # so that its power, and that of the last bit, are normal numbers
    rest, limbs, weights = alphas * torch.exp2(-exponent), [], []
    for done in range(0, wanted, each):
        width = min(each, wanted - done)
        rest = rest * 2.0**width
        whole = torch.round(rest) if done + width == wanted else torch.trunc(rest)
        limbs.append(whole)
        weights.append(torch.exp2(exponent - (done + width)) + broken)
        rest = rest - whole
    return torch.stack(limbs), torch.stack(weights)[:, None]


def from_parts(sums: Tensor, weights: Tensor) -> Tensor:
    """What exact sums over rows of integers stand for: the rows added, the smallest first, in one order everywhere.

    Args:
        sums: float64 [l, n], one row for each of `fixed_point`'s.
        weights: theirs, [l, 1].

    Returns:
        float64 [n]. Rounded once if there are two rows, which is so unless there are millions of numbers.
    """
    total, *parts = (sums * weights).flip(0)
    for part in parts:
        total = total + part
    return total
