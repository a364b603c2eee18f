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

_SUMS = 1 << 16
"""Elements of a weight that are summed together."""


class _BasisView(ctypes.Structure):
    _fields_ = [
        ("first", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
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
    law = _law(view) if grad.shape == view.shape else None
    return None if law is None else view.generator.projected(law, grad * factor, state, view)  # type: ignore[attr-defined]


def _law(view: View) -> Law | None:
    generator: Any = view.generator
    alone = view.parent is None or generator._drawn_alone(view)
    return _LAWS.get(generator.law) if alone and view.whole.count < 1 << 31 else None


class _Signs:
    """Signs that pick ready sums, a byte at a time, while they are made: they are never unpacked, nor multiplied."""

    products = False
    """Whether a sign is one of an output times one of an input."""

    def combine(self, numbers: Tensor, view: View, start: int = 0) -> Iterator[Tensor]:
        padded = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % 32)).contiguous()
        groups = padded.shape[1] // 32
        for first in range(0, view.count, _SUMS):
            given = _given(view, first, min(_SUMS, view.count - first), start, self.products)
            out = padded.new_empty(len(padded), given.count)
            threads = native.threads(given.count * groups)
            scratch = torch.empty(groups + given.inner, dtype=torch.int32, device=padded.device)
            where = padded.data_ptr(), out.data_ptr(), scratch.data_ptr()
            _sums("combine")(given, len(padded), groups, threads, *where)
            yield out

    def project(self, numbers: Tensor, view: View, size: int, start: int = 0) -> Tensor:
        given, numbers = _given(view, 0, view.count, start, self.products), numbers.contiguous()
        groups = -(-size // 32)
        out = numbers.new_empty(len(numbers), 32 * groups)
        threads = native.threads(view.count * groups)
        scratch = torch.empty(groups + (given.inner or given.count), dtype=torch.int32, device=numbers.device)
        where = numbers.data_ptr(), out.data_ptr(), scratch.data_ptr()
        _sums("project")(given, len(numbers), groups, threads, *where)
        return out[:, :size]


class _Rademacher(_Signs, Rademacher):
    """A word for every element and 32 basis vectors."""


class _KhatriRao(_Signs, KhatriRao):
    """The exclusive or of an output's word and an input's: on a CPU that costs less than a matrix product of signs."""

    products = True


_LAWS: dict[str, Law] = {"rademacher": _Rademacher(), "khatri_rao": _KhatriRao()}


def _given(view: View, first: int, count: int, start: int, products: bool) -> _BasisView:
    """What the C code is told: elements `first` to `first + count - 1` of the view, basis vectors from `start` on."""
    given = _BasisView(first=view.first + first, count=count, group=start // 32)
    given.row[:] = stream_keys(view.seed, ROW, view.tensor)
    given.column[:] = stream_keys(view.seed, COLUMN, view.tensor)
    if products:
        whole = view.whole
        given.inner, given.inputs = whole.fan_in, whole.count // whole.fan_in
    return given


_INT64, _INT, _POINTER = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p


@functools.cache
def _sums(name: str) -> Any:
    view = ctypes.POINTER(_BasisView)
    return native.function(f"signs_{name}", (view, _INT64, _INT64, _INT, _POINTER, _POINTER, _POINTER))
