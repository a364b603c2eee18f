"""PRANC's pair of kernels: the bits of `materialize` and of `accumulate`, whatever the tiles, and what they compile to."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, NARROW, TARGETS, compiled, poisoned, same_bits
from torch import Tensor

from fxrpg import Pranc
from fxrpg.hashing import COLUMN, ROW, words_at
from fxrpg.view import View
from fxrpg.weights import encode_scales, generate_weight

pytest.importorskip("triton", reason="kernels need the package triton")
pytestmark = pytest.mark.kernels
LAWS = ("rademacher", "uniform", "khatri_rao")
EVERY_LAW = pytest.mark.parametrize("law", LAWS)
EXAMPLES = settings(max_examples=12, deadline=None)
SMALL = {
    "rademacher": {"block": 16, "words": 4, "warps": 4},
    "uniform": {"block": 16, "words": 8, "warps": 4},
    "khatri_rao": {"block": 16, "words": 1, "warps": 4},
}
TILES = {
    "rademacher": ({"block": 64, "words": 1, "warps": 4}, {"block": 16, "words": 8, "warps": 8, "chunk": 256}),
    "uniform": ({"block": 32, "words": 16, "warps": 4}, {"block": 16, "words": 8, "warps": 4, "chunk": 32}),
    "khatri_rao": ({"block": 32, "words": 2, "warps": 4}, {"block": 128, "words": 4, "warps": 8}),
}
GRADIENT_SMALL = {
    "rademacher": {"words": 8, "block": 16, "chunk": 64, "warps": 4},
    "uniform": {"words": 16, "block": 16, "chunk": 64, "warps": 4},
    "khatri_rao": {"words": 1, "block": 32, "chunk": 16, "warps": 4},
}
GRADIENT_TILES = {
    "rademacher": (
        {"words": 16, "block": 32, "chunk": 32, "warps": 4},
        {"words": 8, "block": 8, "chunk": 40, "warps": 8},
    ),
    "uniform": (
        {"words": 32, "block": 8, "chunk": 56, "warps": 4},
        {"words": 64, "block": 32, "chunk": 1024, "warps": 8},
    ),
    "khatri_rao": (
        {"words": 2, "block": 64, "chunk": 32, "warps": 4},
        {"words": 1, "block": 32, "chunk": 64, "warps": 8},
    ),
}


def pair() -> Any:
    """The kernels' module, imported when a test runs: reading this file imports no kernel."""
    from fxrpg.kernels.fused import pranc

    return pranc


def view_of(law: str, shape: tuple[int, ...], size: int, order: tuple[int, ...] | None = None, **where: Any) -> View:
    order = tuple(range(len(shape))) if order is None else order
    where = {"seed": 3, "tensor": 0, "sparse": False} | where
    generator = Pranc(law=law, sparse=where.pop("sparse"))
    return View(generator=generator, shape=shape, order=order, offset=0, total=1, size=size, **where)


def numbers(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of many magnitudes and both signs."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=draw, dtype=torch.float64)
    return (values * 2.0 ** torch.randint(-9, 5, (count,), generator=draw)).to(dtype)


def same(found: Tensor | None, expected: Tensor) -> None:
    """Bit for bit, and laid out alike."""
    same_bits(found, expected)
    assert found.stride() == expected.stride()


def generated(
    view: View, state: Tensor, dtype: torch.dtype, scale: Tensor | None = None, **tiles: int
) -> Tensor | None:
    """By the kernels, in memory where what they do not write shows."""
    with poisoned():
        return pair().generate(view, state.to(DEVICE), None if scale is None else scale.to(DEVICE), dtype, **tiles)


def accumulated(grad: Tensor, state: Tensor, view: View, **tiles: int) -> Tensor | None:
    return pair().accumulate(grad.to(DEVICE), state.to(DEVICE), view, **tiles)


@st.composite
def views(draw: st.DrawFn, law: str) -> View:
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4).filter(lambda s: math.prod(s) <= 400)))
    order = tuple(draw(st.permutations(range(len(shape)))))
    seed, tensor = draw(st.integers(0, (1 << 64) - 1)), draw(st.integers(0, 1000))
    return view_of(law, shape, draw(st.integers(1, 150)), order, seed=seed, tensor=tensor)


# Forwards.


@EVERY_LAW
@EXAMPLES
@given(data=st.data())
def test_weights_have_the_bits_of_plain_torch(law, data):
    view, dtype, out = data.draw(views(law)), data.draw(st.sampled_from(NARROW)), data.draw(st.sampled_from(NARROW))
    state = numbers(view.size, data.draw(st.integers(0, 99)), dtype)
    tiles = data.draw(st.sampled_from((SMALL[law], *TILES[law])))
    same(generated(view, state, out, **tiles), view.generator.materialize(state, view, out))


