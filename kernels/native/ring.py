"""Rings on the CPU: the C code of ring.c, which does in one pass what plain torch does in several, to the same bits."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from fxrpg import addresses, native
from fxrpg.hashing import CELL, SIGN, stream_keys
from fxrpg.kernels.native.layout import Bijection, Layout
from fxrpg.view import View

_NAMES = {2: "16", 4: "32", 8: "64"}


class _RingView(ctypes.Structure):
    _fields_ = [
        ("to", Layout),
        ("pi", Bijection),
        ("first", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("before", ctypes.c_int64),
        ("after", ctypes.c_int64),
        ("hash_rows", ctypes.c_int64),
        ("arc", ctypes.c_int64),
        ("once", ctypes.c_int64),
        ("cell", ctypes.c_uint32 * 2),
        ("sign", ctypes.c_uint32 * 2),
        ("reflect", ctypes.c_int64),
    ]


def generate(view: View, state: Tensor, factor: float, dtype: torch.dtype) -> Tensor | None:
    """The scaled weight of `view`, in `dtype`; None where no C code covers it."""
    given = _given(view.text)
    if given is None or not state.is_floating_point() or state.shape != (view.size,):
        return None
    ring: Any = view.generator
    values = ring._rounded(state).to(dtype).contiguous()
    weight = torch.empty(view.shape, dtype=dtype, device=state.device)
    _call("ring_weight", view, given, factor, values, weight)
    return weight if dtype.itemsize > 2 else (weight.float() * factor).to(dtype)


def accumulate(into: Tensor | None, grad: Tensor, state: Tensor, view: View, factor: float) -> Tensor | None:
    """The gradient of the ring, of the type of `grad` (float32 or float64), from that of the scaled weight.

    Added to `into`, where that is given: in place, and only where the weight reads the ring.
    """
    given = _given(view.text)
    if given is None or grad.shape != view.shape or state.shape != (view.size,):
        return None
    sparse = view.generator.sparse
    if into is not None and given.once and not sparse:
        _call("ring_gradient", view, given, factor, grad.contiguous(), into, add=True)
        return into
    out = torch.empty(view.size, dtype=grad.dtype, device=grad.device)
    _call("ring_gradient", view, given, factor, grad.contiguous(), out)
    out = out.mul_(state != 0) if sparse else out
    return out if into is None else into.add_(out)


def _reads_once(view: View) -> bool:
    """Whether no two elements of the weight read the same cell."""
    ring: Any = view.generator
    padded = -(-view.count // ring.block) * ring.block
    return ring.layout == "arc" and view.first == 0 and padded <= view.size


def _call(
    name: str, view: View, given: _RingView, factor: float, source: Tensor, to: Tensor, add: bool = False
) -> None:
    threads = native.threads(view.count)
    rows = 0 if name == "ring_weight" and given.to.flat else threads * given.to.run
    scratch = source.new_empty(view.count if name == "ring_gradient" and not given.once else rows)
    call = _function(f"{name}_{_NAMES[source.dtype.itemsize]}")
    call(given, factor, threads, add, source.data_ptr(), to.data_ptr(), scratch.data_ptr())


@functools.cache
def _function(name: str) -> Any:
    pointer = ctypes.c_void_p
    return native.function(
        name, (ctypes.POINTER(_RingView), ctypes.c_double, ctypes.c_int, ctypes.c_int, pointer, pointer, pointer)
    )


@functools.lru_cache(maxsize=1 << 14)
def _given(text: str) -> _RingView | None:
    """What the C code is told of a view; None for what it does not do."""
    view = View.parse(text)
    ring: Any = view.generator
    to = Layout.of(view)
    alone = view.parent is None or ring._addressed_alone(view)
    if to is None or ring.layout == "block_diagonal" or not alone or max(view.total, view.size) >= 1 << 31:
        return None
    place, arc = view.offset // ring.block, ring.layout == "arc"
    given = _RingView(to=to, first=view.first, block=ring.block, size=view.size)
    given.arc, given.reflect, given.once = arc, ring.reflect, _reads_once(view)
    given.before, given.after = (0, place) if arc else (place, 0)
    given.sign[:] = stream_keys(view.seed, SIGN, view.tensor)
    if ring.layout == "hash":
        given.before = given.after = 0
        given.hash_rows = -(-view.size // ring.block)
        given.cell[:] = stream_keys(view.seed, CELL, view.tensor)
    if permutation := addresses.bijection(ring, view):
        given.pi = Bijection.of(permutation)
    return given
