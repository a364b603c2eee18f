"""PEMN's device functions: a table of fixed values and a mask, from packed bits or from scores, met in registers.

Coordinates go in, not tile numbers; what comes out is a function of them, the seed and the state, whatever the tile.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxrpg.device import kept, settled
from fxrpg.hashing import PERMUTE, Bijection
from fxrpg.tiles.hashing import bijection_at, divided, numbers_of, permuted, remainder
from fxrpg.tiles.rounding import cast
from fxrpg.view import Form, View

NARROW = 1 << 31
"""Addresses below this are computed in 32 bits."""
WORD = (1 << 32) - 1
VECTOR = 8
"""Values of 16 bits that one load can read."""
REPEATED = 1 << 21
"""A table is repeated until its length is a multiple of VECTOR, unless it has more values then."""


class PemnSpec(NamedTuple):
    """What kernels specialise on.

    Args:
        packed: whether the mask is read from bits; else it is found from scores.
        permuted, rounds: whether elements are permuted, and the rounds of that.
        wraps: whether the weight is longer than the table of values.
        whole: whether the table's length is a multiple of VECTOR, so that aligned runs are read by wide loads.
        wide: whether addresses need 64 bits.
        aligned: whether tiles begin, and rows of the weight end, at whole runs of 32 elements: places are found once a run.
        even: whether the weight's first bit or score lies at a multiple of 32, so that a run's bits are one aligned word.
        logical: whether scores lie in memory in logical order.
        inside: whether a run's scores lie at one position of the kernel, at equal distances.
        flat: whether an element's number in the weight says it all, so that the weight can be seen as one row.
    """

    packed: bool
    permuted: bool
    rounds: int
    wraps: bool
    whole: bool
    wide: bool
    aligned: bool
    even: bool
    logical: bool
    inside: bool
    flat: bool = True


@triton.jit
def pemn_begin(args, SPEC: tl.constexpr):
    """The numbers of the view, read once a program.

    Args:
        args: (state or its gradient, scores or bits, values, float32 values, int64 numbers, float64 bounds), the latter two
            as `_prepared` and `Pemn.bounds` lay them out.
    """
    numbers, bounds = args[4], args[5]
    sizes, strides = _four(numbers, SPEC), _four(numbers + 4, SPEC)
    table, fan_in, inner = tl.load(numbers + 8), tl.load(numbers + 9), tl.load(numbers + 10)
    reciprocals = table.to(tl.uint32), fan_in.to(tl.uint32), inner.to(tl.uint32)
    limits = () if SPEC.packed else (tl.load(bounds), tl.load(bounds + 1).to(tl.int64), tl.load(bounds + 2))
    return (args[0], args[1], args[2], args[3], sizes, strides, reciprocals, limits, bijection_at(numbers + 11))


@triton.jit
def _four(numbers, SPEC: tl.constexpr):
    a, b, c, d = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    if not SPEC.wide:
        a, b, c, d = a.to(tl.uint32), b.to(tl.uint32), c.to(tl.uint32), d.to(tl.uint32)
    return a, b, c, d


@triton.jit
def _elements(rows, col0, WIDTH: tl.constexpr, form, SPEC: tl.constexpr):
    """Numbers in the weight of a tile's elements, [rows, WIDTH], or if aligned of its runs, [rows, runs]."""
    count, length = form[4][0], form[4][1]
    if SPEC.wide:
        row, col0 = rows.to(tl.int64), tl.cast(col0, tl.int64)
    else:
        row, col0 = rows.to(tl.uint32), tl.cast(col0, tl.uint32)
    if SPEC.aligned:
        element = row[:, None] * (length >> 5) + (col0 >> 5) + tl.arange(0, WIDTH // 32)[None, :].to(row.dtype)
        element = tl.minimum(element, (count >> 5) - 1)
    else:
        element = row[:, None] * length + col0 + tl.arange(0, WIDTH)[None, :].to(row.dtype)
        element = tl.minimum(element, count - 1)
    return element


@triton.jit
def _spread(first):
    """Each of the runs' first numbers [rows, runs] with the 31 that follow, [rows, runs, 32]."""
    return first[:, :, None] + tl.arange(0, 32)[None, None, :].to(first.dtype)


@triton.jit
def _singly(element, SPEC: tl.constexpr):
    """Numbers in the weight of all elements, [rows, WIDTH] or [rows, runs, 32]."""
    return _spread(element * 32) if SPEC.aligned else element


@triton.jit
def _stored(element, form, SPEC: tl.constexpr):
    """Numbers of all elements in a state that lies in logical order."""
    first = form[4][2]  # as a multiple of 32 where it is one: the compiler sees where wide loads may begin
    return _spread((element + (first >> 5)) * 32) if SPEC.even else _singly(element, SPEC) + first


@triton.jit
def _fixed(element, table, form, SPEC: tl.constexpr):
    """The values that stand in the table for these elements, of the table's type."""
    length, reciprocal = form[4][3], form[6][0]
    if SPEC.permuted:
        place = permuted(_singly(element, SPEC), form[8], SPEC.rounds, SPEC.wide)
        place = _modulo(place, length, reciprocal, SPEC)
    elif not SPEC.wraps:
        place = _singly(element, SPEC)
    elif not SPEC.aligned:
        place = _modulo(element, length, reciprocal, SPEC)
    elif SPEC.whole:  # counted in eighths, so that the compiler sees that a load of 8 may begin there
        place = _spread(_modulo(element * 4, length, reciprocal, SPEC) * 8)
    else:
        place = _spread(_modulo(element * 32, length, reciprocal, SPEC))
    return tl.load(table + place)


@triton.jit
def _modulo(x, n, reciprocal, SPEC: tl.constexpr):
    return x % n if SPEC.wide else remainder(x, n, reciprocal)


@triton.jit
def _bits(element, form, SPEC: tl.constexpr):
    """The packed mask of these elements, in the lowest bit of each word."""
    if SPEC.even:
        word = tl.load(form[1].to(tl.pointer_type(tl.uint32), bitcast=True) + element + (form[4][2] >> 5))
        word = word[:, :, None] >> tl.arange(0, 32)[None, None, :].to(tl.uint32)
    else:
        bit = _stored(element, form, SPEC)
        word = tl.load(form[1] + (bit >> 3)).to(tl.uint32) >> (bit & 7).to(tl.uint32)
    return word


@triton.jit
def _places(element, form, SPEC: tl.constexpr):
    """Where these elements' scores lie in memory."""
    row_stride, kernel_stride, inner_stride, inner = form[5]
    if SPEC.logical:
        place = _stored(element, form, SPEC)
    else:
        element = element * 32 if SPEC.inside else _singly(element, SPEC)
        row, rest = _split(element, form[4][1], form[6][1], SPEC)
        kernel, rest = _split(rest, inner, form[6][2], SPEC)
        place = row * row_stride + kernel * kernel_stride + rest * inner_stride
        if SPEC.inside:
            place = place[:, :, None] + tl.arange(0, 32)[None, None, :].to(place.dtype) * inner_stride
    return place


@triton.jit
def _split(x, n, reciprocal, SPEC: tl.constexpr):
    return (x // n, x % n) if SPEC.wide else divided(x, n, reciprocal)


@triton.jit
def _size(score):
    """The magnitude of scores as integers of the same order, NaN like infinity."""
    if score.dtype == tl.float64:
        size = tl.minimum(score.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000)
    else:
        size = tl.minimum(score.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800000)
    return size


@triton.jit
def _up_to(last, element, form, SPEC: tl.constexpr):
    """Whether these elements are the one numbered `last` in the state, or come before it."""
    INT: tl.constexpr = tl.int64 if SPEC.wide else tl.int32
    last = (last - form[4][2]).to(INT)
    if SPEC.aligned:
        before = tl.arange(0, 32)[None, None, :] <= (last - (element * 32).to(INT))[:, :, None]
    else:
        before = element.to(INT) <= last
    return before


@triton.jit
def _kept(element, form, SPEC: tl.constexpr):
    """Which of these elements the mask keeps: those above the least size that is kept, and the first ones of that size."""
    if SPEC.packed:
        kept = (_bits(element, form, SPEC) & 1) != 0
    else:
        least, last = form[7][0], form[7][1]
        size = _size(tl.load(form[1] + _places(element, form, SPEC)))
        least = _size(least if size.dtype == tl.int64 else least.to(tl.float32))
        kept = size >= tl.where(_up_to(last, element, form, SPEC), least, least + 1)
    return kept


@triton.jit
def pemn_tile(rows, col0, WIDTH: tl.constexpr, form, SPEC: tl.constexpr, DTYPE: tl.constexpr):
    """Unscaled values of the rows `rows` [R] and the columns col0 .. col0 + WIDTH - 1, [R, WIDTH] of DTYPE."""
    element = _elements(rows, col0, WIDTH, form, SPEC)
    value = cast(_fixed(element, form[2], form, SPEC), DTYPE)
    rest = tl.full((), 0, DTYPE) if SPEC.packed else form[7][2].to(DTYPE)
    value = tl.where(_kept(element, form, SPEC), value, rest)
    return tl.reshape(value, (rows.shape[0], WIDTH))


@triton.jit
def pemn_accumulate(grad, mask, rows, col0, WIDTH: tl.constexpr, form, SPEC: tl.constexpr):
    """Add the gradient of unscaled values, float32 [R, WIDTH], into the scores', `form[0]`, where `mask` holds."""
    element = _elements(rows, col0, WIDTH, form, SPEC)
    value, place = _fixed(element, form[3], form, SPEC), _places(element, form, SPEC)
    score = tl.load(form[1] + place)
    if score.dtype != tl.float64:
        score = score.to(tl.float32)
    sign = (score > 0).to(tl.float32) - (score < 0).to(tl.float32)
    grad, mask = tl.reshape(grad, value.shape), tl.reshape(mask, value.shape)
    tl.atomic_add(form[0] + place, grad * value * sign, mask=mask, sem="relaxed")


def pemn_form(state: Tensor, view: View, step: int, dtype: torch.dtype | None) -> Form:
    """The device form of a PEMN view; see `Generator.form`."""
    pemn: Any = view.generator
    packed = state.dtype == torch.uint8
    spec, numbers, drawing = _prepared(view.text, packed, step % 32 == 0, state.device)
    main, draw = dtype or torch.float32, _drawn if pemn.prototype == "one_layer" else _table
    values, bounds = draw(drawing, main), numbers if packed else pemn.bounds(state, view)
    exact = values if packed or main == torch.float32 else draw(drawing, torch.float32)
    return Form(pemn_begin, pemn_tile, pemn_accumulate, (state, state, values, exact, numbers, bounds), spec)


@kept(4096)
def _prepared(
    text: str, packed: bool, whole_steps: bool, device: torch.device
) -> tuple[PemnSpec, Tensor, tuple[Any, ...]]:
    """What kernels specialise on; the int64 numbers that `pemn_begin` reads, on the device; arguments of `_drawn`."""
    view = View.parse(text)
    pemn: Any = view.generator
    own, first = pemn.prototype == "one_layer", 0 if pemn.local else view.offset
    size = view.count if own else view.size
    length = math.lcm(size, VECTOR)
    if own or length > REPEATED:
        length = size
    aligned = whole_steps and view.fan_in % 32 == 0
    bijection = Bijection.keyed(view.total, view.seed, PERMUTE) if pemn.permuted and not own else None
    strides, inner = _strides(view), view.shape[view.order[-1]]
    spec = PemnSpec(
        packed=packed,
        permuted=bijection is not None,
        rounds=len(bijection.keys) if bijection else 0,
        wraps=view.count > length,
        whole=length % VECTOR == 0,
        wide=max(first + view.count, view.total if bijection or not pemn.local else 0, length) >= NARROW,
        aligned=aligned,
        even=aligned and first % 32 == 0,
        logical=packed or not pemn.local or strides == (view.fan_in, inner, 1),
        inside=aligned and inner % 32 == 0,
    )
    modulus = length // VECTOR if spec.whole and aligned and not bijection else length
    sizes = (view.count, view.fan_in, first, modulus, *strides, inner)
    reciprocals = (WORD // modulus, WORD // view.fan_in, WORD // inner)
    numbers = torch.tensor([*sizes, *reciprocals, *numbers_of(bijection)], dtype=torch.int64, device="cpu")
    return spec, settled(numbers.to(device)), (pemn, view.seed, view.shape if own else (), size, length, device)


def _strides(view: View) -> tuple[int, int, int]:
    """Of contiguous scores: the strides of a row, of a position of the kernel, and of an inner element."""
    first, last, inner = view.order[0], view.order[-1], view.shape[view.order[-1]]
    strides = torch.empty(view.shape, device="meta").stride()
    kernel = strides[view.order[-2]] if view.fan_in > inner else inner  # as in logical order where there is only one
    return strides[first], kernel, strides[last] if inner > 1 else 1


def _drawn(drawing: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """The prototype over and over: `length` of its `size` values, and a run more, so that a run never wraps round."""
    pemn, seed, labels, size, length, device = drawing
    values = pemn.drawn(size, seed, *labels, device=device).to(dtype)
    return values[torch.arange(length + 32, device=device) % size]


@kept(4)
def _table(drawing: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """`_drawn`, kept: all weights of a model read the one table."""
    return settled(_drawn(drawing, dtype))
