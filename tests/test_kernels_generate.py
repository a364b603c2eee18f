"""Whole weights of a ring by kernels, and the ring's gradient: the bits of `materialize`, the sums of `accumulate`."""

from __future__ import annotations

import dataclasses
from math import prod
from typing import Any
from unittest import mock

import pytest
import torch
from conformance import GENERATORS
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, NARROW, TARGETS, compiled, same_bits
from torch import Tensor
from torch_settings import deterministic

from fxrpg.addresses import filter_cells
from fxrpg.generators.pemn import Pemn
from fxrpg.generators.ring import BLOCKS, LAYOUTS, Ring
from fxrpg.hashing import CELL, SIGN, words_at
from fxrpg.lowering import lowering_mode
from fxrpg.view import View
from fxrpg.weights import encode_scales, generate_weight

triton = pytest.importorskip("triton", reason="kernels need the package triton")
tl = triton.language
pytestmark = pytest.mark.kernels
RINGS = [
    *GENERATORS["ring"],
    Ring(block=64),
    Ring(block=8),
    Ring(block=1, layout="shuffle"),
    Ring(block=32, layout="hash"),
]
SHAPES = [((5, 7), (0, 1)), ((9, 64), (0, 1)), ((4, 32, 3, 1), (0, 2, 3, 1)), ((7,), (0,)), ((6, 3, 2), (1, 2, 0))]
"""Shapes of weights with their logical orders: short rows, whole blocks, kernels, one axis, a transposed order."""
SCALES = encode_scales(torch.tensor([9.0, 0.75, 9.0, 1.1, 0.3])).to(DEVICE)


def view_of(ring: Any, shape: tuple[int, ...], order: tuple[int, ...], size: int, seed: int = 3) -> View:
    """The fourth of five weights."""
    offsets, total = ring.addresses([prod(shape)] * 5)
    return View(
        generator=ring, seed=seed, tensor=1, shape=shape, order=order, offset=offsets[3], total=total, size=size
    )


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def written(view: View, state: Tensor, scale: Tensor | None, dtype: torch.dtype, cut: tuple[int, int] | None) -> Tensor:
    """The weight that the kernel writes over NaN; `cut`: sides of the tiles, in a matrix of outputs by fan-in."""
    from fxrpg.kernels.fused import generate as kernels

    form = kernels.form_of(view, state, dtype)
    out = torch.full(view.shape, float("nan"), dtype=dtype, device=DEVICE)
    with mock.patch.object(kernels, "tiling", tiles(cut) if cut else kernels.tiling):
        kernels.generate_into(out, form, view, scale)
    return out


