"""The laws of PRANC's basis: frozen by golden vectors, equal to a slow definition in Python's integers, random enough."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_settings import threads

from fxrpg import Pranc, basis, native
from fxrpg.basis import LAWS
from fxrpg.fixed_point import COEFFICIENT_BITS, GRADIENT_BITS, fixed_point
from fxrpg.hashing import COLUMN, ROW, crossed_words, random_words, words_at
from fxrpg.kernels.native import pranc as native_pranc
from fxrpg.view import View

CPU = torch.device("cpu")
MASK = 0xFFFFFFFF
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
EXAMPLES = settings(max_examples=60)
EVERY_LAW = pytest.mark.parametrize("law", LAWS)


def view_of(
    law: str,
    shape: tuple[int, ...],
    size: int,
    order: tuple[int, ...] | None = None,
    *,
    seed: int = 3,
    tensor: int = 0,
) -> View:
    order = tuple(range(len(shape))) if order is None else order
    return View(
        generator=Pranc(law=law), seed=seed, tensor=tensor, shape=shape, order=order, offset=0, total=1, size=size
    )


@st.composite
def views(draw: st.DrawFn, law: str, most: int = 100) -> View:
    """Of small weights in any logical order, with at most so many coefficients."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    order = tuple(draw(st.permutations(range(len(shape)))))
    return view_of(law, shape, draw(st.integers(1, most)), order)


def vectors(view: View) -> Tensor:
    """The whole basis of a weight, int64 [size, count]."""
    found = LAWS[view.generator.law].vectors(view, view.size, CPU)
    assert found.dtype == torch.float64
    assert torch.equal(found, found.round())
    return found.long()


def alphas_of(size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=draw, dtype=torch.float64)
    return (values * 2.0 ** torch.randint(-12, 12, (size,), generator=draw)).to(dtype)


# The slow definition: Python integers, one value at a time.


def slow_mix(h: int) -> int:
    h = (h ^ h >> 16) * 0x7FEB352D & MASK
    h = (h ^ h >> 15) * 0x846CA68B & MASK
    return h ^ h >> 16


