"""The embedding kernels: rows of a generated table without the table, and the gradient of its state."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conformance import GENERATORS
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, NARROW, TARGETS, compiled, poisoned, same_bits
from torch import Tensor
from torch_settings import deterministic

from fxrpg.generator import Generator
from fxrpg.generators.pemn import Pemn
from fxrpg.generators.ring import Ring
from fxrpg.kernels.embedding import embedding_weight_grad
from fxrpg.lowering import lowering_mode
from fxrpg.view import View
from fxrpg.weights import accumulate_gradient, decode_scales, encode_scales, generate_weight

pytest.importorskip("triton", reason="kernels need the package triton")
from fxrpg.kernels.fused import embedding as kernels
from fxrpg.kernels.fused.launch import LAUNCHES

pytestmark = pytest.mark.kernels
SCALE = encode_scales(torch.tensor([9.0, 0.7512, 9.0])).to(DEVICE)
METHODS = st.sampled_from([*GENERATORS["ring"], *GENERATORS["pemn"]])
FREEZING = [Ring(bits=8), Pemn(), Pemn(threshold="global", permuted=True)]


@pytest.fixture(autouse=True)
def unwritten_memory_shows():
    with poisoned():
        yield


def table(
    method: Generator, rows: int, columns: int, dtype: torch.dtype = torch.float32, size: int = 96
) -> tuple[View, Tensor]:
    """A table somewhere in a larger address space, and its state."""
    offsets, total = method.addresses([rows * columns] * 3)
    view = View(
        generator=method,
        seed=3,
        tensor=1,
        shape=(rows, columns),
        order=(0, 1),
        offset=offsets[1],
        total=total,
        size=size,
    )
    draw = torch.Generator().manual_seed(4)
    state = torch.randn(method.state_shape(view), generator=draw, dtype=torch.float64)
    state[..., :3] = 0  # pruned, where the method prunes
    return view, state.to(dtype).to(DEVICE)


def indices(rows: int, shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
    draw = torch.Generator().manual_seed(6)
    return torch.randint(rows, shape, generator=draw).to(dtype).to(DEVICE)


def staged_rows(view: View, state: Tensor, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    with lowering_mode("materialized"):
        return F.embedding(index, generate_weight(state, SCALE, view.text, dtype))


def staged_grad(view: View, state: Tensor, grad: Tensor, index: Tensor, padding: int, by_freq: bool) -> Tensor:
    dense = embedding_weight_grad(grad, (index,), view.shape, padding, by_freq)
    with lowering_mode("materialized"):
        return accumulate_gradient(dense, state, SCALE, view.text)


COLUMNS = st.sampled_from([1, 5, 32, 64, 96, 130])


@settings(max_examples=40)
@given(
    method=METHODS,
    rows=st.integers(1, 20),
    columns=COLUMNS,
    size=st.sampled_from([37, 96, 64]),
    shape=st.sampled_from([(), (1,), (7,), (2, 9), (2, 0, 3), (3, 2, 4)]),
    dtype=st.sampled_from(NARROW),
    stored=st.sampled_from([torch.float32, torch.bfloat16]),
    integers=st.sampled_from([torch.int64, torch.int32]),
)
def test_rows_are_those_of_the_staged_path(method, rows, columns, size, shape, dtype, stored, integers):
    view, state = table(method, rows, columns, stored, size)
    index = indices(rows, shape, integers)
    found = kernels.forward(view, state, SCALE, index, dtype)
    assert found.dtype == dtype
    assert found.is_contiguous()
    same_bits(found, staged_rows(view, state, index, dtype))


@pytest.mark.parametrize("method", FREEZING, ids=repr)
@pytest.mark.parametrize("columns", [10, 64])
def test_rows_of_frozen_states(method, columns):
    view, state = table(method, 9, columns)
    frozen, index = method.freeze(state, view), indices(9, (2, 7))
    found = kernels.forward(view, frozen, SCALE, index, torch.float16)
    same_bits(found, staged_rows(view, frozen, index, torch.float16))
    assert kernels.state_grad(view, frozen, SCALE, found, index, -1, False) is None


@settings(max_examples=30)
@given(
    method=METHODS,
    rows=st.integers(1, 9),
    columns=COLUMNS,
    shape=st.sampled_from([(), (1,), (23,), (2, 9), (2, 0)]),
    padding=st.integers(-1, 8),
    by_freq=st.booleans(),
    stored=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_gradients_are_those_of_the_staged_path(method, rows, columns, shape, padding, by_freq, stored):
    view, state = table(method, rows, columns, stored)
    index, padding = indices(rows, shape), min(padding, rows - 1)
    grad = torch.randn(*shape, columns, generator=torch.Generator().manual_seed(8)).to(DEVICE)
    found = kernels.state_grad(view, state, SCALE, grad, index, padding, by_freq)
    assert found.dtype == torch.float32
    assert found.shape == state.shape
    expected = staged_grad(view, state.float(), grad, index, padding, by_freq)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    if method.sparse:
        assert not found[state == 0].any()


@pytest.mark.parametrize("by_freq", [False, True])
def test_gradients_of_low_precision_are_summed_in_float32(by_freq):
    view, state = table(Ring(), 3, 64)
    index, ones = (
        torch.zeros(400, dtype=torch.int64, device=DEVICE),
        torch.ones(400, 64, dtype=torch.bfloat16, device=DEVICE),
    )
    found = kernels.state_grad(view, state, SCALE, ones, index, -1, by_freq)
    dense = torch.zeros(3, 64, device=DEVICE)
    dense[0] = decode_scales(SCALE[1]) * (1 if by_freq else 400)
    torch.testing.assert_close(found, view.generator.accumulate(dense, state, view), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("index", [indices(9, (6, 8)).t()[::2], indices(9, (1,)).expand(7)], ids=["turned", "expanded"])
def test_indices_of_any_strides(index):
    view, state = table(Ring(), 9, 40)
    found = kernels.forward(view, state, SCALE, index, torch.float32)
    same_bits(found, staged_rows(view, state, index))
    grad = torch.randn(40, *index.shape).to(DEVICE).movedim(0, -1)
    found = kernels.state_grad(view, state, SCALE, grad, index, 2, False)
    torch.testing.assert_close(found, staged_grad(view, state, grad, index, 2, False))


@pytest.mark.parametrize("wrong", [-1, 9, 1 << 40])
def test_rows_that_are_not_there(wrong):
    """As torch does on the CPU; on a GPU nothing is read out of bounds, and the row is NaN."""
    view, state = table(Ring(), 9, 40)
    index = torch.tensor([3, wrong, 8], device=DEVICE)
    if DEVICE == "cpu":
        with pytest.raises(IndexError, match="index out of range in self"):
            kernels.forward(view, state, SCALE, index, torch.float32)
    else:
        found = kernels.forward(view, state, SCALE, index, torch.float32)
        assert found[1].isnan().all()
        same_bits(found[::2], staged_rows(view, state, index[::2]))
    grad = torch.ones(3, 40, device=DEVICE)
    found = kernels.state_grad(view, state, SCALE, grad, index, -1, False)
    torch.testing.assert_close(found, staged_grad(view, state, grad[::2], index[::2], -1, False))


@pytest.mark.parametrize("block", [1, 32])
def test_tables_far_out_in_a_shared_address_space(block):
    method = Ring(block=block, layout="shuffle")
    for columns in (10, 64):
        near, state = table(method, 5, columns)
        far = dataclasses.replace(near, offset=(1 << 33) + 32 * 7, total=(1 << 34) + 64)
        index = torch.arange(5, device=DEVICE)
        assert method.form(state, far, 64).spec.wide
        found = kernels.forward(far, state, SCALE, index, torch.float32)
        same_bits(found, staged_rows(far, state, index))


def test_what_is_refused():
    view, state = table(Ring(), 9, 40)
    index, grad = indices(9, (4,)), torch.ones(4, 40, device=DEVICE)
    assert kernels.forward(view, state, SCALE, index, torch.float64) is None
    assert kernels.forward(view, state.double(), SCALE, index, torch.float32) is None
    assert kernels.state_grad(view, state, SCALE, grad.double(), index, -1, False) is None
    sideways = dataclasses.replace(view, order=(1, 0))
    assert kernels.forward(sideways, state, SCALE, index, torch.float32) is None
    if DEVICE == "cuda":
        with deterministic():
            assert kernels.state_grad(view, state, SCALE, grad, index, -1, False) is None


def test_launches_are_counted():
    view, state = table(Pemn(), 9, 64)
    before = LAUNCHES.copy()
    out = kernels.forward(view, state, SCALE, indices(9, (4,)), torch.float32)
    kernels.state_grad(view, state, SCALE, out, indices(9, (4,)), -1, False)
    assert LAUNCHES - before == {"embedding_kernel": 1, "embedding_state_grad_kernel": 1}


def launches() -> None:
    """Of both kernels, with addresses computed and with a mask."""
    for method in (Ring(), Pemn()):
        view, state = table(method, 300, 64, torch.bfloat16)
        index = indices(300, (40,))
        grad = kernels.forward(view, state, SCALE, index, torch.bfloat16)
        kernels.state_grad(view, state, SCALE, grad, index, 3, True)


def test_kernels_compile_for_every_target_and_do_not_spill():
    found = compiled("test_kernels_embedding")
    assert len(found) == 4 * len(TARGETS)
    assert not any(row.spills for row in found), found
