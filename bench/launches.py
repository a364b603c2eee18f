"""The launches whose machine code is watched: shipped tiles of every card, and the methods side by side at one tile.

Tensors are allocated on the CPU and the ordinary host functions are called, but nothing runs: `launch.recorded`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxrpg.dispatch import DIRECTIONS, Card, Tile, cards
from fxrpg.generator import Generator
from fxrpg.generators.pemn import Pemn
from fxrpg.generators.pranc import Pranc
from fxrpg.generators.ring import Ring
from fxrpg.kernels.fused import conv, depthwise, embedding, generate, linear, pranc
from fxrpg.kernels.fused.epilogue import Epilogue
from fxrpg.kernels.fused.launch import Launch, recorded
from fxrpg.kernels.fused.weight import Weight
from fxrpg.tiles.dense import dense_form
from fxrpg.view import View
from fxrpg.weights import encode_scales

REFERENCE = Tile(n=128, m=128, k=64, warps=8)
BY_SIZE = ((64, 64, 64), (64, 16, 64), (16, 1, 64))
"""Tiles (n, m, k) of layers that the tables do not mention, of middle size, of few positions and of one."""
DTYPES = {16: torch.bfloat16, 32: torch.float32}
KINDS = {16: "bf16", 32: "fp32"}
MATRIX = (1024, 1024)
"""Shape of a linear layer's weight."""
METHODS: dict[str, Generator] = {"ring": Ring(), "table": Ring(), "dense": Ring(), "pemn": Pemn()}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel on one card.

    Args:
        card: of `kernels/configs`.
        target: what it is compiled for.
        op, direction: as in `dispatch.Problem`.
        bits: 16 for bfloat16 or 32 for float32 inputs; those are multiplied as TF32 unless `ieee`.
        method: "ring" with addresses computed, "table" with addresses read, "pemn" with a packed mask, or "dense": the
            same kernel on a stored weight; of PRANC, the law.
        tile: of the launch; None where it has its own.
        finish: with a bias, a factor and a shift a channel, and SiLU.
        ieee: float32 products without tensor cores.
    """

    card: str
    target: str
    op: str
    direction: str = "forward"
    bits: int = 16
    method: str = "ring"
    tile: Tile | None = REFERENCE
    finish: bool = False
    ieee: bool = False

    @property
    def name(self) -> str:
        """What the case is called in tables, the same for the same case."""
        sides = f"{self.tile.n}x{self.tile.m}x{self.tile.k}/{self.tile.warps}" if self.tile else ""
        words = (
            self.op,
            self.direction,
            KINDS[self.bits],
            self.method,
            sides,
            "silu" * self.finish,
            "ieee" * self.ieee,
        )
        return " ".join(filter(None, words))


def cases() -> list[Case]:
    """All cases: the tables' tiles on their cards, then what is compared on Hopper."""
    found = [case_of(card, row) for card in cards() for row in card.tiles]
    hopper = next(card for card in cards() if card.target == "sm_90")
    finished = (case for case in found if (case.card, case.direction, case.bits) == (hopper.name, "forward", 16))
    found += [dataclasses.replace(case, finish=True) for case in finished]
    found += _compared(hopper.name)
    return list(dict.fromkeys(found))


def case_of(card: Card, row: Mapping[str, Any]) -> Case:
    """A row of a card's table; float32 products are made as torch makes them unless it is told otherwise."""
    where = {name: row[name] for name in ("op", "direction", "bits")}
    ieee = row["bits"] == 32 and row["op"] == "linear"
    return Case(card=card.name, target=card.target, tile=Tile(**row["tile"]), ieee=ieee, **where)


def _compared(card: str) -> Iterator[Case]:
    where = {"card": card, "target": "sm_90"}
    for op in ("linear", "conv"):
        yield from (Case(**where, op=op, method=method) for method in METHODS)
        yield Case(**where, op=op, bits=32, tile=Tile(n=64, m=64, k=32), ieee=op == "conv")
    yield from (Case(**where, op="linear", tile=Tile(n=n, m=m, k=k)) for n, m, k in BY_SIZE)
    small = Tile(n=32, m=32, k=16)  # what dispatch takes by itself
    yield from (Case(**where, op="depthwise", direction=way, tile=small) for way in DIRECTIONS[:2])
    yield from (
        Case(**where, op=op, method=method, tile=None)
        for op in ("generate", "embedding")
        for method in ("ring", "pemn")
    )
    for law in ("rademacher", "uniform", "khatri_rao"):
        yield from (
            Case(**where, op="pranc", direction=way, method=law, tile=None) for way in ("forward", "state_grad")
        )


