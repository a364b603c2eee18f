"""Numbers as integers of few bits, so that sums of their products with integers are exact in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def fixed_point(alphas: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`alphas` as rows of integers: alpha_k = sum_l limbs[l, k] * weights[l], to 31 bits of the largest (62 for float64).

    How many rows there are depends on how many alphas; what they stand for does not.

    Args:
        alphas: floating-point [k].
        bits: of the largest basis value.

    Returns:
        (limbs, weights), both float64: [l, k] integers of so few bits that a sum over k of products with the basis stays
        below 2^53, and their powers of two, [l, 1]. NaN where an alpha is not finite.
    """
    wanted = 62 if alphas.dtype == torch.float64 else 31
    each = min(31, 53 - bits - max(1, len(alphas) - 1).bit_length())
    alphas = alphas.to(torch.float64)
    broken = (0 * alphas).sum()  # zero, or NaN if an alpha is not finite
    exponent = torch.frexp(torch.nan_to_num(alphas.abs().amax(), 1.0, 1.0))[1].to(torch.float64)
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
