"""A value with the derivatives of another: what rounding and thresholds train with."""

from __future__ import annotations

from torch import Tensor


def straight_through(value: Tensor, smooth: Tensor) -> Tensor:
    """`value`, with the derivatives of `smooth` (same shape and type), in every mode of differentiation."""
    return value.detach() + (smooth - smooth.detach())
