"""The ring alone, without any layer: every value, address and gradient against a slow definition in plain Python."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_settings import deterministic, threads

import fxrpg
from fxrpg import Ring
from fxrpg.generators.ring import BLOCKS
from fxrpg.hashing import CELL, INIT, PERMUTE, SIGN, Bijection, near_normal, random_words
from fxrpg.plan import candidates, choose
from fxrpg.scopes import lay_out
from fxrpg.view import View

EXAMPLES = settings(deadline=None, derandomize=True, max_examples=150)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ("arc", "shuffle", "block_diagonal", "hash")
ALL_TENSORS = 0xFFFFFFFF


def fixed(seed: int) -> torch.Generator:
    """Test data only: no weight ever comes from torch's generator."""
    return torch.Generator().manual_seed(seed)


def some_values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=fixed(seed), dtype=torch.float64).to(dtype)


def whole_values(*shape: int, seed: int = 0) -> Tensor:
    """Small integers, as float64: their sums are exact in any order."""
    return torch.randint(-100, 100, shape, generator=fixed(seed)).double()


def bits(values: Tensor) -> Tensor:
    """Bit patterns, so that -0.0 is not 0.0."""
    return values.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def view_of(
    ring: Ring,
    shape: tuple[int, ...],
    order: tuple[int, ...] | None = None,
    *,
    seed: int = 3,
    tensor: int = 0,
    first: int = 0,
    after: int = 0,
    size: int = 64,
) -> View:
    """A view whose weight begins `first` blocks into the address space and is followed by `after` blocks."""
    extent = ring.extents([math.prod(shape)])[0]
    return View(
        generator=ring,
        seed=seed,
        tensor=tensor,
        shape=shape,
        order=tuple(range(len(shape))) if order is None else order,
        offset=first * ring.block,
        total=first * ring.block + extent + after * ring.block,
        size=size,
    )


def ring_of(layout: str, **settings: bool) -> Ring:
    """A ring of that layout with blocks, where the layout has them."""
    return Ring(block=1 if layout == "block_diagonal" else 32, layout=layout, **settings)


# The slow definition.


