"""Which part of a weight an alias of it shows: what slices, transposes and reshapes leave of it, as a view of its own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from fxrpg.view import View


class _Run(NamedTuple):
    """Axes that run on in one another in memory and in logical order alike: elements one step apart in both."""

    size: int
    memory: int
    logical: int


@functools.lru_cache(maxsize=4096)
def part_of(view: View, size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> View | None:
    """The view of the elements that a strided alias of the weight shows; None unless they are one run in logical order.

    Args:
        view: the weight; its memory is that of a contiguous tensor.
        size, stride, offset: of the alias, as torch counts them.
    """
    if not prod(size):
        return None
    runs = _runs(view)
    starts = [offset // run.memory % run.size for run in runs]
    ends, logical = list(starts), []
    for n, step in zip(size, stride, strict=True):
        place = next((i for i, run in enumerate(runs) if run.memory <= step < run.memory * run.size), None)
        if n == 1:
            logical.append(0)
            continue
        if place is None or step % runs[place].memory:
            return None
        steps = step // runs[place].memory
        ends[place] += (n - 1) * steps
        logical.append(steps * runs[place].logical)
    if any(end >= run.size for end, run in zip(ends, runs, strict=True)):
        return None  # it goes over into the next axis, or out of the weight
    order = sorted(range(len(size)), key=lambda axis: (-logical[axis] if size[axis] > 1 else -prod(size), axis))
    if not _dense(size, logical, order):
        return None
    first = sum(start * run.logical for start, run in zip(starts, runs, strict=True))
    return view.part(first, size, tuple(order))


def _runs(view: View) -> list[_Run]:
    """The weight's axes, outermost first, joined where they run on in logical order as they do in memory."""
    strides = _strides(view.shape, range(len(view.shape)))
    logical = _strides(view.shape, view.order)
    runs: list[_Run] = []
    for n, memory, step in zip(view.shape, strides, logical, strict=True):
        if n == 1:
            continue
        if runs and runs[-1].logical == step * n and runs[-1].memory == memory * n:
            runs[-1] = _Run(runs[-1].size * n, memory, step)
        else:
            runs.append(_Run(n, memory, step))
    return runs or [_Run(1, 1, 1)]


def _strides(shape: Sequence[int], order: Sequence[int]) -> list[int]:
    """Each axis's distance between neighbours where the axes lie in `order`, the last one fastest."""
    found, step = [0] * len(shape), 1
    for axis in reversed(order):
        found[axis], step = step, step * shape[axis]
    return found


def _dense(size: Sequence[int], stride: Sequence[int], order: Sequence[int]) -> bool:
    """Whether the axes, in this order, fill a run without gaps."""
    expected = _strides(size, order)
    return all(n == 1 or step == wanted for n, step, wanted in zip(size, stride, expected, strict=True))
