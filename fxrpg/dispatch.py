"""How an op on a generated weight runs, and in tiles of what size: one plain function, fed by the shipped table of a card.

Nothing is tuned when a program runs: `kernels/configs/<card>.json` says what is known of a card, a rule of thumb the rest.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).parent / "kernels" / "configs"
DIRECTIONS = ("forward", "input_grad", "state_grad")
NARROW = 1 << 31
"""Kernels count positions, and places within one image, in 32 bits: of fewer than this."""
GRID = 65535
"""Programs along the axes of a CUDA grid but the first."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """The part of an op's output that one program makes.

    Args:
        n: of the weight's outputs (rows of the weight, or its columns in the input's gradient).
        m: positions (of a batch, or of images); for a state's gradient, how many are summed at a time.
        k: terms summed at a time; for a state's gradient, columns of the weight.
        warps: warps of 32 threads a program.
        stages: depth of the software pipeline.
        splits: parts into which sums are cut, for different programs.
    """

    n: int
    m: int
    k: int
    warps: int = 4
    stages: int = 3
    splits: int = 1


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One op in one direction, as a matrix product with the weight on the left.

    Args:
        op: "linear", "conv", "depthwise" or "embedding".
        direction: one of DIRECTIONS.
        outputs, positions, terms: sides of the product outputs x terms by terms x positions; for a state's gradient,
            rows and columns of the weight and what is summed over: outputs x positions by positions x terms.
        taps: positions of the kernel; every one has `terms`.
        weights: elements of the weight.
        step: a number of which every column at which a tile can begin is a multiple.
        dtype: of the inputs.
    """

    op: str
    direction: str
    outputs: int
    positions: int
    terms: int
    taps: int = 1
    weights: int
    step: int
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known of a kind of GPU.

    Args:
        name: of its file in `kernels/configs`.
        matches: parts of the names that devices of the kind give themselves.
        target: what kernels are compiled for: "sm_90", "gfx942".
        processors: how many programs run at once, at least.
        shared: bytes of shared memory that a program may use.
        block, table, element: how often a layer's values may be made again for other positions, as a number of weights,
            before it pays to write the weight out once: where a value costs a share of a block's address, a look into a
            table of addresses, an address of its own.
        tiles: rows {op, direction, bits, positions, outputs, tile}: the first whose op, direction and bits are those of a
            problem that has at least so many positions and outputs gives the tile.
    """

    name: str
    matches: tuple[str, ...] = ()
    target: str = ""
    processors: int = 64
    shared: int = 101376
    block: float = 8e6
    table: float = 27e6
    element: float = 0.5e6
    tiles: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How an op runs: "fused", "staged" or "materialized"; in what tiles, from a table of addresses or not; and why."""

    path: str
    reason: str = ""
    tile: Tile = field(default_factory=lambda: Tile(n=32, m=32, k=32))
    tables: bool = False