def slow_vectors(view: View) -> np.ndarray:
    """v_ik from the words of element i and of column k alone: Python's integers, [size, count]."""
    rows = random_words(0, view.count + view.fan_in, view.seed, ROW, view.tensor).tolist()
    columns = random_words(0, 4 * view.size, view.seed, COLUMN, view.tensor).tolist()

    def word(i: int, column: int) -> int:
        return slow_mix(rows[i] + columns[column] & MASK)

    def sign(i: int, k: int) -> int:
        return -1 if word(i, k // 32) >> k % 32 & 1 else 1

    def value(i: int, k: int) -> int:
        law = view.generator.law
        if law == "rademacher":
            return sign(i, k)
        if law == "uniform":
            return 2 * (word(i, k // 2) >> 16 * (k % 2) & 0xFFFF) - 0xFFFF
        if law == "normal":
            words = [word(i, 4 * k + j) for j in range(4)]
            return sum((w & 0xFFFF) + (w >> 16) for w in words) - 4 * 0xFFFF
        assert law == "khatri_rao"
        outputs = view.count // view.fan_in
        return sign(i // view.fan_in, k) * sign(outputs + i % view.fan_in, k)

    return np.array([[value(i, k) for i in range(view.count)] for k in range(view.size)], dtype=object)


def slow_sums(alphas: Tensor, values: np.ndarray, kept: int = COEFFICIENT_BITS) -> list[float]:
    """sum_k alpha_k v_ik for alphas rounded to whole numbers of so many bits of the largest (twice as many for float64)."""
    exact = [Fraction(a) for a in alphas.to(torch.float64).tolist()]
    exponent = math.frexp(float(max(map(abs, exact))))[1] - kept * (2 if alphas.dtype == torch.float64 else 1)
    unit = Fraction(2) ** exponent
    whole = np.array([round(a / unit) for a in exact], dtype=object)
    return [float(total * unit) for total in whole @ values]


# Golden vectors: if one of these changes, files written before do not decode any more.

GOLDEN_WEIGHTS = {
    "rademacher": ["-0x1.99999a0000000p+0", "0x1.99999a0000000p-2", "-0x1.99999a0000000p-2"],
    "uniform": ["0x1.7c05240000000p-1", "0x1.c6a4440000000p-4", "-0x1.73b2b60000000p-4"],
    "normal": ["-0x1.e3ffc40000000p-1", "-0x1.1b63940000000p+1", "-0x1.13e5920000000p-2"],
    "khatri_rao": ["-0x1.6666660000000p+0", "0x1.6666660000000p+0", "0x1.3333340000000p-1"],
}


@pytest.mark.parametrize(
    ("law", "signs"),
    [
        ("rademacher", ["-+-----++-+-", "++-++-----+-", "+-++-++----+", "++++++--+-++", "--+-----+++-"]),
        ("khatri_rao", ["++++----++++", "++--++----++", "+-++-+--+-++", "+++-+++-+++-", "++++++++----"]),
    ],
)
def test_golden_signs(law, signs):
    found = vectors(view_of(law, (3, 4), 40, seed=7, tensor=3))
    assert ["".join("+-"[int(v < 0)] for v in found[k]) for k in (0, 1, 31, 32, 39)] == signs


@pytest.mark.parametrize(
    ("law", "first", "last"),
    [
        ("uniform", [[17211, 17401, -38041, 59979], [-32035, 15337, -64709, -3497]], 48387),
        ("normal", [[-21354, -77589, -54562, 29452], [50069, 77331, -87797, -21024]], 37894),
    ],
)
def test_golden_values(law, first, last):
    found = vectors(view_of(law, (3, 4), 40, seed=7, tensor=3))
    assert found[:2, :4].tolist() == first
    assert found[39, 11] == last


def test_golden_crossed_words():
    rows, columns = words_at(torch.arange(3), 7, ROW, 3), words_at(torch.arange(2), 7, COLUMN, 3)
    assert rows.tolist() == [-1281754527, -842795459, -741351559]
    assert columns.tolist() == [1823089785, -709602356]
    assert crossed_words(rows, columns).tolist() == [
        [1097769373, -1644912132, 27080115],
        [-1094182012, 1596920816, 1834462208],
    ]


def test_golden_weight():
    """The whole way, from coefficients to float32 weights."""
    alphas = torch.tensor([1.0, -0.5, 0.1, 3e-9])
    for law, expected in GOLDEN_WEIGHTS.items():
        view = view_of(law, (1, 3), 4, seed=7, tensor=3)
        assert [x.hex() for x in view.generator.materialize(alphas, view, torch.float32).view(-1).tolist()] == expected


# Exactness.


@EVERY_LAW
@EXAMPLES
@given(data=st.data())
def test_vectors_are_their_definition(law, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    seed, tensor = data.draw(st.integers(0, (1 << 64) - 1)), data.draw(st.integers(0, 1000))
    view = view_of(law, shape, data.draw(st.integers(1, 70)), seed=seed, tensor=tensor)
    assert vectors(view).tolist() == slow_vectors(view).tolist()


FLOATS = {
    torch.float16: st.floats(-60000, 60000, width=16),
    torch.bfloat16: st.floats(
        width=32, allow_nan=False, allow_infinity=False, max_value=2.0**126, min_value=-(2.0**126)
    ),
    torch.float32: st.floats(width=32, allow_nan=False, allow_infinity=False),
    torch.float64: st.floats(min_value=-1e300, max_value=1e300),
}
"""From the smallest subnormal to (near) the largest, with both zeros."""


@EVERY_LAW
@EXAMPLES
@given(data=st.data())
def test_weights_are_integer_sums_rounded_once(law, data):
    view, dtype = data.draw(views(law, most=200)), data.draw(st.sampled_from(DTYPES))
    size = view.size
    some = data.draw(st.lists(FLOATS[dtype], min_size=1, max_size=min(size, 20)))
    alphas = torch.tensor([*some, *[some[0]] * (size - len(some))], dtype=torch.float64).to(dtype)
    if dtype == torch.float64 and alphas.abs().max() < 2.0**-900:
        alphas = alphas * 2.0**200  # below, numbers have fewer bits
    out = data.draw(st.sampled_from(DTYPES))
    found = view.to_logical(view.generator.materialize(alphas, view, out))
    sums = torch.tensor(slow_sums(alphas, vectors(view).numpy().astype(object)), dtype=torch.float64)
    expected = sums / LAWS[law].deviation
    if dtype == torch.float64 and law in ("uniform", "normal"):  # more than two rows of integers: a few more roundings
        torch.testing.assert_close(found, expected.to(out), rtol=1e-15 if out == dtype else 1e-2, atol=0)
    else:
        assert torch.equal(found, expected.to(out))


@EVERY_LAW
@EXAMPLES
@given(data=st.data())
def test_gradients_are_integer_sums_rounded_once(law, data):
    view = data.draw(views(law))
    some = data.draw(st.lists(FLOATS[torch.float32], min_size=1, max_size=20))
    grad = torch.tensor(some).repeat(view.count)[: view.count]
    found = view.generator.accumulate(view.from_logical(grad), torch.ones(view.size), view)
    values = vectors(view).numpy().astype(object).T
    sums = torch.tensor(slow_sums(grad, values, GRADIENT_BITS), dtype=torch.float64)
    assert torch.equal(found, (sums / LAWS[law].deviation).float())


@EXAMPLES
@given(data=st.data())
def test_fixed_point_leaves_room_for_every_sum(data):
    bits = data.draw(st.sampled_from([COEFFICIENT_BITS, GRADIENT_BITS]))
    dtype, law = data.draw(st.sampled_from(DTYPES)), LAWS[data.draw(st.sampled_from(list(LAWS)))]
    some = data.draw(st.lists(FLOATS[dtype], min_size=1, max_size=8))
    size = data.draw(st.sampled_from([1, 2, 3, 64, 65, 10_000, 100_000]))
    alphas = torch.tensor(some, dtype=torch.float64).to(dtype).repeat(-(-size // len(some)))[:size]
    limbs, weights = fixed_point(alphas, law.bits, bits)
    assert torch.equal(limbs, limbs.round())
    assert limbs.abs().amax() * size * 2.0**law.bits <= 2.0**53
    assert bool((torch.frexp(weights)[0] == 0.5).all())
    unit = Fraction(weights[-1].item())
    kept = [sum(Fraction(limb) * Fraction(w) for limb, w in zip(row, weights[:, 0].tolist(), strict=True))
            for row in limbs[:, :8].t().tolist()]  # fmt: skip
    for found, alpha in zip(kept, alphas[:8].to(torch.float64).tolist(), strict=True):
        assert abs(found - Fraction(alpha)) <= unit / 2
    if (largest := alphas.abs().max().item()) > 2.0**-900:
        assert unit * 2 ** (bits * (2 if dtype == torch.float64 else 1)) <= 2 * Fraction(largest)


def test_values_lie_within_their_bits():
    for law, values in (("uniform", 0xFFFF), ("normal", 4 * 0xFFFF)):
        assert values < 2 ** LAWS[law].bits
        assert vectors(view_of(law, (64, 64), 64)).abs().max() <= values


@EVERY_LAW
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_alphas_break_every_weight(law, dtype, bad):
    """Not garbage in some of them: training that diverged must show."""
    view = view_of(law, (3, 5), 40)
    alphas = alphas_of(40, dtype=dtype)
    alphas[17] = bad
    assert bool(view.generator.materialize(alphas, view, dtype).isnan().all())


@EVERY_LAW
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_gradients_break_every_coefficient(law, dtype, bad):
    view, grad = view_of(law, (3, 5), 40), torch.ones(3, 5, dtype=dtype)
    grad[1, 2] = bad
    assert bool(view.generator.accumulate(grad, torch.ones(40), view).isnan().all())


@EVERY_LAW
def test_numbers_at_the_ends_of_the_range(law):
    view = view_of(law, (3, 5), 2)
    for value in (5e-324, 2.0**-1060, 2.0**-1022, 1e300):
        found = view.generator.materialize(torch.tensor([value, 0.0], dtype=torch.float64), view, torch.float64)
        assert bool(found.isfinite().all())
    largest = torch.full((64,), torch.finfo(torch.float64).max / 1e3, dtype=torch.float64)
    wide = view_of(law, (3, 5), 64)
    assert not bool(wide.generator.materialize(largest, wide, torch.float64).isnan().any())


@EVERY_LAW
def test_zeros_give_positive_zeros(law):
    view = view_of(law, (3, 5), 40)
    for value in (0.0, -0.0):
        found = view.generator.materialize(torch.full((40,), value), view, torch.float32)
        assert not bool(found.view(torch.int32).any())


def test_powers_of_two_are_exact():
    exponents = torch.arange(-1022, 1024, dtype=torch.float64)
    assert torch.exp2(exponents).tolist() == [math.ldexp(1, int(e)) for e in exponents]


# One value at a time, in any order, in chunks of any size.


@pytest.mark.parametrize(("i", "k"), [(0, 0), (4, 31), (17, 32), (19, 99)])
def test_any_value_follows_from_two_words(i, k):
    """Without any other value of the basis: what a reader in another language does."""

    def words(count_in_word: int, parts: int) -> list[int]:
        first = parts * (k // count_in_word)
        columns = words_at(torch.arange(first, first + parts), 3, COLUMN, 0)
        return [w & MASK for w in crossed_words(words_at(torch.tensor([i]), 3, ROW, 0), columns)[:, 0].tolist()]

    found = {law: vectors(view_of(law, (4, 5), 100))[k, i].item() for law in LAWS}
    assert found["rademacher"] == (-1) ** (words(32, 1)[0] >> k % 32 & 1)
    assert found["uniform"] == 2 * (words(2, 1)[0] >> 16 * (k % 2) & 0xFFFF) - 0xFFFF
    assert found["normal"] == sum((w & 0xFFFF) + (w >> 16) for w in words(1, 4)) - 4 * 0xFFFF
    u, w = (words_at(torch.tensor([side]), 3, ROW, 0) for side in (i // 5, 4 + i % 5))
    column = words_at(torch.tensor([k // 32]), 3, COLUMN, 0)
    flips = [crossed_words(side, column).item() >> k % 32 & 1 for side in (u, w)]
    assert found["khatri_rao"] == (-1) ** (flips[0] ^ flips[1])


@EVERY_LAW
def test_fewer_vectors_are_the_first_of_more(law):
    whole = vectors(view_of(law, (4, 6), 130))
    for size in (1, 7, 32, 33, 129):
        assert torch.equal(vectors(view_of(law, (4, 6), size)), whole[:size])


@pytest.mark.parametrize("law", ["rademacher", "uniform", "normal"])
def test_fewer_elements_are_the_first_of_more(law):
    whole = vectors(view_of(law, (200,), 40))
    for count in (1, 7, 199):
        assert torch.equal(vectors(view_of(law, (count,), 40)), whole[:, :count])


@EVERY_LAW
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_trailing_zeros_change_no_bit(law, dtype):
    """Fewer coefficients generate what they do among more that are zero, although they are split otherwise."""
    for size, most in ((1, 200), (31, 33), (64, 5000), (65, 128)):
        alphas = alphas_of(size, dtype=dtype)
        few, many = view_of(law, (3, 5), size), view_of(law, (3, 5), most)
        padded = torch.nn.functional.pad(alphas, (0, most - size))
        assert torch.equal(
            few.generator.materialize(alphas, few, torch.float32),
            many.generator.materialize(padded, many, torch.float32),
        )


@EVERY_LAW
@pytest.mark.parametrize("chunk", [64, 1000])
def test_chunks_change_no_bit(law, chunk, monkeypatch):
    view = view_of(law, (7, 11, 3), 300, (1, 2, 0))
    alphas, grad = alphas_of(300), torch.linspace(-1, 1, 231, dtype=torch.float64).view(7, 11, 3)
    weight = view.generator.materialize(alphas, view, torch.float32)
    gradient = view.generator.accumulate(grad, alphas, view)
    monkeypatch.setattr(basis, "CHUNK", chunk)
    monkeypatch.setattr(basis, "_BINNED", 3)
    assert torch.equal(view.generator.materialize(alphas, view, torch.float32), weight)
    assert torch.equal(view.generator.accumulate(grad, alphas, view), gradient)
    narrow = view.generator.accumulate(grad.float(), alphas, view)
    monkeypatch.undo()
    assert torch.equal(view.generator.accumulate(grad.float(), alphas, view), narrow)


@EVERY_LAW
def test_threads_change_no_bit(law):
    view = view_of(law, (120, 130), 150)
    alphas, weights, gradients = alphas_of(150), [], []
    grad = alphas_of(view.count, 1).view(view.shape)
    for count in (1, 2):
        with threads(count):
            weights.append(view.generator.materialize(alphas, view, torch.float32))
            gradients.append(view.generator.accumulate(grad, alphas, view))
    assert torch.equal(*weights)
    assert torch.equal(*gradients)


@EVERY_LAW
@EXAMPLES
@given(data=st.data())
def test_gradients_are_the_adjoint(law, data):
    """Exactly, where every number is whole: <materialize(a), g> = <a, accumulate(g)>."""
    view = data.draw(views(law))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    grad = torch.randint(-50, 50, view.shape, generator=draw).double()
    expected = (vectors(view) @ view.to_logical(grad).long()).double() / LAWS[law].deviation
    assert torch.equal(view.generator.accumulate(grad, torch.ones(view.size), view), expected)


@EVERY_LAW
def test_everything_is_made_on_the_device_of_the_coefficients(law):
    """An op that makes a tensor without saying where would make it on the default device, which here holds no values."""
    view = view_of(law, (4, 6), 40)
    alphas, grad = alphas_of(40), torch.ones(4, 6)
    with torch.device("meta"):
        assert view.generator.materialize(alphas, view, torch.float32).device == CPU
        assert view.generator.reference(alphas, view).device == CPU
        assert view.generator.accumulate(grad, alphas, view).device == CPU


# Statistics.

WIDE = {"size": 256, "shape": (64, 64)}


def drawn(law: str, **where: Any) -> Tensor:
    """A basis with values of unit variance, float64 [256, 4096]."""
    return vectors(view_of(law, WIDE["shape"], WIDE["size"], **where)) / LAWS[law].deviation


def independent() -> Iterator[tuple[str, Tensor]]:
    """Laws whose values are independent of one another."""
    return ((law, drawn(law)) for law in ("rademacher", "uniform", "normal"))


@pytest.mark.parametrize(
    ("law", "kurtosis"), [("rademacher", 1), ("khatri_rao", 1), ("uniform", 1.8), ("normal", 3 - 6 / 5 / 8)]
)
def test_moments(law, kurtosis):
    values = drawn(law)
    assert abs(values.mean().item()) * values.numel() ** 0.5 < 5
    assert values.square().mean().item() == pytest.approx(1, abs=0.01)
    assert values.pow(4).mean().item() == pytest.approx(kurtosis, rel=0.01)


def chi_square(counts: Tensor, draws: int) -> float:
    """By how many deviations the spread of heads in `draws` fair throws differs from what it should be."""
    total = (counts.double() - draws / 2).square().sum().item() / (draws / 4)
    return (total - len(counts)) / (2 * len(counts)) ** 0.5


def test_signs_are_fair_across_elements_and_vectors():
    for law, values in independent():
        negative = values < 0
        assert abs(chi_square(negative.sum(0), len(values))) < 5, law
        assert abs(chi_square(negative.sum(1), values.shape[1])) < 5, law


def test_neighbouring_signs_come_in_all_pairs():
    for _, values in independent():
        negative = (values < 0).long()
        for first, second in ((negative[:-1], negative[1:]), (negative[:, :-1], negative[:, 1:])):
            pairs = torch.bincount((2 * first + second).flatten(), minlength=4).double()
            expected = pairs.sum() / 4
            assert ((pairs - expected).square() / expected).sum() < 30  # chi-square of 3 degrees


def correlations(first: Tensor, second: Tensor) -> Tensor:
    """Of every row with every row, in deviations of what independent rows have."""
    return first @ second.t() / first.shape[1] ** 0.5


@EVERY_LAW
def test_vectors_layers_and_seeds_are_uncorrelated(law):
    values = drawn(law)
    off = ~torch.eye(len(values), dtype=torch.bool)
    others = {
        "vectors": correlations(values, values)[off],
        "layers": correlations(values, drawn(law, tensor=1)).flatten(),
        "seeds": correlations(values, drawn(law, seed=4)).flatten(),
        "elements": correlations(values.t()[:200], values.t()[:200])[~torch.eye(200, dtype=torch.bool)],
    }
    for what, found in others.items():
        assert abs(found.mean().item()) * found.numel() ** 0.5 < 6, what
        assert found.square().mean().item() == pytest.approx(1, abs=0.05), what
        assert found.abs().max() < (18 if law == "khatri_rao" else 6.5), what  # products of two sums have long tails


def test_laws_and_streams_share_no_weight():
    """Another law, layer or seed is another basis from the first vector on."""
    everywhere = itertools.product(LAWS, (3, 4), (0, 1))
    first = [tuple(drawn(law, seed=seed, tensor=tensor)[0, :64].tolist()) for law, seed, tensor in everywhere]
    assert len(set(first)) == len(first)


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 2, 2), (7,)])
def test_khatri_rao_is_of_rank_one_in_each_vector(shape):
    order = (0, 2, 3, 1) if len(shape) == 4 else tuple(range(len(shape)))
    view = view_of("khatri_rao", shape, 40, order)
    for vector in vectors(view):
        matrix = vector.view(-1, view.fan_in)
        assert torch.equal(matrix[:, :1] * matrix[:1] * matrix[0, 0], matrix)
    assert view.generator.law == "khatri_rao"
    assert LAWS["khatri_rao"].draws(view) == (shape[0] + view.fan_in) * 40
    assert LAWS["rademacher"].draws(view) == view.count * 40


@EVERY_LAW
@pytest.mark.parametrize("start", [0, 32, 96])
def test_a_run_of_the_basis_is_drawn_without_the_rest(law, start):
    view = view_of(law, (6, 5), 101)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-99, 99, (2, 101 - start), generator=generator).double()
    grads = torch.randint(-99, 99, (2, view.count), generator=generator).double()
    run = LAWS[law].vectors(view, 101, CPU)[start:]
    compiled = native_pranc._LAWS if native.library() else {}
    for one in {LAWS[law], compiled.get(law, LAWS[law])}:
        assert torch.equal(torch.cat(list(one.combine(numbers, view, start)), 1), numbers @ run)
        assert torch.equal(one.project(grads, view, 101 - start, start), grads @ run.t())
