"""PEMN on the CPU: the C code of pemn.c, which selects by digits instead of sorting, to the same bits as plain torch."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, cast

import torch
from torch import Tensor

from fxrpg import native
from fxrpg.hashing import NEAR_NORMAL_DEVIATION, PROTOTYPE, stream_keys
from fxrpg.kernels.native.layout import Layout
from fxrpg.view import View


class _PemnView(ctypes.Structure):
    _fields_ = [
        ("to", Layout),
        ("size", ctypes.c_int64),
        ("normal", ctypes.c_int64),
        ("deviation", ctypes.c_double),
        ("key", ctypes.c_uint32 * 2),
    ]


class _Selection(ctypes.Structure):
    _fields_ = [("least", ctypes.c_int64), ("last", ctypes.c_int64), ("broken", ctypes.c_int64)]


_INT, _NUMBER, _POINTER = ctypes.c_int, ctypes.c_double, ctypes.c_void_p
_VIEW = ctypes.POINTER(_PemnView)


def generate(view: View, state: Tensor, factor: float, dtype: torch.dtype) -> Tensor | None:
    """The scaled weight of `view`, in `dtype`; None where no C code covers it."""
    given, pemn, whole = _given(view.whole.text), cast(Any, view.generator), view.whole
    frozen = state.dtype == torch.uint8
    expected = pemn.frozen_shape(whole) if frozen else whole.shape
    if given is None or state.dtype == torch.float64 or state.shape != expected:
        return None
    single = dtype == torch.float32
    weight = torch.empty(whole.shape, dtype=dtype if single else torch.float64, device=state.device)
    kept, scores, bits = _Selection(), 0, 0
    state = state.contiguous() if frozen else state.float().contiguous()
    if frozen:
        bits = state.data_ptr()
    else:
        scores = state.data_ptr()
        _select()(given.to, pemn.kept(state.numel()), native.threads(state.numel()), scores, kept)
    threads = native.threads(weight.numel())
    scratch = _scratch(given, threads, state.device)
    where = weight.data_ptr(), scratch.data_ptr()
    _weight(64 - 32 * single)(given, factor if single else 1.0, threads, scores, kept, bits, *where)
    if not single:
        weight = _scaled(weight.to(dtype), factor)
    return view.narrowed(weight) if view.parent else weight


def accumulate(into: None, grad: Tensor, state: Tensor, view: View, factor: float) -> Tensor | None:
    """The gradient of the scores from that of the scaled weight."""
    given, whole = _given(view.whole.text), view.whole
    if given is None or torch.float64 in (grad.dtype, state.dtype) or grad.shape != view.shape:
        return None
    if state.shape != whole.shape:
        return None
    grad = (view.widened(grad) if view.parent else grad).contiguous()
    scores = state.float().contiguous()
    out = torch.empty(whole.shape, dtype=torch.float32, device=grad.device)
    threads = native.threads(out.numel())
    scratch = _scratch(given, threads, grad.device)
    where = scores.data_ptr(), grad.data_ptr(), out.data_ptr(), scratch.data_ptr()
    _gradient()(given, factor, threads, *where)
    return out


def _scratch(given: _PemnView, threads: int, device: torch.device) -> Tensor:
    """Room for a run of values for each thread, and for the prototype."""
    return torch.empty(threads * given.to.run + given.size, dtype=torch.float64, device=device)


def _scaled(values: Tensor, factor: float) -> Tensor:
    return values.mul_(factor) if values.dtype.itemsize >= 4 else (values.float() * factor).to(values.dtype)


@functools.cache
def _select() -> Any:
    return native.function(
        "pemn_select", (ctypes.POINTER(Layout), ctypes.c_int64, _INT, _POINTER, ctypes.POINTER(_Selection))
    )


@functools.cache
def _weight(bits: int) -> Any:
    kept = ctypes.POINTER(_Selection)
    return native.function(f"pemn_weight_{bits}", (_VIEW, _NUMBER, _INT, _POINTER, kept, _POINTER, _POINTER, _POINTER))


@functools.cache
def _gradient() -> Any:
    return native.function("pemn_gradient", (_VIEW, _NUMBER, _INT, _POINTER, _POINTER, _POINTER, _POINTER))


@functools.lru_cache(maxsize=1 << 14)
def _given(text: str) -> _PemnView | None:
    """What the C code is told of a view; None for what it does not do."""
    view = View.parse(text)
    pemn: Any = view.generator
    to = Layout.of(view)
    if to is None or pemn.permuted or not pemn.local or 4 * max(view.count, view.size) >= 1 << 32:
        return None
    labels = () if pemn.needs_dof else view.shape
    given = _PemnView(to=to, size=view.size if pemn.needs_dof else view.count, normal=pemn.values == "normal")
    given.deviation = NEAR_NORMAL_DEVIATION
    given.key[:] = stream_keys(view.seed, PROTOTYPE, *labels)
    return given
