"""The one place where kernels are launched: on the tensors' device, with explicit options, and counted."""

from __future__ import annotations

import collections
import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LAUNCHES: collections.Counter[str] = collections.Counter()
"""How often each kernel was launched in this process, by name: the proof that a fused path really ran."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One call of `launch`: everything that decides what is compiled and run.

    Args:
        kernel: the jit function.
        grid: numbers of programs.
        args: positional arguments.
        constants: the others, by name.
        options: of the compiler.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


_record: contextvars.ContextVar[list[Launch] | None] = contextvars.ContextVar("fxrpg_launches", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect the launches inside the block, in order, instead of running them: outputs are left as they were allocated."""
    found: list[Launch] = []
    token = _record.set(found)
    try:
        yield found
    finally:
        _record.reset(token)


def launch(
    kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, warps: int = 4, stages: int = 2, **constants: Any
) -> None:
    """Run `kernel[grid](*args, **constants)` on the device of `like`.

    Args:
        warps: warps of 32 threads a program.
        stages: depth of the software pipeline.
        constants: the kernel's `tl.constexpr` parameters.
    """
    if 0 in grid:
        return
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if (record := _record.get()) is not None:
        record.append(Launch(kernel=kernel, grid=grid, args=args, constants=constants, options=options))
        return
    LAUNCHES[kernel.__name__] += 1
    with torch.cuda.device(like.device.index if like.is_cuda else -1):
        kernel[grid](*args, **constants, **options)


def padded(n: int, least: int = 16) -> int:
    """The least power of two that covers `n`, and `least`: the side of a tile."""
    return max(least, 1 << max(0, n - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
