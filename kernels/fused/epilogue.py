"""What happens to a finished sum before it is stored: bias, a factor and a shift a channel, an activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Finish(NamedTuple):
    """What kernels specialise on: which of the steps there are, and the activation's name or "none"."""

    bias: bool
    factor: bool
    shift: bool
    activation: str


@dataclass(frozen=True)
class Epilogue:
    """activation((sum + bias) * factor + shift), tensors of one number an output channel, of any type."""

    bias: Tensor | None = None
    factor: Tensor | None = None
    shift: Tensor | None = None
    activation: str = "none"

    @property
    def finish(self) -> Finish:
        """What kernels specialise on."""
        return Finish(self.bias is not None, self.factor is not None, self.shift is not None, self.activation)

    def tensors(self, unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(bias, factor, shift), with `unused` in the place of those that there are not."""
        bias, factor, shift = (unused if t is None else t.contiguous() for t in (self.bias, self.factor, self.shift))
        return bias, factor, shift


@triton.jit
def finished(total, channel, there, bias, factor, shift, EPILOGUE: tl.constexpr):
    """activation((total + bias) * factor + shift), float32 [channels, positions]; `there` masks channels out of range."""
    if EPILOGUE.bias:
        total += tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)[:, None]
    if EPILOGUE.factor:
        total *= tl.load(factor + channel, mask=there, other=0.0).to(tl.float32)[:, None]
    if EPILOGUE.shift:
        total += tl.load(shift + channel, mask=there, other=0.0).to(tl.float32)[:, None]
    NAME: tl.constexpr = EPILOGUE.activation  # Triton 3.6 passes on no string that is a field of something
    return activated(total, NAME)


@triton.jit
def activated(x, NAME: tl.constexpr):
    """The activation called NAME, as torch computes it; NaN stays NaN."""
    if NAME == "relu":
        return tl.where(x < 0, 0.0, x)
    if NAME == "relu6":
        return tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    if NAME == "silu":
        return x * _sigmoid(x)
    if NAME == "sigmoid":
        return _sigmoid(x)
    if NAME == "hardswish":
        gate = x + 3
        return x * tl.where(gate < 0, 0.0, tl.where(gate > 6, 6.0, gate)) / 6
    if NAME == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    if NAME == "gelu_tanh":
        return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))  # at most 1: nothing overflows
    return tl.where(x < 0, small, 1.0) / (1 + small)
