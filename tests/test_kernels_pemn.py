"""PEMN in kernels: the bits of `materialize` and the gradient of `accumulate`, whatever the tile."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, NARROW, TARGETS, compiled, same_bits
from torch import Tensor

from fxrpg.generators.pemn import Pemn
from fxrpg.view import View

triton = pytest.importorskip("triton", reason="kernels need the package triton")
tl = triton.language
pytestmark = pytest.mark.kernels
NEVER = -54321.0
"""No value of any test."""


@triton.jit
def tile_kernel(
    out, rows, columns, BEGIN: tl.constexpr, TILE: tl.constexpr, args, SPEC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    form = BEGIN(args, SPEC)
    value = TILE(row, tl.program_id(1) * BLOCK_COLUMNS, BLOCK_COLUMNS, form, SPEC, out.dtype.element_ty)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + row[:, None] * columns + column[None, :], value, mask=inside)


@triton.jit
def accumulate_kernel(
    grad, rows, columns, BEGIN: tl.constexpr, ACCUMULATE: tl.constexpr, args, SPEC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(grad + row[:, None] * columns + column[None, :], mask=inside, other=1000.0)
    ACCUMULATE(value, inside, row, tl.program_id(1) * BLOCK_COLUMNS, BLOCK_COLUMNS, BEGIN(args, SPEC), SPEC)


def run(kernel: Any, tensor: Tensor, view: View, form: Any, tile: tuple[int, int], **function: Any) -> None:
    from fxrpg.kernels.fused.launch import launch

    rows, columns = view.count // view.fan_in, view.fan_in
    grid = -(-rows // tile[0]), -(-columns // tile[1])
    constants = {"BEGIN": form.begin, "args": form.args, "SPEC": form.spec, **function}
    launch(kernel, grid, tensor, tensor, rows, columns, **constants, BLOCK_ROWS=tile[0], BLOCK_COLUMNS=tile[1])


def generated(state: Tensor, view: View, dtype: torch.dtype, tile: tuple[int, int], told: bool = True) -> Tensor:
    """The weight's values in logical order, made in tiles of [rows, columns]."""
    form = view.generator.form(view.generator.kernel_state(state, view), view, tile[1], dtype if told else None)
    out = torch.full((view.count,), NEVER, dtype=dtype, device=DEVICE)
    run(tile_kernel, out, view, form, tile, TILE=form.tile)
    return out


def accumulated(grad: Tensor, state: Tensor, view: View, tile: tuple[int, int]) -> Tensor:
    form = view.generator.form(view.generator.kernel_state(state, view), view, tile[1])
    out = torch.zeros(state.shape, device=DEVICE)
    run(accumulate_kernel, view.to_logical(grad).contiguous(), view, form.into(out), tile, ACCUMULATE=form.accumulate)
    return out


def view_of(method: Pemn, shape: tuple[int, ...], size: int = 37, lead: int = 0, total: int | None = None) -> View:
    order = (0, *range(2, len(shape)), 1) if len(shape) > 2 else tuple(range(len(shape)))
    total = lead + math.prod(shape) + 5 if total is None else total
    return View(generator=method, seed=11, tensor=2, shape=shape, order=order, offset=lead, total=total, size=size)


def scores_of(view: View, dtype: torch.dtype = torch.float32, levels: int = 0) -> Tensor:
    """Random scores; with `levels`, of so few magnitudes that many tie."""
    draw = torch.Generator().manual_seed(5)
    scores = torch.randn(view.generator.state_shape(view), generator=draw, dtype=torch.float64)
    if levels:
        scores = (scores * levels).round() / levels
    return scores.to(dtype).to(DEVICE)


SHAPES = st.sampled_from(
    [(3, 5), (7,), (1, 64), (5, 32), (3, 160), (2, 32, 3), (3, 2, 3, 2), (2, 64, 2, 2), (4, 32, 1, 1), (32, 1, 3, 3)]
)


