"""Which cells of a ring a weight reads, and with which signs: what depends on the settings, the seed and the view alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxrpg.device import kept, settled
from fxrpg.hashing import CELL, PERMUTE, SIGN, Bijection, random_words, words_at
from fxrpg.view import View

_ALL_TENSORS = 0xFFFFFFFF  # the "tensor id" of the one permutation that `shuffle` shares between weights

_SMALL = 1 << 16
"""Weights of which the addresses are kept, 3 bits an element in blocks of 32: there, arithmetic on a few numbers at a time
costs many times what it computes."""


def block_cells(ring: Any, view: View, size: int, device: torch.device) -> Tensor:
    """The ring cell in which each block of a weight (or a part of one) starts, int64 [blocks]. `ring`: the settings."""
    if view.count <= _SMALL and ring.block >= 32:
        return _kept_cells(view.text, size, device)
    return _cells(ring, view, size, device)


def block_rows(ring: Any, view: View, size: int, device: torch.device) -> Tensor:
    """The same counted in blocks, where the ring consists of whole ones."""
    if view.count <= _SMALL and ring.block >= 32:
        return _kept_rows(view.text, size, device)
    return _cells(ring, view, size, device) // ring.block


def sign_words(view: View, count: int, device: torch.device) -> Tensor:
    """The words whose bits are the signs of the first `count` elements, 32 in each: int32."""
    return (_kept_words if count <= _SMALL else _words)(view.seed, view.tensor, view.first, count, device)


@kept(64)
def lanes(device: torch.device) -> Tensor:
    """How far left each of a word's bits, the lowest first, is from the highest: int32 [32]."""
    return settled(torch.arange(31, -1, -1, dtype=torch.int32, device=device))


def bijection(ring: Any, view: View) -> Bijection | None:
    """The permutation that the layout and the settings make of blocks, or of the columns of every filter."""
    if not ring.permute or ring.layout == "hash":
        return None
    if ring.layout == "block_diagonal":
        return Bijection.keyed(view.fan_in, view.seed, PERMUTE, view.tensor)
    if ring.layout == "arc":
        return Bijection.keyed(-(-view.whole.count // ring.block), view.seed, PERMUTE, view.tensor)
    return Bijection.keyed(view.total // ring.block, view.seed, PERMUTE, _ALL_TENSORS)


@kept(4096)
def _kept_cells(text: str, size: int, device: torch.device) -> Tensor:
    view = View.parse(text)
    return settled(_cells(view.generator, view, size, device))


@kept(4096)
def _kept_rows(text: str, size: int, device: torch.device) -> Tensor:
    view = View.parse(text)
    ring: Any = view.generator
    return settled(_cells(ring, view, size, device) // ring.block)


def _cells(ring: Any, view: View, size: int, device: torch.device) -> Tensor:
    start = view.first // ring.block
    blocks = torch.arange(start, start - (-view.count // ring.block), dtype=torch.int64, device=device)
    first = view.offset // ring.block
    if ring.layout == "hash":
        words = words_at(blocks, view.seed, CELL, view.tensor).to(torch.int64) & 0xFFFFFFFF
        return (words * -(-size // ring.block) >> 32) * ring.block % size
    if ring.layout == "block_diagonal":
        return filter_cells(ring, view, size, blocks)
    permute = bijection(ring, view) or (lambda place: place)
    place = permute(blocks) + first if ring.layout == "arc" else permute(blocks + first)
    return place * ring.block % size


def filter_cells(ring: Any, view: View, size: int, elements: Tensor) -> Tensor:
    """The cell of every element where each filter reads its own stretch of the ring in the weight's one order.

    Filters that would start in the same cell, because the ring has come round, start one cell later: no two of the first
    `size` filters of a weight read the same cells in the same order, however small the ring. Of one weight every cell is
    used floor or ceil of its share of times; the cells skipped let sums over several weights differ by more.
    """
    length = view.fan_in
    row, column = torch.div(elements, length, rounding_mode="floor"), elements % length
    if permute := bijection(ring, view):
        column = permute(column)
    starts = size // math.gcd(length, size)  # filters until one starts where the first did
    return (view.offset + row * length + torch.div(row, starts, rounding_mode="floor") + column) % size


def _words(seed: int, tensor: int, first: int, count: int, device: torch.device) -> Tensor:
    return random_words(first // 32, -(-count // 32), seed, SIGN, tensor, device=device)


@kept(4096)
def _kept_words(seed: int, tensor: int, first: int, count: int, device: torch.device) -> Tensor:
    return settled(_words(seed, tensor, first, count, device))