def tiles(cut: tuple[int, int]) -> Any:
    from fxrpg.kernels.fused.generate import Tiling

    def tiling(view: View, form: Any) -> Any:
        rows, columns = view.count // view.fan_in, view.fan_in
        return Tiling(columns, *cut, -(-rows // cut[0]) * -(-columns // cut[1]), False)

    return tiling


@pytest.mark.parametrize("ring", RINGS, ids=str)
def test_values_are_those_of_materialize(ring):
    """In every type, for rings of whole blocks and others, with tiles of the kernel's choice and of two other shapes."""
    cases = zip(SHAPES, (64, 640, 37, 11, 64), (None, (2, 128), None, None, (1, 64)), strict=True)
    for i, ((shape, order), size, cut) in enumerate(cases):
        dtype = NARROW[i % 3]
        view, state = view_of(ring, shape, order, size), random(size, dtype=dtype)
        same_bits(written(view, state, None, dtype, cut), ring.materialize(state, view, dtype))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("ring", [Ring(), Ring(bits=4, bits_block=8)], ids=str)
def test_scaled_weights_are_those_of_torch(ring, dtype):
    from fxrpg.kernels.fused.generate import generate

    view = view_of(ring, (4, 32, 3, 1), (0, 2, 3, 1), 96)
    state = random(96, dtype=dtype)
    with lowering_mode("materialized"):
        expected = generate_weight(state, SCALES, view.text)
    same_bits(generate(view, state, SCALES, dtype), expected)


def test_a_frozen_ring_is_read_as_it_was_rounded():
    from fxrpg.kernels.fused.generate import accumulate, generate

    ring = Ring(bits=8)
    view, state = view_of(ring, (5, 32), (0, 1), 96), random(96)
    packed = ring.freeze(state, view)
    same_bits(generate(view, packed, None, torch.float32), ring.materialize(state, view, torch.float32))
    assert accumulate(random(5, 32), packed, view) is None


@pytest.mark.parametrize(
    "ring", [Ring(), Ring(block=1), Ring(layout="shuffle"), Ring(block=1, layout="shuffle")], ids=str
)
def test_weights_far_down_the_address_space(ring):
    """Offsets past 2^31: 64 bits in the layout "shuffle", where positions are permuted; an arc wraps round first."""
    from fxrpg.kernels.fused.generate import form_of, generate

    view = view_of(ring, (5, 32), (0, 1), 96)
    view = dataclasses.replace(view, offset=(1 << 33) + 64, total=(1 << 33) + 1024)
    state = random(96)
    assert form_of(view, state).spec.wide == (ring.layout == "shuffle")
    same_bits(generate(view, state, None, torch.float32), ring.materialize(state, view, torch.float32))


@triton.jit
def corner_kernel(
    out, row0, col0, BEGIN: tl.constexpr, TILE: tl.constexpr, args, SPEC: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    value = TILE(row0 + row, col0, WIDTH, BEGIN(args, SPEC), SPEC, out.dtype.element_ty)
    tl.store(out + row[:, None] * WIDTH + column[None, :], value)


def element_values(ring: Ring, view: View, state: Tensor, element: Tensor) -> Tensor:
    """Some of the weight's values, by the definition of the ring."""
    block, size = element // ring.block, len(state)
    if ring.layout == "block_diagonal":
        cell = filter_cells(ring, view, size, element)
    elif ring.layout == "hash":
        word = words_at(block, view.seed, CELL, view.tensor).to(torch.int64) & 0xFFFFFFFF
        cell = (word * -(-size // ring.block) >> 32) * ring.block
    else:
        permute, first = ring.bijection(view), view.offset // ring.block
        place = permute(block) + first if ring.layout == "arc" else permute(block + first)
        cell = place * ring.block
    cell = (cell + element % ring.block) % size
    bit = element % view.fan_in if ring.layout == "block_diagonal" else element
    sign = words_at(bit >> 5, view.seed, SIGN, view.tensor) >> (bit & 31).to(torch.int32) & 1
    return torch.where(sign == 1, -state[cell], state[cell])


@pytest.mark.parametrize("size", [96, 37])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_more_than_two_to_the_31_elements(layout, size):
    """Tiles at both ends of a weight that is never written down."""
    ring, rows, columns = Ring(block=1 if layout == "block_diagonal" else 32, layout=layout), 1 << 13, 1 << 20
    view = view_of(ring, (rows, columns), (0, 1), size)
    state = random(size)
    form = ring.form(state, view, 64)
    assert form.spec.wide
    assert form.gather is None
    for row, column in ((0, 0), (rows - 4, columns - 64)):
        out = torch.empty(4, 64, device=DEVICE)
        constants = {"BEGIN": form.begin, "TILE": form.tile, "args": form.args, "SPEC": form.spec}
        corner_kernel[(1,)](out, row, column, **constants, ROWS=4, WIDTH=64, enable_fp_fusion=True)
        element = torch.arange(row, row + 4)[:, None] * columns + torch.arange(column, column + 64)
        same_bits(out, element_values(ring, view, state, element.to(DEVICE)))


def gradients(shape: tuple[int, ...]) -> list[Tensor]:
    """Of that shape, with the strides that gradients come in."""
    plain = random(*shape, seed=1)
    found = [
        plain,
        random(*shape[:-2], *shape[:-3:-1], seed=2).mT if len(shape) > 1 else plain,
        plain[:1].expand(shape),
    ]
    return [*found, plain.contiguous(memory_format=torch.channels_last)] if len(shape) == 4 else found


@pytest.mark.parametrize("ring", RINGS, ids=str)
def test_gradients_are_those_of_torch(ring):
    from fxrpg.kernels.fused.generate import accumulate

    for (shape, order), size in zip(SHAPES, (64, 640, 37, 11, 64), strict=True):
        view, state = view_of(ring, shape, order, size), random(size)
        state[::3] = 0  # pruned, where the ring is sparse
        for grad in gradients(shape)[: 4 if ring == Ring() else 1]:
            found = accumulate(grad, state, view)
            torch.testing.assert_close(found, ring.accumulate(grad.double(), state.double(), view).float())


@pytest.mark.parametrize("size", [32, 320, 352, 704, 8192])
@pytest.mark.parametrize("block", BLOCKS)
def test_gathered_gradients_have_the_bits_of_torch(block, size):
    """Rings that a weight goes round once and up to 19 times; no atomics, so the same bits again."""
    from fxrpg.kernels.fused.generate import accumulate
    from fxrpg.kernels.fused.launch import LAUNCHES

    ring = Ring(block=block, sparse=block == 8)
    view, state = view_of(ring, (6, 33, 3, 1), (0, 2, 3, 1), size + -size % block), random(size + -size % block)
    state[::3] = 0
    grad, before = random(6, 33, 3, 1, seed=1), LAUNCHES["gather_kernel"]
    with deterministic():
        found = accumulate(grad, state, view)
        assert torch.equal(found, ring.accumulate(grad, state, view))
    assert LAUNCHES["gather_kernel"] == before + 1


@pytest.mark.parametrize("ring", [Ring(block=8), Ring(block=1, permute=False), Ring(reflect=False)], ids=str)
def test_gathered_sums_of_many_laps(ring):
    from fxrpg.kernels.fused.gather import LEVELS, gather
    from fxrpg.kernels.fused.generate import form_of

    view, state = view_of(ring, (75, 64), (0, 1), 32), random(32)
    form = form_of(view, state)
    assert form.gather[1] > 2 << LEVELS
    grad = random(75, 64, seed=1)
    found = gather(grad, form, view)
    torch.testing.assert_close(found, ring.scatter_gradient(grad.double(), state.double(), view).float())
    assert torch.equal(found, gather(grad, form, view))


@settings(max_examples=15)
@given(
    block=st.sampled_from(BLOCKS),
    layout=st.sampled_from(LAYOUTS),
    size=st.integers(1, 300),
    rows=st.integers(1, 9),
    columns=st.sampled_from([1, 3, 8, 16, 31, 32, 64, 65]),
    kernel=st.integers(1, 3),
    seed=st.integers(0, (1 << 64) - 1),
    dtype=st.sampled_from(NARROW),
    switches=st.tuples(st.booleans(), st.booleans()),
)
def test_any_ring_and_shape(block, layout, size, rows, columns, kernel, seed, dtype, switches):
    from fxrpg.kernels.fused.generate import accumulate, generate

    permute, reflect = switches[0] or layout == "hash", switches[1]
    ring = Ring(block=1 if layout == "block_diagonal" else block, layout=layout, permute=permute, reflect=reflect)
    view, state = view_of(ring, (rows, columns, kernel), (0, 2, 1), size, seed), random(size, dtype=dtype)
    same_bits(generate(view, state, None, dtype), ring.materialize(state, view, dtype))
    grad, wide = random(rows, columns, kernel, seed=1), state.double()
    expected = ring.scatter_gradient(grad.double(), wide, view).float()
    torch.testing.assert_close(accumulate(grad, state, view), expected)
    with deterministic():
        found = accumulate(grad, state, view)
        assert (found is None) == (layout != "arc" or size % ring.block != 0)
        if found is not None:
            assert torch.equal(found, ring.gather_gradient(grad, state, view))


@pytest.mark.parametrize("scale", [None, SCALES], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("ring", [Ring(), Ring(block=1), Ring(bits=8), Ring(block=1, layout="block_diagonal")], ids=str)
def test_many_weights_in_one_launch(ring, scale):
    """Each has the bits that it has alone; all lie in one workspace, where none overlaps another."""
    from fxrpg.kernels.fused.generate import generate
    from fxrpg.kernels.fused.launch import LAUNCHES
    from fxrpg.kernels.fused.many import generate_many

    shapes = [((5, 7), (0, 1)), ((3, 3), (0, 1)), ((4, 11, 3, 3), (0, 2, 3, 1)), ((2, 1100), (0, 1)), ((7,), (0,))]
    offsets, total = ring.addresses([prod(shape) for shape, _ in shapes])
    views = [
        View(generator=ring, seed=3, tensor=i, shape=shape, order=order, offset=offset, total=total, size=96)
        for i, ((shape, order), offset) in enumerate(zip(shapes, offsets, strict=True))
    ]
    state, before = random(96), LAUNCHES["generate_many_kernel"]
    found = generate_many(views, state, scale, torch.float32)
    kinds = 2 if ring.layout == "block_diagonal" else 3  # in logical order or not; whole runs or single elements
    assert LAUNCHES["generate_many_kernel"] - before <= kinds
    assert len({weight.untyped_storage().data_ptr() for weight in found}) == 1
    for view, weight in zip(views, found, strict=True):
        assert weight.is_contiguous()
        same_bits(weight, generate(view, state, scale, torch.float32))


def test_what_is_left_to_torch():
    from fxrpg.kernels.fused.generate import accumulate, generate
    from fxrpg.kernels.fused.many import generate_many

    ring, grad, state = Ring(), random(5, 32), random(96)
    view = view_of(ring, (5, 32), (0, 1), 96)
    assert generate(view, state, None, torch.float64) is None
    assert generate_many([view], state.double(), None, torch.float32) is None
    assert accumulate(grad.double(), state, view) is None
    assert accumulate(grad, state.double(), view) is None
    pruned = dataclasses.replace(view, shape=(2, 32), kept=((0, 1), ()), original=(5, 32))
    assert accumulate(grad[:2], state, pruned) is None
    basis = GENERATORS["pranc"][0]
    own = dataclasses.replace(view, generator=basis)
    assert generate(own, state, None, torch.float32) is None
    assert accumulate(grad, state, own) is None
    assert generate_many([own], state, None, torch.float32) is None


def test_scores_of_a_mask_have_the_gradient_of_torch():
    """A state of the weight's own shape, that the gradient depends on."""
    from fxrpg.kernels.fused.generate import accumulate

    pemn, shape = Pemn(), (5, 32, 3)
    view = dataclasses.replace(view_of(pemn, shape, (0, 2, 1), prod(shape)), offset=0)
    state = random(*pemn.state_shape(view))
    grad = random(*shape, seed=1)
    torch.testing.assert_close(accumulate(grad, state, view), pemn.accumulate(grad, state, view))


def launches() -> None:
    """Of every kernel, for rings of whole runs and of single elements."""
    from fxrpg.kernels.fused.gather import gather
    from fxrpg.kernels.fused.generate import accumulate, form_of, generate
    from fxrpg.kernels.fused.many import generate_many

    for ring in (Ring(), Ring(block=1)):
        view, state = view_of(ring, (64, 64), (0, 1), 640), random(640, dtype=torch.bfloat16)
        generate(view, state, SCALES, state.dtype)
        accumulate(random(64, 64), state, view)
        generate_many([view] * 3, state, SCALES, state.dtype)
        gather(random(64, 64), form_of(view, state), view)


def test_kernels_compile_for_every_target_and_do_not_spill():
    found = compiled("test_kernels_generate")
    assert len(found) == 8 * len(TARGETS)
    assert not any(row.spills for row in found), found
