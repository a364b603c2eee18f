"""The ring's device functions: tiles of generated values, and a tile's gradient added into the ring.

Coordinates go in, not tile numbers: `rows` (of the weight as a matrix, outputs by fan-in, in logical order) and a run of
columns. What comes out is a function of them and the seed alone, whatever the tile.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxrpg.device import kept, settled
from fxrpg.hashing import CELL, SIGN, random_words, stream_keys
from fxrpg.tiles.hashing import bijection_at, numbers_of, permuted, remainder, wide_word_at, word_at
from fxrpg.tiles.ring_gather import gather_of
from fxrpg.tiles.rounding import cast
from fxrpg.view import Form, View

NARROW = 1 << 31
"""Addresses below this are computed in 32 bits."""
WORD = (1 << 32) - 1


class RingSpec(NamedTuple):
    """What kernels specialise on.

    Args:
        layout: "arc", "shuffle", "hash" or "block_diagonal".
        block, permute, reflect: settings of the ring.
        rounds: of the bijection.
        whole: whether the ring's length is a multiple of the block.
        wide: whether addresses need 64 bits.
        aligned: whether every tile begins, and every row of the weight ends, at a whole run of 32 elements (of a block
            where that is 8 or 16): then cells and signs are found once a run.
        table: whether cells and signs of runs are read from a table instead of computed (needs `aligned`).
    """

    layout: str
    block: int
    permute: bool
    reflect: bool
    rounds: int
    whole: bool
    wide: bool
    aligned: bool
    table: bool

    @property
    def flat(self) -> bool:
        """Whether an element's number in the weight says it all, so that the weight can be seen as one row."""
        return self.layout != "block_diagonal"


@triton.jit
def ring_begin(args, SPEC: tl.constexpr):
    """The numbers of the view, read once a program.

    Args:
        args: (ring, int64 numbers as `_numbers` lays them out, and with a table uint32 cells and sign words of runs).
    """
    numbers = args[1]
    if SPEC.wide:
        count, length, first, cells = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    else:
        count, length = tl.load(numbers).to(tl.uint32), tl.load(numbers + 1).to(tl.uint32)
        first, cells = tl.load(numbers + 2).to(tl.uint32), tl.load(numbers + 3).to(tl.uint32)
    rows, rows_reciprocal = tl.load(numbers + 4).to(tl.uint32), tl.load(numbers + 5).to(tl.uint32)
    sign = (tl.load(numbers + 6).to(tl.uint32), tl.load(numbers + 7).to(tl.uint32))
    cell = (tl.load(numbers + 8).to(tl.uint32), tl.load(numbers + 9).to(tl.uint32))
    starts = tl.load(numbers + 10)
    bijection = bijection_at(numbers + 11)
    table = args[2] if SPEC.table else args[1]
    return (args[0], table, count, length, first, cells, rows, rows_reciprocal, bijection, sign, cell, starts)


