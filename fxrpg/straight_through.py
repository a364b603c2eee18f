"""A value with the derivatives of another: what rounding and thresholds train with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, smooth: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad

    @staticmethod
    def jvp(ctx: Any, _value: Any, smooth: Any) -> Any:
        return smooth.clone()


def straight_through(value: Tensor, smooth: Tensor) -> Tensor:
    """`value`, with the derivatives of `smooth` (same shape and type)."""
    return _StraightThrough.apply(value.detach(), smooth)