@settings(max_examples=50)
@given(
    data=st.data(),
    shape=SHAPES,
    size=st.sampled_from([1, 8, 24, 37, 100, 5000]),
    lead=st.sampled_from([0, 32, 13]),
    packed=st.booleans(),
    stored=st.sampled_from([*NARROW, torch.float64]),
    dtype=st.sampled_from(NARROW),
)
def test_values_are_those_of_materialize(data, shape, size, lead, packed, stored, dtype):
    method = Pemn(
        prototype=data.draw(st.sampled_from(["random_padding", "random_padding", "one_layer"])),
        values=data.draw(st.sampled_from(["normal", "signed_constant"])),
        threshold=data.draw(st.sampled_from(["layer", "global"])),
        permuted=data.draw(st.sampled_from([False, False, True])),
        keep=data.draw(st.sampled_from([0.01, 0.3, 0.5, 0.99])),
    )
    view = view_of(method, shape, size, lead)
    state = scores_of(view, stored, levels=data.draw(st.sampled_from([0, 2])))
    expected = view.to_logical(method.materialize(state, view, dtype))
    tile = data.draw(st.sampled_from([(1, 16), (4, 32), (2, 64), (8, 128)]))
    told = data.draw(st.booleans())
    same_bits(generated(method.freeze(state, view) if packed else state, view, dtype, tile, told), expected)


@settings(max_examples=20)
@given(
    shape=SHAPES,
    threshold=st.sampled_from(["layer", "global"]),
    prototype=st.sampled_from(["random_padding", "one_layer"]),
    permuted=st.booleans(),
    stored=st.sampled_from([torch.float32, torch.bfloat16]),
    tile=st.sampled_from([(1, 16), (4, 32), (2, 128)]),
)
def test_gradients_are_those_of_accumulate(shape, threshold, prototype, permuted, stored, tile):
    method = Pemn(threshold=threshold, prototype=prototype, permuted=permuted)
    view = view_of(method, shape, lead=13)
    state = scores_of(view, stored, levels=2)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert (state == 0).any()
    assert torch.equal(accumulated(grad, state, view, tile), method.accumulate(grad, state, view))


@pytest.mark.parametrize("threshold", ["layer", "global"])
@pytest.mark.parametrize("fill", ["nan", "inf", "mixed", "all"])
def test_scores_that_are_not_finite(threshold, fill):
    """What they drop is NaN, and they count as the largest, equally large."""
    method = Pemn(threshold=threshold, keep=0.3)
    for shape in ((3, 5), (2, 64)):
        view = view_of(method, shape)
        state = scores_of(view)
        flat = state.view(-1)
        if fill == "all":
            flat[:] = torch.tensor([math.nan, math.inf, -math.inf, -math.nan], device=DEVICE).repeat(len(flat))[
                : len(flat)
            ]
        else:
            flat[3], flat[9] = (math.nan, -math.inf) if fill == "mixed" else (float(fill), float(fill))
        expected = view.to_logical(method.materialize(state, view, torch.float32))
        assert expected.isnan().any()
        same_bits(generated(state, view, torch.float32, (2, 32)), expected)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
def test_equal_scores_keep_the_first(value):
    for threshold in ("layer", "global"):
        for shape in ((4, 5), (3, 64), (2, 32, 3)):
            view = view_of(Pemn(threshold=threshold, keep=0.3), shape, lead=0)
            state = torch.full(view.generator.state_shape(view), value, device=DEVICE)
            found = generated(state, view, torch.float32, (4, 32))
            kept = math.floor(0.3 * state.numel() + 0.5)
            assert (found != 0).tolist() == [i < kept for i in range(view.count)]


def test_the_threshold_of_all_scores_may_lie_in_another_weight():
    method = Pemn(threshold="global", keep=0.25)
    for lead in (0, 64):
        view = view_of(method, (2, 64), lead=lead, total=192)
        state = torch.ones(192, device=DEVICE)
        found = generated(state, view, torch.float32, (2, 64))
        same_bits(found, view.to_logical(method.materialize(state, view, torch.float32)))
        assert found.count_nonzero() == (48 if lead == 0 else 0)


