"""PRANC on the CPU: the laws of random signs with the C code of pranc.c. Their sums are exact, so no bit differs."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxrpg import native
from fxrpg.basis import KhatriRao, Law, Rademacher
from fxrpg.hashing import COLUMN, ROW, stream_keys
from fxrpg.view import View

_FACTORS = 1 << 18
"""Signs of a chunk of Khatri-Rao factors: two megabytes, and matrix products of a size that libraries are good at."""
_SUMS = 1 << 16
"""Elements of a weight that are summed together."""


class _BasisView(ctypes.Structure):
    _fields_ = [
        ("first", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("row", ctypes.c_uint32 * 2),
        ("column", ctypes.c_uint32 * 2),
    ]


def generate(view: View, state: Tensor, factor: float, dtype: torch.dtype) -> Tensor | None:
    """The scaled weight of `view`, in `dtype`; None where no C code covers it."""
    law = _law(view)
    if law is None:
        return None
    values = view.generator.summed(law, state, view, dtype)  # type: ignore[attr-defined]
    return values.mul_(factor) if dtype.itemsize >= 4 else (values.float() * factor).to(dtype)


def accumulate(into: None, grad: Tensor, state: Tensor, view: View, factor: float) -> Tensor | None:
    """The gradient of the coefficients from that of the scaled weight."""
    law = _law(view)
    return None if law is None else view.generator.projected(law, grad * factor, state, view)  # type: ignore[attr-defined]


def _law(view: View) -> Law | None:
    generator: Any = view.generator
    alone = view.parent is None or generator._drawn_alone(view)
    return _LAWS.get(generator.law) if alone and view.whole.count < 1 << 31 else None


class _Rademacher(Rademacher):
    """Signs that pick ready sums, a byte at a time, while they are made."""

    def combine(self, numbers: Tensor, view: View, start: int = 0) -> Iterator[Tensor]:
        padded = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % 32)).contiguous()
        groups = padded.shape[1] // 32
        for first in range(0, view.count, _SUMS):
            given = _given(view, first, min(_SUMS, view.count - first), start)
            out = padded.new_empty(len(padded), given.count)
            threads = native.threads(given.count * groups)
            _sums("combine")(given, len(padded), groups, threads, padded.data_ptr(), out.data_ptr())
            yield out

    def project(self, numbers: Tensor, view: View, size: int, start: int = 0) -> Tensor:
        given, numbers, groups = _given(view, 0, view.count, start), numbers.contiguous(), -(-size // 32)
        out = numbers.new_empty(len(numbers), 32 * groups)
        threads = native.threads(view.count * groups)
        _sums("project")(given, len(numbers), groups, threads, numbers.data_ptr(), out.data_ptr())
        return out[:, :size]


class _KhatriRao(KhatriRao):
    """Larger chunks of signs than plain torch, whose many small steps had better stay below a thread's share."""

    def _factors(
        self, view: View, size: int, device: torch.device, outputs: slice, start: int = 0
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        words, keys = self._words(view, device, outputs), stream_keys(view.seed, COLUMN, view.tensor)
        step = max(1, _FACTORS // (32 * len(words)))
        for group in range(0, groups := -(-size // 32), step):
            some = min(step, groups - group)
            signs = torch.empty(32 * some, len(words), dtype=torch.float64)
            threads = native.threads(signs.numel())
            where = words.data_ptr(), signs.data_ptr()
            _signs()((ctypes.c_uint32 * 2)(*keys), start // 32 + group, some, len(words), threads, *where)
            signs = signs[: size - 32 * group]
            yield 32 * group, signs[:, : -view.fan_in], signs[:, -view.fan_in :]


_LAWS: dict[str, Law] = {"rademacher": _Rademacher(), "khatri_rao": _KhatriRao()}


def _given(view: View, first: int, count: int, start: int) -> _BasisView:
    """Elements from `first` of a view, and basis vectors from `start`, as C code takes them."""
    given = _BasisView(first=view.first + first, count=count, group=start // 32)
    given.row[:] = stream_keys(view.seed, ROW, view.tensor)
    given.column[:] = stream_keys(view.seed, COLUMN, view.tensor)
    return given


_INT64, _INT, _POINTER = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p


@functools.cache
def _sums(name: str) -> Any:
    view = ctypes.POINTER(_BasisView)
    return native.function(f"rademacher_{name}", (view, _INT64, _INT64, _INT, _POINTER, _POINTER))


@functools.cache
def _signs() -> Any:
    keys = ctypes.POINTER(ctypes.c_uint32)
    return native.function("crossed_signs", (keys, _INT64, _INT64, _INT64, _INT, _POINTER, _POINTER))