def slow_cells(view: View, size: int) -> list[int]:
    """The cell of every logical element: (pi(block) * G + lane) mod N."""
    ring = view.generator
    if ring.layout == "block_diagonal":
        return slow_filters(view, size)
    places = slow_places(view, size)
    return [(places[e // ring.block] * ring.block + e % ring.block) % size for e in range(view.count)]


def slow_places(view: View, size: int) -> list[int]:
    """pi of every block: within the weight's own arc, over all weights, or hashed."""
    ring, first = view.generator, view.offset // view.generator.block
    blocks = math.ceil(view.count / ring.block)
    if ring.layout == "hash":
        words = random_words(0, blocks, view.seed, CELL, view.tensor).tolist()
        return [(word % (1 << 32)) * math.ceil(size / ring.block) // (1 << 32) for word in words]
    if not ring.permute:
        return list(range(first, first + blocks))
    if ring.layout == "arc":
        arc = Bijection.keyed(blocks, view.seed, PERMUTE, view.tensor)
        return [first + image for image in arc(torch.arange(blocks)).tolist()]
    shuffle = Bijection.keyed(view.total // ring.block, view.seed, PERMUTE, ALL_TENSORS)
    return shuffle(torch.arange(first, first + blocks)).tolist()


def slow_filters(view: View, size: int) -> list[int]:
    """One permutation for every filter, side by side on the ring; each time that it comes round, one cell later."""
    length = view.fan_in
    images = list(range(length))
    if view.generator.permute:
        images = Bijection.keyed(length, view.seed, PERMUTE, view.tensor)(torch.arange(length)).tolist()
    cells, first = [], view.offset % size
    start = first
    for _ in range(view.count // length):
        cells += [(start + image) % size for image in images]
        start = (start + length) % size
        if start == first:
            first = start = (start + 1) % size
    return cells


def slow_signs(view: View) -> list[bool]:
    """Whether each logical element is negated: bit e % 32 of word e // 32; of a filter's element e, for all filters alike."""
    words = random_words(0, math.ceil(view.count / 32), view.seed, SIGN, view.tensor).tolist()
    length = view.fan_in if view.generator.layout == "block_diagonal" else view.count
    return [
        view.generator.reflect and bool(words[e // 32] >> e % 32 & 1) for e in (i % length for i in range(view.count))
    ]


def coordinates(view: View) -> Iterator[tuple[int, ...]]:
    """PyTorch's index of every logical element: the last axis of `order` runs fastest."""
    for logical in itertools.product(*(range(view.shape[axis]) for axis in view.order)):
        yield tuple(logical[view.order.index(axis)] for axis in range(len(view.shape)))


def slow_weight(state: Tensor, view: View, dtype: torch.dtype) -> Tensor:
    weight = torch.empty(view.shape, dtype=dtype)
    cast = state.to(dtype)
    for at, cell, negated in zip(coordinates(view), slow_cells(view, len(state)), slow_signs(view), strict=True):
        weight[at] = -cast[cell] if negated else cast[cell]
    return weight


def slow_matrix(view: View, size: int) -> Tensor:
    """A of weight.flatten() = A @ state, one +-1 a row, float64 [count, size]."""
    matrix = torch.zeros(*view.shape, size, dtype=torch.float64)
    for at, cell, negated in zip(coordinates(view), slow_cells(view, size), slow_signs(view), strict=True):
        matrix[(*at, cell)] = -1 if negated else 1
    return matrix.view(view.count, size)


SIZES = st.integers(1, 9) | st.sampled_from([32, 64, 320]) | st.integers(1, 500)


@st.composite
def rings(draw: st.DrawFn, layouts: tuple[str, ...] = LAYOUTS) -> Ring:
    layout = draw(st.sampled_from(layouts))
    permute = layout == "hash" or draw(st.booleans())
    block = 1 if layout == "block_diagonal" else draw(st.sampled_from(BLOCKS))
    return Ring(block=block, layout=layout, permute=permute, reflect=draw(st.booleans()))


@st.composite
def views(draw: st.DrawFn, layouts: tuple[str, ...] = LAYOUTS) -> View:
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple))
    return view_of(
        draw(rings(layouts)),
        shape,
        tuple(draw(st.permutations(range(len(shape))))),
        seed=draw(st.integers(0, (1 << 64) - 1)),
        tensor=draw(st.integers(0, 1000)),
        first=draw(st.integers(0, 20) | st.integers(1 << 31, 1 << 33)),
        after=draw(st.integers(0, 20)),
        size=draw(SIZES),
    )


# Values.


@EXAMPLES
@given(views(), st.sampled_from(DTYPES), st.sampled_from(DTYPES))
def test_materialize_is_its_definition(view, stored, dtype):
    state = some_values(view.size, dtype=stored)
    state[::7] = 0  # its sign counts too
    found = view.generator.materialize(state, view, dtype)
    assert found.dtype == dtype
    assert found.shape == view.shape
    assert found.is_contiguous()
    assert torch.equal(bits(found), bits(slow_weight(state, view, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_signs_flip_infinities_and_zeros(dtype):
    view = view_of(Ring(block=1), (40,), size=4)
    state = torch.tensor([math.inf, -math.inf, 0.0, -0.0], dtype=dtype)
    found = view.generator.materialize(state, view, dtype)
    assert torch.equal(bits(found), bits(slow_weight(state, view, dtype)))


@pytest.mark.parametrize(("layout", "block"), [*itertools.product(["arc", "shuffle"], BLOCKS), ("block_diagonal", 1)])
def test_addresses_beyond_32_bits(block, layout):
    """A small ring, but a weight that begins more than 2^31 positions after the first."""
    first = (1 << 33) // block + 7
    view = view_of(Ring(block=block, layout=layout), (4, 3, 5), (0, 2, 1), first=first, after=11, size=97)
    state = some_values(97)
    assert view.offset > 1 << 31
    assert torch.equal(view.generator.materialize(state, view, torch.float64), slow_weight(state, view, torch.float64))
    grad = whole_values(*view.shape)
    assert torch.equal(view.generator.accumulate(grad, state, view), slow_matrix(view, 97).t() @ grad.view(-1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_materialized_weights_are_fresh(layout):
    view = view_of(ring_of(layout, reflect=False), (4, 32))
    state = nn.Parameter(some_values(64))
    weight = view.generator.materialize(state, view, torch.float64)
    assert not weight.requires_grad
    before = state.detach().clone()
    weight.zero_()
    assert torch.equal(state, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [320, 997])
def test_threads_change_no_value(layout, size):
    view = view_of(ring_of(layout), (400, 1000), size=size)
    state = some_values(size, dtype=torch.float32)
    with threads(1):
        alone = view.generator.materialize(state, view, torch.float32)
    with threads(2):
        assert torch.equal(view.generator.materialize(state, view, torch.float32), alone)


@EXAMPLES
@given(views())
def test_a_view_survives_its_text(view):
    assert View.parse(view.text) == view
    original = tuple(2 * side for side in view.shape)
    kept = tuple(() if axis else tuple(range(1, 1 + side)) for axis, side in enumerate(view.shape))
    pruned = dataclasses.replace(view, kept=kept, original=original)
    assert View.parse(pruned.text) == pruned


@pytest.mark.parametrize("name", ["seed", "tensor"])
@pytest.mark.parametrize("layout", ["arc", "hash"])
def test_another_seed_or_tensor_is_another_weight(layout, name):
    view, state = view_of(Ring(block=1, layout=layout), (2000,), size=500), some_values(500)
    other = dataclasses.replace(view, **{name: getattr(view, name) + 1})
    for ring in (view.generator, Ring(block=1, layout=layout, reflect=False)):
        a, b = (ring.materialize(state, v, torch.float64) for v in (view, other))
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / math.sqrt(2000)


# Gradients.


@EXAMPLES
@given(views())
def test_scatter_is_the_transposed_matrix(view):
    grad = whole_values(*view.shape)
    found = view.generator.scatter_gradient(grad, torch.empty(view.size), view)
    assert torch.equal(found, slow_matrix(view, view.size).t() @ grad.view(-1))


@EXAMPLES
@given(views(layouts=("arc",)))
def test_gather_is_the_transposed_matrix(view):
    grad = whole_values(*view.shape)
    found = view.generator.gather_gradient(grad, torch.empty(view.size), view)
    assert found.shape == (view.size,)
    assert torch.equal(found, slow_matrix(view, view.size).t() @ grad.view(-1))


@EXAMPLES
@given(views(), st.integers(0, 1000))
def test_gradients_are_the_exact_adjoint(view, seed):
    state, grad = some_values(view.size, seed=seed), some_values(*view.shape, seed=seed + 1)
    weight = view.generator.materialize(state, view, torch.float64)
    ways = [view.generator.scatter_gradient, view.generator.accumulate]
    if view.generator.layout == "arc":
        ways.append(view.generator.gather_gradient)
    for way in ways:
        difference = (weight * grad).sum() - (state * way(grad, state, view)).sum()
        assert abs(difference) <= 1e-12 * weight.norm() * grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 33, 320, 997, 300_000])
@pytest.mark.parametrize("block", [1, 32])
def test_gather_does_not_depend_on_threads(block, size, dtype):
    view = view_of(Ring(block=block), (300, 501), (1, 0), first=5, size=size)
    grad, state = some_values(300, 501, dtype=dtype), torch.empty(size, dtype=dtype)
    with threads(1):
        alone = view.generator.gather_gradient(grad, state, view)
    assert alone.dtype == dtype
    for count in (2, 3):
        with threads(count):
            assert torch.equal(view.generator.gather_gradient(grad, state, view), alone)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scatter_on_the_cpu_does_not_depend_on_threads(layout):
    view = view_of(ring_of(layout), (300, 501), first=5, after=9, size=320)
    grad, state = some_values(300, 501, dtype=torch.float32), torch.empty(320)
    with threads(1):
        alone = view.generator.scatter_gradient(grad, state, view)
    with threads(2):
        assert torch.equal(view.generator.scatter_gradient(grad, state, view), alone)


@pytest.mark.parametrize(
    ("layout", "in_order", "way"),
    [
        ("arc", False, "scatter_gradient"),
        ("arc", True, "gather_gradient"),
        ("shuffle", True, "scatter_gradient"),
        ("hash", True, "scatter_gradient"),
        ("block_diagonal", True, "scatter_gradient"),
    ],
)
def test_accumulate_gathers_where_it_must_be_deterministic(monkeypatch, layout, in_order, way):
    used = []
    for name in ("scatter_gradient", "gather_gradient"):
        monkeypatch.setattr(Ring, name, lambda self, grad, state, view, name=name: used.append(name))
    view = view_of(ring_of(layout), (10, 10))
    with deterministic(in_order):
        view.generator.accumulate(some_values(10, 10), torch.empty(64), view)
    assert used == [way]


def test_deterministic_gradients_are_the_same_gradients():
    view, state = view_of(Ring(), (64, 90), first=3, size=320), torch.empty(320)
    grad = whole_values(64, 90)
    with deterministic():
        found = view.generator.accumulate(grad, state, view)
    assert torch.equal(found, view.generator.accumulate(grad, state, view))


# How the ring is used.


def tiny_views(ring: Ring) -> dict[str, View]:
    """Views over layers of several shapes; none has a padded last block, for any block."""
    model = nn.ModuleDict(
        {
            "first": nn.Linear(64, 10),
            "conv": nn.Conv2d(8, 24, 3),
            "transposed": nn.ConvTranspose1d(16, 8, 5),
            "linear": nn.Linear(64, 13),
            "last": nn.Linear(64, 10),
        }
    )
    return laid_out_of(model, ring, 11)


def laid_out_of(model: nn.Module, ring: Ring, seed: int) -> dict[str, View]:
    chosen, _ = choose(candidates(model, {}), ring, ())
    return lay_out(chosen, model, dof=40, scope="model", seed=seed)[1]


def usage(laid_out: dict[str, View], size: int) -> Tensor:
    """How many elements read each cell."""
    used = torch.zeros(size, dtype=torch.int64)
    for view in laid_out.values():
        used += torch.bincount(torch.tensor(slow_cells(view, size)), minlength=size)
    assert used.sum() == sum(view.count for view in laid_out.values())
    return used


@pytest.mark.parametrize("size", [1, 50, 64, 192, 997, 5000])
@pytest.mark.parametrize("block", [1, 32, 64])
@pytest.mark.parametrize(("layout", "permute"), [("arc", True), ("arc", False), ("shuffle", True), ("shuffle", False)])
def test_cells_are_used_floor_or_ceil_of_m_over_n_times(layout, permute, block, size):
    laid_out = tiny_views(Ring(block=block, layout=layout, permute=permute))
    weights = sum(view.count for view in laid_out.values())
    used = usage(laid_out, size)
    assert weights == 24 * 8 * 9 + 16 * 8 * 5 + 64 * 13
    assert set(used.tolist()) <= {weights // size, -(-weights // size)}
    assert int((used == weights // size + 1).sum()) == weights % size


def test_hashed_cells_are_used_unevenly():
    used = usage(tiny_views(Ring(block=1, layout="hash")), 500)
    assert used.min() < 3
    assert used.max() > 12
    assert used.double().var() > 0.5 * used.double().mean()  # a Poisson variable's variance is its mean


@pytest.mark.parametrize("size", [1, 7, 12, 64])
@pytest.mark.parametrize("length", [1, 6, 7, 64, 100])
def test_filters_of_a_small_ring_differ(length, size):
    """As many as the ring has cells: each begins in a cell of its own."""
    view = view_of(ring_of("block_diagonal", permute=False), (size, length), size=size)
    cells = view.generator.block_cells(view, size, torch.device("cpu")).view(size, length)
    assert sorted(cells[:, 0].tolist()) == list(range(size))


@pytest.mark.parametrize("layout", ["arc", "shuffle"])
def test_views_of_different_tensors_do_not_overlap(layout):
    laid_out = tiny_views(Ring(layout=layout))
    total = next(iter(laid_out.values())).total
    assert set(usage(laid_out, total).tolist()) == {1}


def test_padding_is_counted_and_left_unused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(5, 7), nn.Linear(3, 11), nn.Linear(3, 3))
    ring = Ring(block=8)
    laid_out = laid_out_of(model, ring, 0)
    assert [(view.offset, view.total) for view in laid_out.values()] == [(0, 80), (40, 80)]
    assert usage(laid_out, 80).tolist().count(0) == 80 - 35 - 33
    assert fxrpg.ledger(fxrpg.transform(model, dof=40, method=ring)).padding == 80 - 35 - 33


# The state at the start.


@pytest.mark.parametrize("ring", [Ring(), Ring(block=1, layout="shuffle"), Ring(layout="hash")], ids=str)
def test_generated_weights_start_at_the_planned_deviation(ring):
    generated = nn.Linear(64, 64), nn.Conv2d(64, 32, 3), nn.Linear(256, 100)
    model = nn.Sequential(nn.Linear(4, 4), *generated, nn.Linear(4, 4))
    small = fxrpg.materialize(fxrpg.transform(model, dof=0.5, method=ring, seed=5))
    for before, after in zip(generated, small[1:4], strict=True):
        assert after.weight.std().item() == pytest.approx(before.weight.std().item(), rel=0.05)
        assert abs(after.weight.mean()) < 4 * before.weight.std() / math.sqrt(after.weight.numel() / 4)


def start(size: int, seed: int, std: float, tensors: tuple[int, ...] = (0,)) -> Tensor:
    """A ring at the start, read by the weights with these ids."""
    return Ring().init_state([view_of(Ring(), (3, 5), seed=seed, tensor=t, size=size) for t in tensors], std)


@pytest.mark.parametrize("tensors", [(0,), (4, 2, 9)])
@pytest.mark.parametrize("size", [1, 2, 33, 10_000])
def test_the_state_is_the_draws_brought_to_their_deviation(size, tensors):
    """Draws of the weight that is first by id: rings of the same seed, read by other weights, are not alike."""
    state = start(size, 1, 0.05, tensors)
    assert state.shape == (size,)
    assert state.dtype == torch.float64
    assert state.square().mean().sqrt().item() == pytest.approx(0.05, rel=1e-4)
    draws = near_normal(size, 1, INIT, min(tensors))
    torch.testing.assert_close(state, draws * (state[0] / draws[0]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [50_021, 100_000, 300_007])
def test_the_state_at_the_start_does_not_depend_on_threads(size):
    with threads(1):
        alone = start(size, 0, 0.05)
    for count in (2, 3, 4):
        with threads(count):
            assert torch.equal(start(size, 0, 0.05), alone)


def test_a_ring_of_one_cell_whose_only_draw_is_zero():
    assert near_normal(1, 255022, INIT, 0).item() == 0
    assert start(1, seed=255022, std=0.05).tolist() == [0.05]


# Settings.


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"block": 5}, "block"),
        ({"block": 0}, "block"),
        ({"layout": "x"}, "layout"),
        ({"layout": "hash", "permute": False}, "permute"),
        ({"layout": "block_diagonal"}, "layout='block_diagonal'"),
        ({"bits": 3}, "bits"),
        ({"bits_block": -1}, "bits_block"),
    ],
)
def test_wrong_settings_are_refused(settings, named):
    with pytest.raises(fxrpg.FxrpgError, match=rf"Ring\({named}{'' if '=' in named else '='}"):
        Ring(**settings)


@pytest.mark.parametrize(
    ("dof", "weights", "size"),
    [
        (100, 1000, 100),
        (1, 1000, 1),
        (0.5, 1000, 512),
        (1e-9, 1000, 32),
        (1.0, 1000, 992),
        (1.0, 1024, 1024),
        (0.5, 20, 20),
    ],
)
def test_sizes_of_the_ring(dof, weights, size):
    """An int is exact, a fraction rounds to whole blocks of 32 that fit."""
    assert Ring().state_size(dof, [(weights,)]) == size
    assert Ring().state_size(dof, [(2, 5), (weights - 10,)]) == size