@triton.jit
def _starts(block, form, SPEC: tl.constexpr):
    """Where blocks of the weight begin in the ring: in blocks if it has a whole number of them, else in cells."""
    first, cells, rows, rows_reciprocal = form[4], form[5], form[6], form[7]
    if SPEC.layout == "hash":
        if SPEC.wide:
            place = tl.umulhi(wide_word_at(block, form[10][0], form[10][1]), rows)
        else:
            place = tl.umulhi(word_at(block, form[10][0], form[10][1]), rows)
    elif not SPEC.permute:
        place = block + first
    elif SPEC.layout == "arc":
        place = permuted(block, form[8], SPEC.rounds, SPEC.wide) + first
    else:
        place = permuted(block + first, form[8], SPEC.rounds, SPEC.wide)
    if not SPEC.whole:
        start = place.to(tl.int64) * SPEC.block % cells.to(tl.int64)
    elif SPEC.wide:
        start = place.to(tl.int64) % (cells // SPEC.block)
    else:
        start = remainder(place, rows, rows_reciprocal)
    return start


@triton.jit
def _cells(element, form, SPEC: tl.constexpr):
    """The ring cell of every element (of any shape)."""
    block = element // SPEC.block
    lane = element - block * SPEC.block
    start = _starts(block, form, SPEC)
    if SPEC.whole:
        cell = start * SPEC.block + lane
    else:
        cell = (start + lane.to(tl.int64)) % form[5].to(tl.int64)
    return cell


@triton.jit
def _diagonal_cells(rows, columns, form, SPEC: tl.constexpr):
    """The cells of the layout "block_diagonal": every filter reads its own stretch in the weight's one order, 2-D."""
    column = columns
    if SPEC.permute:
        column = permuted(columns, form[8], SPEC.rounds, SPEC.wide)
    row, cells = rows.to(tl.int64), form[5].to(tl.int64)
    start = (form[4] + row * form[3] + row // form[11]) % cells
    cell = start[:, None] + (column.to(tl.int64) % cells)[None, :]
    return tl.where(cell >= cells, cell - cells, cell)


@triton.jit
def _addresses(rows, col0, WIDTH: tl.constexpr, form, SPEC: tl.constexpr):
    """(cells, signs) of a tile: the ring cell of each element, and a word with its sign in the lowest bit.

    Of shape [rows, WIDTH], or if aligned [rows, runs, run]; signs are None without reflection.
    """
    ROWS: tl.constexpr = rows.shape[0]
    count, length = form[2], form[3]
    if SPEC.wide:
        row, col0 = rows.to(tl.int64), tl.cast(col0, tl.int64)
    else:
        row, col0 = rows.to(tl.uint32), tl.cast(col0, tl.uint32)
    if SPEC.layout == "block_diagonal":
        columns = tl.minimum((col0 + tl.arange(0, WIDTH)).to(col0.dtype), length - 1)
        cell = _diagonal_cells(row, columns, form, SPEC)
        word = _sign_words(columns >> 5, form, SPEC) >> (columns & 31).to(tl.uint32)
        word = tl.broadcast_to(word[None, :], (ROWS, WIDTH))
    elif SPEC.aligned:
        RUN: tl.constexpr = 32 if SPEC.block == 1 or SPEC.block > 32 else SPEC.block
        run = row[:, None] * length + (col0 + tl.arange(0, WIDTH // RUN) * RUN).to(col0.dtype)[None, :]
        run = tl.minimum(run, (count - 1) // RUN * RUN)
        lane = tl.arange(0, RUN)[None, None, :].to(tl.uint32)
        if SPEC.block == 1:
            cell = _cells(tl.minimum(run[:, :, None] + lane, count - 1), form, SPEC)
        elif SPEC.table:
            start = tl.load(form[1] + (run >> 5)) * 32
            cell = start[:, :, None] + lane
        elif SPEC.whole:
            start = _starts(run // SPEC.block, form, SPEC) * SPEC.block
            if SPEC.block > RUN:
                start += run % SPEC.block // RUN * RUN
            cell = start[:, :, None] + lane
        else:
            cell = _cells(run[:, :, None] + lane, form, SPEC)
        if SPEC.table:
            word = tl.load(form[1] + ((count + 31) >> 5) + (run >> 5))
        else:
            word = _sign_words(run >> 5, form, SPEC)
        if RUN < 32:
            word >>= (run & 31).to(tl.uint32)
        word = word[:, :, None] >> lane
    else:
        element = row[:, None] * length + (col0 + tl.arange(0, WIDTH)).to(col0.dtype)[None, :]
        element = tl.minimum(element, count - 1)
        cell = _cells(element, form, SPEC)
        word = _sign_words(element >> 5, form, SPEC) >> (element & 31).to(tl.uint32)
    return cell, word


@triton.jit
def _sign_words(index, form, SPEC: tl.constexpr):
    """The words that hold the signs of 32 elements each."""
    if SPEC.wide:
        word = wide_word_at(index, form[9][0], form[9][1])
    else:
        word = word_at(index, form[9][0], form[9][1])
    return word


@triton.jit
def flipped(value, word):
    """`value` with its sign bit turned where the lowest bit of `word` (uint32) is set."""
    if value.dtype.primitive_bitwidth == 16:
        bits = value.to(tl.uint16, bitcast=True) ^ (word << 15).to(tl.uint16)
    else:
        bits = value.to(tl.uint32, bitcast=True) ^ (word << 31)
    return bits.to(value.dtype, bitcast=True)


@triton.jit
def ring_tile(rows, col0, WIDTH: tl.constexpr, form, SPEC: tl.constexpr, DTYPE: tl.constexpr):
    """Unscaled values of the rows `rows` [R] and the columns col0 .. col0 + WIDTH - 1, [R, WIDTH] of DTYPE."""
    cell, word = _addresses(rows, col0, WIDTH, form, SPEC)
    value = cast(tl.load(form[0] + cell), DTYPE)
    if SPEC.reflect:
        value = flipped(value, word)
    return tl.reshape(value, (rows.shape[0], WIDTH))


@triton.jit
def ring_accumulate(grad, mask, rows, col0, WIDTH: tl.constexpr, form, SPEC: tl.constexpr):
    """Add the gradient of unscaled values, float32 [R, WIDTH], into the ring's, `form[0]`, where `mask` holds."""
    cell, word = _addresses(rows, col0, WIDTH, form, SPEC)
    grad, mask = tl.reshape(grad, cell.shape), tl.reshape(mask, cell.shape)
    if SPEC.reflect:
        grad = flipped(grad, word)
    tl.atomic_add(form[0] + cell, grad, mask=mask, sem="relaxed")


def ring_form(ring: Any, state: Tensor, view: View, step: int, tables: bool = False) -> Form:
    """The device form of a ring's view; see `Generator.form`."""
    size = len(state)
    bijection = ring.bijection(view)
    wide = max(view.count, size, view.total if ring.layout == "shuffle" else 0) >= NARROW
    spec = RingSpec(
        layout=ring.layout,
        block=ring.block,
        permute=ring.permute,
        reflect=ring.reflect,
        rounds=len(bijection.keys) if bijection else 0,
        whole=size % ring.block == 0,
        wide=wide,
        aligned=ring.aligned(view, step),
        table=tables and not wide and ring.block in (32, 64) and ring.cost(view, step) == "block",
    )
    args: tuple[Tensor, ...] = (state, _numbers(view.text, size, state.device))
    if spec.table:
        args = (*args, _table(view.text, size, state.device))
    return Form(ring_begin, ring_tile, ring_accumulate, args, spec, gather_of(ring, view, size))


@kept(4096)
def _numbers(text: str, size: int, device: torch.device) -> Tensor:
    """What `ring_begin` reads, int64: kept on the device, a few hundred bytes a view, so that a call copies nothing."""
    view = View.parse(text)
    ring: Any = view.generator
    bijection = ring.bijection(view)
    rows = -(-size // ring.block)
    first = view.offset % size if ring.layout == "block_diagonal" else view.offset // ring.block
    if ring.layout == "arc":
        first %= rows if size % ring.block == 0 else size
    sign, cell = (stream_keys(view.seed, purpose, view.tensor) for purpose in (SIGN, CELL))
    starts = size // math.gcd(view.fan_in, size)
    values = [view.count, view.fan_in, first, size, rows, WORD // rows, *sign, *cell, starts, *numbers_of(bijection)]
    values += bijection.inverse_holes if bijection else ()
    return settled(torch.tensor(values, dtype=torch.int64, device="cpu").to(device))


@kept(256)
def _table(text: str, size: int, device: torch.device) -> Tensor:
    """Which 32 cells each run of 32 elements reads, then the word of its signs: uint32 [2 * runs], 2 bits a weight."""
    view = View.parse(text)
    ring: Any = view.generator
    runs = torch.arange(-(-view.count // 32), device=device)
    cells = ring.block_cells(view, size, device)[runs * 32 // ring.block] + runs * 32 % ring.block
    words = random_words(0, len(runs), view.seed, SIGN, view.tensor, device=device)
    return settled(torch.cat([(cells // 32).to(torch.int32), words]).view(torch.uint32))