@EVERY_LAW
@pytest.mark.parametrize("order", [(0, 2, 3, 1), (0, 1, 2, 3), (1, 2, 3, 0)])
def test_convolutions_of_any_order_with_the_tiles_of_a_gpu(law, order):
    view, state = view_of(law, (6, 5, 3, 2), 70, order), numbers(70)
    same(generated(view, state, torch.float32), view.generator.materialize(state, view, torch.float32))


@EVERY_LAW
@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 65, 1025])
def test_any_number_of_coefficients(law, size):
    view, state = view_of(law, (3, 2), size), numbers(size, size)
    tiles = SMALL[law] | ({} if law == "khatri_rao" else {"words": 32})
    same(generated(view, state, torch.float32, **tiles), view.generator.materialize(state, view, torch.float32))
    grad = numbers(6, 1).view(3, 2)
    same(accumulated(grad, state, view, **GRADIENT_SMALL[law]), view.generator.accumulate(grad, state, view))


@EVERY_LAW
def test_one_element(law):
    view, state, grad = view_of(law, (1,), 40), numbers(40), torch.tensor([0.3])
    same(generated(view, state, torch.bfloat16, **SMALL[law]), view.generator.materialize(state, view, torch.bfloat16))
    same(accumulated(grad, state, view, **GRADIENT_SMALL[law]), view.generator.accumulate(grad, state, view))


@EVERY_LAW
def test_tiles_change_no_bit(law):
    view, state, grad = view_of(law, (9, 13), 100), numbers(100), numbers(117, 1).view(9, 13)
    weight, gradient = generated(view, state, torch.float32), accumulated(grad, state, view)
    same(weight, view.generator.materialize(state, view, torch.float32))
    same(gradient, view.generator.accumulate(grad, state, view))
    for tiles in (SMALL[law], *TILES[law]):
        same(generated(view, state, torch.float32, **tiles), weight.cpu())
    for tiles in (GRADIENT_SMALL[law], *GRADIENT_TILES[law]):
        same(accumulated(grad, state, view, **tiles), gradient.cpu())


@EVERY_LAW
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ties_are_rounded_as_torch_rounds(law, dtype):
    """A float64 near the middle of two narrow values goes through float32, here and there."""
    view, half = view_of(law, (5, 7), 3), torch.finfo(dtype).eps / 2
    for nudge in (0.0, 2.0**-29, -(2.0**-29), 2.0**-24, -(2.0**-24)):
        for odd in (0, 1):
            state = torch.tensor([1 + 2 * odd * half, half, nudge])
            same(generated(view, state, dtype, **SMALL[law]), view.generator.materialize(state, view, dtype))


@EVERY_LAW
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_numbers_break_everything(law, dtype, bad):
    view, state = view_of(law, (3, 5), 40), numbers(40, dtype=dtype)
    state[17] = bad
    found = generated(view, state, dtype, **SMALL[law])
    assert found is not None
    assert bool(found.isnan().all())
    grad = torch.ones(3, 5)
    grad[1, 2] = bad
    found = accumulated(grad, torch.ones(40), view, **GRADIENT_SMALL[law])
    assert found is not None
    assert bool(found.isnan().all())
    assert bool(view.generator.accumulate(grad, torch.ones(40), view).isnan().all())


@EVERY_LAW
@pytest.mark.parametrize("value", [0.0, -0.0, 2.0**-149, 2.0**-126, 2.0**-3, 1 - 2.0**-24, -1.0, 2.0**100])
def test_numbers_at_the_ends_of_the_range(law, value):
    view, state = view_of(law, (3, 5), 33), torch.full((33,), value)
    same(generated(view, state, torch.float32, **SMALL[law]), view.generator.materialize(state, view, torch.float32))
    grad = torch.full((3, 5), value)
    same(accumulated(grad, state, view, **GRADIENT_SMALL[law]), view.generator.accumulate(grad, state, view))


@EVERY_LAW
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_scaled_weights_are_rounded_twice(law, dtype):
    view, state = view_of(law, (4, 3, 2), 50, (0, 2, 1), tensor=1), numbers(50, dtype=dtype)
    scale = encode_scales(torch.tensor([7.0, 0.0371, 5.0]))
    expected = generate_weight(state, scale, view.text, dtype)
    same(generated(view, state, dtype, scale, **SMALL[law]), expected)


# Backwards.