@pytest.mark.parametrize("shape", [(3, 5), (3, 64), (2, 32, 3, 3)])
@pytest.mark.parametrize("packed", [False, True])
def test_permutations_of_more_than_32_bits(shape, packed):
    method = Pemn(permuted=True)
    view = view_of(method, shape, total=(1 << 33) + 11)
    state = scores_of(view)
    form = method.form(state, view, 32)
    assert form.spec.wide
    expected = view.to_logical(method.materialize(state, view, torch.float32))
    same_bits(generated(method.freeze(state, view) if packed else state, view, torch.float32, (2, 32)), expected)
    if not packed:
        grad = torch.randn(shape).to(DEVICE)
        assert torch.equal(accumulated(grad, state, view, (2, 32)), method.accumulate(grad, state, view))


@pytest.mark.parametrize("lead", [(1 << 31) - 64, (1 << 31) + 32, (1 << 32) + 7])
def test_bits_past_the_thirty_second(lead):
    method = Pemn(threshold="global")
    view = view_of(method, (2, 64), lead=lead)
    state = torch.zeros(-(-view.total // 8), dtype=torch.uint8, device=DEVICE)
    state[lead // 8 :] = torch.randint(256, (len(state) - lead // 8,), generator=torch.Generator().manual_seed(2))
    expected = view.to_logical(method.materialize(state, view, torch.bfloat16))
    assert expected.count_nonzero() > 30
    same_bits(generated(state, view, torch.bfloat16, (2, 64)), expected)


def test_packed_bits_that_begin_at_any_byte():
    method = Pemn()
    view = view_of(method, (2, 64))
    packed = method.freeze(scores_of(view), view)
    shifted = torch.cat([packed[:1], packed])[1:]
    assert shifted.data_ptr() % 4
    same_bits(generated(shifted, view, torch.float32, (2, 64)), generated(packed, view, torch.float32, (2, 64)))


def test_a_table_too_long_to_be_repeated():
    method = Pemn()
    size = (1 << 18) + 1
    view = view_of(method, (2, 1 << 18), size)
    state = method.freeze(scores_of(view), view)
    form = method.form(state, view, 64)
    assert form.spec.wraps
    assert not form.spec.whole
    out = torch.full((view.count,), NEVER, device=DEVICE)
    run(tile_kernel, out, view, form, (1, 1 << 15), TILE=form.tile)
    same_bits(out, view.to_logical(method.materialize(state, view, torch.float32)))


def test_weights_of_a_model_share_one_table():
    method = Pemn()
    first, second = (
        method.form(scores_of(view), view, 64).args[2] for view in (view_of(method, (3, 5)), view_of(method, (64, 64)))
    )
    assert first.data_ptr() == second.data_ptr()
    own = Pemn(prototype="one_layer")
    view = view_of(own, (3, 5))
    first, second = (own.form(scores_of(view), view, 64).args[2] for _ in range(2))
    assert first.data_ptr() != second.data_ptr(), "as large as the weight: not kept"


def launches() -> None:
    """From packed bits; from scores, and their gradient; by a permutation in 64 bits."""
    tile = (16, 64)
    for method, shape, total in (
        (Pemn(), (8, 64), None),
        (Pemn(), (4, 32, 3, 3), None),
        (Pemn(permuted=True), (8, 64), 1 << 33),
    ):
        view = view_of(method, shape, lead=32, total=total)
        state = scores_of(view, torch.float64 if total else torch.bfloat16)
        if len(shape) == 2 and not total:
            state = method.freeze(state, view)
        generated(state, view, torch.bfloat16, tile)
        if len(shape) == 4:
            accumulated(torch.zeros(shape, dtype=torch.bfloat16), state, view, tile)


def test_kernels_compile_for_every_target_and_do_not_spill():
    found = compiled("test_kernels_pemn")
    assert len(found) == 4 * len(TARGETS)
    assert not any(row.spills for row in found), found