def choose(problem: Problem | str, cost: str, card: Card, mode: str = "auto", deterministic: bool = False) -> Choice:
    """How to run one op.

    Args:
        problem: the op, or why no kernel covers it.
        cost: what a value costs the generator in a kernel (`Generator.cost`): "block", "table", "element" or "own".
        card: of the device.
        mode: of `lowering_mode`.
        deterministic: whether a state's gradient must be summed in one order.
    """
    if mode in ("staged", "materialized"):
        return Choice(path=mode, reason=f"lowering_mode({mode!r})")
    if isinstance(problem, str):
        return Choice(path="staged", reason=problem)
    if cost == "own":
        return Choice(path="staged", reason="the method has no device functions for tiles of a weight")
    if problem.dtype == torch.float64:
        return Choice(path="staged", reason="float64 has no fused kernels")
    if deterministic and problem.direction == "state_grad":
        return Choice(path="staged", reason="deterministic algorithms gather a layer's gradient")
    tile = tile_of(problem, card)
    tiles = problem.taps * -(-problem.terms // tile.k)
    if problem.positions >= NARROW // 2 or (problem.direction == "state_grad" and tiles > GRID):
        return Choice(path="staged", reason="it is larger than a kernel counts")
    again = _repeats(problem, tile)
    work = again * problem.weights
    if mode == "fused" or again <= 1 or work < {"element": card.element, "block": card.block}.get(cost, card.table):
        return Choice(path="fused", reason=_why(again, mode), tile=tile)
    if cost == "block" and problem.direction != "state_grad" and work < card.table:
        return Choice(path="fused", reason=f"{_why(again, mode)}, from a table of addresses", tile=tile, tables=True)
    return Choice(path="staged", reason=f"its {problem.weights:,} weights would be made {again} times")


def _why(again: int, mode: str) -> str:
    return "lowering_mode('fused')" if mode == "fused" else f"each weight is made {again} time{'s' * (again > 1)}"


def _repeats(problem: Problem, tile: Tile) -> int:
    """How often a fused kernel makes (or, of a gradient, adds) each value: once for every tile of positions."""
    if problem.op == "embedding":  # only rows that are asked for
        return -(-problem.positions * problem.outputs // problem.weights)
    if problem.direction == "state_grad":
        return tile.splits
    return -(-problem.positions // tile.m)


def tile_of(problem: Problem, card: Card) -> Tile:
    """The tile for a problem: the card's table, else by size; and into how many parts to cut its sums."""
    bits = 8 * problem.dtype.itemsize
    for row in card.tiles:
        fits = problem.positions >= row["positions"] and problem.outputs >= row["outputs"]
        if (row["op"], row["direction"], row["bits"]) == (problem.op, problem.direction, bits) and fits:
            return _split(problem, Tile(**row["tile"]), card)
    tile = _tile_by_size(problem, bits)
    stage = (tile.n + tile.m) * tile.k * problem.dtype.itemsize  # both operands wait in shared memory
    stages = max(1, min(tile.stages, card.shared // stage))
    return _split(problem, dataclasses.replace(tile, stages=stages), card)


def _tile_by_size(problem: Problem, bits: int) -> Tile:
    """Tiles of 64, or less where the problem is smaller; of few terms where they are wide."""
    if problem.op == "depthwise":  # a state's gradient keeps n x m x k sums
        return Tile(n=32, m=16 if problem.direction == "state_grad" else 32, k=16)
    most_terms = 64 if bits == 16 else 16 if problem.direction == "input_grad" else 32
    n, m, k = _side(problem.outputs, 64), _side(problem.positions, 64), _side(problem.terms, most_terms)
    if problem.direction == "state_grad":
        return Tile(n=n, m=min(m, most_terms), k=_side(problem.terms, 64))
    if problem.op == "linear" and problem.positions < 4:
        # where the weight's columns are outputs, a run of 32 shares one address
        return Tile(
            n=32 if problem.direction == "input_grad" else 16, m=1 << (problem.positions - 1).bit_length(), k=64
        )
    return Tile(n=n, m=m, k=k)


def _side(length: int, most: int) -> int:
    """The least power of two that covers `length`, between 16 and `most`."""
    return min(max(16, 1 << max(0, length - 1).bit_length()), most)


def _split(problem: Problem, tile: Tile, card: Card) -> Tile:
    """The tile with sums cut into parts until every processor has one, while each part keeps four steps."""
    summed = problem.positions if problem.direction == "state_grad" else problem.terms
    steps = -(-summed // (tile.m if problem.direction == "state_grad" else tile.k))
    across = problem.terms if problem.direction == "state_grad" else problem.positions
    side = tile.k if problem.direction == "state_grad" else tile.m
    programs = -(-problem.outputs // tile.n) * -(-across // side)
    if problem.direction == "state_grad":
        programs *= problem.taps
    else:
        steps *= problem.taps
    splits = 1
    while programs * splits < card.processors and steps >= 8 * splits:
        splits *= 2
    return dataclasses.replace(tile, splits=splits)


@functools.cache
def cards() -> tuple[Card, ...]:
    """The cards that have a file in `kernels/configs`."""
    found = []
    for path in sorted(CONFIGS.glob("*.json")):
        data = json.loads(path.read_text())
        found.append(Card(name=path.stem, **data | {"matches": tuple(data["matches"]), "tiles": tuple(data["tiles"])}))
    return tuple(found)


@functools.cache
def card_of(device: torch.device) -> Card:
    """The card that `device` is, by the name that it gives itself; an unknown one is described by what it says of itself."""
    if device.type != "cuda":
        return Card(name=device.type, processors=1)
    name, numbers = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device)
    for card in cards():
        if any(part in name for part in card.matches):
            return card
    shared = getattr(numbers, "shared_memory_per_block_optin", Card.shared)
    return Card(name=name, processors=numbers.multi_processor_count, shared=shared)


_watched: contextvars.ContextVar[tuple[list[Choice], ...]] = contextvars.ContextVar("fxrpg_choices", default=())


@contextlib.contextmanager
def choices() -> Iterator[list[Choice]]:
    """Collect the choices made for the ops that run inside the block, in order."""
    seen: list[Choice] = []
    token = _watched.set((*_watched.get(), seen))
    try:
        yield seen
    finally:
        _watched.reset(token)


def note(choice: Choice) -> Choice:
    """Tell all `choices` around of one."""
    for seen in _watched.get():
        seen.append(choice)
    return choice