@EVERY_LAW
@EXAMPLES
@given(data=st.data())
def test_gradients_have_the_bits_of_plain_torch(law, data):
    view = data.draw(views(law))
    grad = numbers(view.count, data.draw(st.integers(0, 99))).view(view.shape)
    state = numbers(view.size, dtype=data.draw(st.sampled_from(NARROW)))
    tiles = data.draw(st.sampled_from((GRADIENT_SMALL[law], *GRADIENT_TILES[law])))
    same(accumulated(grad, state, view, **tiles), view.generator.accumulate(grad, state, view))


@EVERY_LAW
def test_gradients_of_any_strides_with_the_tiles_of_a_gpu(law):
    view = view_of(law, (6, 5, 3, 2), 70, (0, 2, 3, 1))
    grad = numbers(180).view(6, 5, 3, 2)
    expected = view.generator.accumulate(grad, torch.ones(70), view)
    for other in (grad, grad.contiguous(memory_format=torch.channels_last), grad.expand(6, 5, 3, 2).flip(0).flip(0)):
        same(accumulated(other, torch.ones(70), view), expected)


@EVERY_LAW
def test_pruned_coefficients_have_no_gradient(law):
    view, state, grad = view_of(law, (4, 5), 40, sparse=True), numbers(40), numbers(20, 1).view(4, 5)
    state[::3] = 0
    found = accumulated(grad, state, view, **GRADIENT_SMALL[law])
    same(found, view.generator.accumulate(grad, state, view))
    assert not bool(found[::3].any())


@EVERY_LAW
def test_the_pair_is_adjoint(law):
    """<generate(a), g> = <a, accumulate(g)> in float64, to the rounding of both to float32."""
    view, state, grad = view_of(law, (8, 9), 64), numbers(64), numbers(72, 1).view(8, 9)
    weight, gradient = generated(view, state, torch.float32), accumulated(grad, state, view)
    first, second = weight.cpu().double() * grad.double(), gradient.cpu().double() * state.double()
    assert abs((first.sum() - second.sum()).item()) < 1e-6 * (first.abs().sum() + second.abs().sum()).item()


# What the kernels leave to torch, and what they share with it.


def test_what_only_plain_torch_does():
    view, state, grad = view_of("rademacher", (3, 5), 40), torch.ones(40), torch.ones(3, 5)
    normal = view_of("normal", (3, 5), 40)
    assert generated(normal, state, torch.float32) is None
    assert accumulated(grad, state, normal) is None
    assert generated(view, state.double(), torch.float32) is None
    assert generated(view, state, torch.float64) is None
    assert generated(view, state.to(torch.uint8), torch.float32) is None
    assert accumulated(grad.double(), state, view) is None
    assert accumulated(grad, state.double(), view) is None
    for law, most in (("uniform", 1 << 21), ("khatri_rao", 1 << 24)):
        assert generated(dataclasses.replace(view_of(law, (3, 5), 40), size=most + 1), state, torch.float32) is None


def test_the_method_names_its_pair():
    assert Pranc.pair == pair().__name__


@EXAMPLES
@given(count=st.integers(1, 3000), seed=st.integers(0, (1 << 64) - 1), tensor=st.integers(0, 1000))
def test_words_are_the_stream(count, seed, tensor):
    from fxrpg.kernels.fused.streams import stream

    view = view_of("rademacher", (1,), 1, seed=seed, tensor=tensor)
    for purpose in (ROW, COLUMN):
        found = stream(view, purpose, count, torch.device(DEVICE)).cpu()
        assert torch.equal(found, words_at(torch.arange(count), seed, purpose, tensor))


# Compiled for GPUs that are not here.


def launches() -> None:
    """Of every law, a large weight and its gradient."""
    for law in LAWS:
        view = view_of(law, (256, 64, 3, 3), 4096, (0, 2, 3, 1))
        pair().generate(view, torch.ones(4096), torch.ones(1, 3), torch.bfloat16)
        pair().accumulate(torch.ones(view.shape), torch.ones(4096), view)


def test_kernels_compile_for_every_target_and_fit_hopper():
    """Without spills, in its shared memory, and products on its tensor cores."""
    found = compiled("test_kernels_pranc")
    assert {row.target for row in found} == set(TARGETS)
    hopper = [row for row in found if row.target == "sm_90"]
    assert not any(row.spills for row in hopper), hopper
    assert max(row.shared for row in hopper) < 227 * 1024
    products = [row for row in hopper if row.kernel.startswith(("combine", "khatri_rao", "project"))]
    assert len(products) == 2 * len(LAWS)
    assert {row.mma for row in products} == {"IGMMA"}