def dense_of(case: Case) -> Case | None:
    """The case with a stored weight that tells what generating one costs; None where that is not asked."""
    known = (
        case.target == "sm_90" and case.bits == 16 and case.op in ("linear", "conv") and case.direction != "state_grad"
    )
    return dataclasses.replace(case, method="dense") if known and case.method != "dense" else None


def launch_of(case: Case) -> Launch:
    """The launch of a case; of several, the one that multiplies."""
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "ieee" if case.ieee else "tf32"
    try:
        with recorded() as found:
            CALLS[case.op](case)
    finally:
        torch.backends.fp32_precision = before
    main = next((launch for launch in found if "tl.dot(" in launch.kernel.src), found[0])
    return _on_stored_weight(main) if case.method == "dense" else main


def _weight(
    generator: Generator, shape: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype, method: str
) -> Weight:
    offsets, total = generator.addresses([prod(shape)] * 2)
    size = generator.state_size(0.1, [shape] * 2)
    view = View(
        generator=generator, seed=0, tensor=1, shape=shape, order=order, offset=offsets[1], total=total, size=size
    )
    state = torch.zeros(generator.state_shape(view), dtype=dtype)
    if method == "pemn":
        state = torch.zeros(generator.frozen_shape(view), dtype=torch.uint8)
    return Weight.of(view, state, encode_scales(torch.ones(2)), method == "table")


def _epilogue(case: Case, channels: int) -> Epilogue:
    if not case.finish:
        return Epilogue()
    numbers = torch.zeros(3, channels)
    return Epilogue(numbers[0], numbers[1], numbers[2], "silu")


def _linear(case: Case) -> None:
    side, dtype, tile = MATRIX[0], DTYPES[case.bits], case.tile
    weight = _weight(METHODS[case.method], MATRIX, (0, 1), dtype, case.method)
    x = torch.empty(tile.m if tile.m < 16 else 4096, side, dtype=dtype)
    if case.direction == "state_grad":
        form = weight.form(tile.k, dtype).into(torch.zeros(weight.state.shape))
        linear.add_state_grad(form, weight, x, x, tile)
    else:
        linear.multiply(weight, x, tile, case.direction == "input_grad", _epilogue(case, side))


def _conv(case: Case) -> None:
    """A convolution of one group, or of as many as there are channels."""
    kernels, groups = (depthwise, 256) if case.op == "depthwise" else (conv, 1)
    shape, dtype, tile = (256, 256 // groups, 3, 3), DTYPES[case.bits], case.tile
    weight = _weight(METHODS[case.method], shape, (0, 2, 3, 1), dtype, case.method)
    x, y = _images(256, dtype), _images(256, dtype)
    geometry = conv.Geometry([1, 1], [1, 1], [1, 1], False, [0, 0], groups)
    if case.direction == "state_grad":
        form = weight.form(math.gcd(tile.k, shape[1]), dtype).into(torch.zeros(weight.state.shape))
        kernels.state_grad(form, weight, y, x, geometry, tile)
    else:
        kernels.convolve(y, x, weight, geometry, tile, case.direction == "input_grad", _epilogue(case, 256))


def _images(channels: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(16, channels, 16, 16, dtype=dtype).to(memory_format=torch.channels_last)


def _generate(case: Case) -> None:
    """A whole weight, as staged ops do; or some rows of one."""
    weight = _weight(METHODS[case.method], MATRIX, (0, 1), torch.bfloat16, case.method)
    if case.op == "generate":
        generate.generate(weight.view, weight.state, weight.scale, torch.bfloat16)
    else:
        indices = torch.zeros(4096, dtype=torch.int64)
        embedding.forward(weight.view, weight.state, weight.scale, indices, torch.bfloat16)


def _pranc(case: Case) -> None:
    weight = _weight(Pranc(law=case.method), MATRIX, (0, 1), torch.float32, case.method)
    if case.direction == "state_grad":
        pranc.accumulate(torch.zeros(MATRIX), weight.state, weight.view)
    else:
        pranc.generate(weight.view, weight.state, weight.scale, torch.bfloat16)


def _on_stored_weight(launch: Launch) -> Launch:
    """The same launch with a stored weight: what is left are its loads."""
    form = dense_form(torch.empty(MATRIX, dtype=launch.args[1].dtype))
    given: dict[str, Any] = {"BEGIN": form.begin, "TILE": form.tile, "args": form.args, "SPEC": form.spec}
    return dataclasses.replace(launch, constants=launch.constants | given)


CALLS = {
    "linear": _linear,
    "conv": _conv,
    "depthwise": _conv,
    "generate": _generate,
    "embedding": _generate,
    "pranc": _pranc,
}
"""How each op is launched."""
