"""The integer random functions: frozen by golden vectors, equal to a slow definition, and random enough."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_settings import threads

from fxrpg import hashing
from fxrpg.hashing import (
    CELL,
    INIT,
    PERMUTE,
    SIGN,
    Bijection,
    crossed_words,
    derive_key,
    mix32,
    near_normal,
    random_words,
    words_at,
)

EXAMPLES = settings(deadline=None, derandomize=True, max_examples=100)
SEEDS = st.integers(0, (1 << 64) - 1)
LABELS = st.lists(st.integers(0, (1 << 32) - 1), max_size=4)


def fixed(seed: int) -> torch.Generator:
    """Test data only: no weight ever comes from torch's generator."""
    return torch.Generator().manual_seed(seed)


def unsigned(words: Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in words.tolist()]


# The slow definition: plain Python integers, written from the docstrings' formulas.

MASK = 0xFFFFFFFF


def slow_mix(h: int) -> int:
    h = (h ^ h >> 16) * 0x7FEB352D & MASK
    h = (h ^ h >> 15) * 0x846CA68B & MASK
    return h ^ h >> 16


def slow_key(seed: int, *labels: int) -> int:
    h = 0
    for word in (1, seed, *labels):
        h = ((h ^ word) + 0x9E3779B97F4A7C15) % 2**64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            h = (h ^ h // 2**shift) * factor % 2**64
        h ^= h // 2**31
    return h // 2**32


def slow_word(counter: int, seed: int, *labels: int) -> int:
    outer, inner = slow_key(seed, *labels, 0), slow_key(seed, *labels, 1)
    h = slow_mix(counter % (1 << 32) ^ outer)
    return slow_mix((h + counter // (1 << 32) * 0x9E3779B9 + inner) & MASK)


@dataclass(frozen=True)
class SlowBijection:
    """A Feistel network on Z_a x Z_b that walks its cycle until the image is below `count`."""

    count: int
    keys: tuple[int, ...]

    @classmethod
    def keyed(cls, count: int, seed: int, *labels: int) -> SlowBijection:
        return cls(count, tuple(slow_key(seed, *labels, r) for r in range(8 if count < 16384 else 6)))

    @functools.cached_property
    def factors(self) -> tuple[int, int]:
        root = math.isqrt(self.count)
        allowed = range(max(2, (root + 1) // 2), root + 1) if self.count >= 4 else [1]
        a = min(allowed, key=lambda a: (-self.count % a, -a))
        return a, -(-self.count // a)

    def step(self, x: int, sign: int = 1) -> int:
        a, b = self.factors
        left, right = divmod(x, b)
        for r, key in list(enumerate(self.keys))[::sign]:
            if r % 2 == 0:
                left = (left + sign * self._round(right, key, a)) % a
            else:
                right = (right + sign * self._round(left, key, b)) % b
        return left * b + right

    def _round(self, x: int, key: int, n: int) -> int:
        t = (x * 0x9E3779B1 + key) & MASK
        return (t * (t | 1) & MASK) * n >> 32

    def __call__(self, x: int) -> int:
        y = self.step(x)
        while y >= self.count:
            y = self.step(y)
        return y

    def walkers(self) -> list[int]:
        """The elements whose images the first pass leaves at or past `count`."""
        a, b = self.factors
        before = [self.step(hole, -1) for hole in range(self.count, a * b)]
        return [x for x in before if x < self.count]


# Golden vectors. If one of these fails, FORMAT_VERSION must change: every saved model has become another one.


def test_golden_purposes():
    assert (hashing.FORMAT_VERSION, PERMUTE, SIGN, CELL, INIT) == (1, 1, 2, 3, 4)
    assert (hashing.ROW, hashing.COLUMN, hashing.PROTOTYPE, hashing.SCORE) == (5, 6, 7, 8)


@pytest.mark.parametrize(
    ("h", "mixed"),
    [
        (0, 0),
        (1, 0x688990C0),
        (2, 0xD1132181),
        (0x7FFFFFFF, 0x8D29FFB8),
        (0x80000000, 0xCC4B4124),
        (0xDEADBEEF, 0xE628C683),
        (0xFFFFFFFF, 0x6768824A),
    ],
)
def test_golden_mix32(h, mixed):
    assert slow_mix(h) == mixed
    assert unsigned(mix32(torch.tensor([h]).to(torch.int32))) == [mixed]


@pytest.mark.parametrize(
    ("seed", "labels", "key"),
    [
        (0, (), 0x5E41AB08),
        (0, (0,), 0xB18A02F4),
        (0, (1, 0), 0x91DF2B16),
        (1, (1, 0), 0x3EA0A763),
        (0, (2, 0), 0x8B39551B),
        (0, (1, 1), 0x81EC3875),
        (4294967296, (1, 0), 0xE63B57F4),
        (18446744073709551615, (3, 4294967295, 7), 0x56FF54FC),
    ],
)
def test_golden_derive_key(seed, labels, key):
    assert derive_key(seed, *labels) == key


@pytest.mark.parametrize(
    ("first", "seed", "labels", "words"),
    [
        (0, 0, (2, 0), [0x6D694BC9, 0x594C3981, 0x312A0913, 0x0B75DCA2]),
        (4294967294, 7, (2, 3), [0xA8C5102F, 0xEEA804F9, 0x6891B951, 0x1CE600D9]),
        (1099511627781, 9223372036854775817, (3, 1), [0x2EAB27F1, 0x62DE7058, 0x13D5CAF5]),
    ],
)
def test_golden_random_words(first, seed, labels, words):
    counters = torch.arange(first, first + len(words))
    assert unsigned(random_words(first, len(words), seed, *labels)) == words
    assert unsigned(words_at(counters, seed, *labels)) == words


@pytest.mark.parametrize(
    ("seed", "labels", "values"),
    [
        (0, (4,), ["0x1.3018755123796p+0", "-0x1.f805525b50d4ap-2", "0x1.0756db51435bap-1", "-0x1.6525a7765bf76p-2"]),
        (
            18446744073709551615,
            (4, 5),
            ["-0x1.7590fa822dd35p-2", "0x1.742b5a613f79ep-2", "-0x1.2d29b08dc2643p-1", "0x1.185a0caa30ca4p-1"],
        ),
    ],
)
def test_golden_near_normal(seed, labels, values):
    assert [x.hex() for x in near_normal(len(values), seed, *labels).tolist()] == values


@pytest.mark.parametrize(
    ("count", "seed", "images"),
    [
        (1, 0, [0]),
        (2, 0, [0, 1]),
        (3, 1, [2, 0, 1]),
        (5, 2, [1, 2, 0, 4, 3]),
        (10, 3, [2, 0, 3, 9, 7, 1, 6, 8, 4, 5]),
        (16, 0, [1, 4, 13, 7, 10, 6, 15, 11, 8, 2, 0, 14, 5, 3, 9, 12]),
    ],
)
def test_golden_permutation(count, seed, images):
    assert Bijection.keyed(count, seed, PERMUTE, 0)(torch.arange(count)).tolist() == images


@pytest.mark.parametrize(
    ("count", "seed", "factors", "images"),
    [
        (1009, 0, (23, 44), [742, 545, 741, 959, 25]),
        (16383, 1, (127, 129), [981, 13815, 9326, 8890, 1832]),
        (16384, 1, (128, 128), [9752, 1789, 10384, 2967, 2777]),
        (131071, 2, (256, 512), [44096, 86261, 57986, 113879, 36162]),
        (2147483659, 3, (40345, 53228), [592231235, 904903392, 1772548654, 1727917008, 385278905]),
        (68719476731, 4, (262142, 262146), [6106048868, 67965522300, 67570227872, 64263637956, 21951731059]),
        (1000000000039, 5, (702920, 1422637), [571198560978, 277733661851, 317107334052, 68666290798, 679946835172]),
    ],
)
def test_golden_images(count, seed, factors, images):
    found = Bijection.keyed(count, seed, PERMUTE, 1)
    assert found.factors == factors
    assert found(torch.tensor([0, 1, 2, count // 2, count - 1])).tolist() == images


def test_golden_images_for_given_keys():
    assert Bijection(100, (1, 2, 3, 4, 5, 6))(torch.arange(5)).tolist() == [0, 57, 92, 42, 5]


# Against the slow definition.


@EXAMPLES
@given(st.lists(st.integers(0, MASK), min_size=1, max_size=50))
def test_mix32_is_its_definition(values):
    signed = torch.tensor(values).to(torch.int32)
    assert unsigned(mix32(signed)) == [slow_mix(h) for h in values]


@EXAMPLES
@given(*(st.lists(st.integers(0, MASK), min_size=1, max_size=9) for _ in range(2)))
def test_crossed_words_mix_the_sums(rows, columns):
    found = crossed_words(*(torch.tensor(words).to(torch.int32) for words in (rows, columns)))
    assert [unsigned(line) for line in found] == [[slow_mix(row + column & MASK) for row in rows] for column in columns]


@EXAMPLES
@given(SEEDS, LABELS)
def test_derive_key_is_its_definition(seed, labels):
    assert derive_key(seed, *labels) == slow_key(seed, *labels)


@EXAMPLES
@given(st.lists(st.integers(0, (1 << 48) - 1), min_size=1, max_size=20), SEEDS, LABELS)
def test_words_at_is_its_definition(counters, seed, labels):
    assert unsigned(words_at(torch.tensor(counters), seed, *labels)) == [slow_word(i, seed, *labels) for i in counters]


@EXAMPLES
@given(st.integers(0, 1 << 40), st.integers(0, 20), SEEDS)
def test_random_words_are_the_words_at_their_counters(first, count, seed):
    assert unsigned(random_words(first, count, seed, SIGN)) == [
        slow_word(i, seed, SIGN) for i in range(first, first + count)
    ]


@EXAMPLES
@given(st.integers(1, 30), SEEDS, LABELS)
def test_near_normal_is_the_sum_of_eight_uniforms(count, seed, labels):
    expected = []
    for i in range(count):
        words = [slow_word(4 * i + j, seed, *labels) for j in range(4)]
        total = sum(word % 65536 + word // 65536 for word in words)
        expected.append((total - 4 * 65535) / math.sqrt(8 * (65536**2 - 1) / 12))
    assert near_normal(count, seed, *labels).tolist() == expected


@EXAMPLES
@given(st.integers(1, 1 << 20), SEEDS, LABELS, st.data())
def test_bijection_is_its_definition(count, seed, labels, data):
    slow = SlowBijection.keyed(count, seed, *labels)
    drawn = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=10))
    points = [0, count - 1, *drawn, *slow.walkers()]
    found = Bijection.keyed(count, seed, *labels)
    assert found.factors == slow.factors
    assert found(torch.tensor(points)).tolist() == [slow(x) for x in points]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [(1 << 31) + 11, (1 << 33) - 9, (1 << 40) - 87])
def test_huge_bijection_is_its_definition(count, seed):
    slow = SlowBijection.keyed(count, seed, PERMUTE)
    points = [0, count - 1, *slow.walkers(), *torch.randint(count, (10,), generator=fixed(seed)).tolist()]
    found = Bijection.keyed(count, seed, PERMUTE)(torch.tensor(points)).tolist()
    assert len(slow.walkers()) > 0
    assert found == [slow(x) for x in points]


# The bijection is one, for every count.


def assert_bijective(bijection: Bijection) -> None:
    everything = torch.arange(bijection.count)
    images = bijection(everything)
    assert torch.equal(images.sort().values, everything)
    assert torch.equal(bijection.inverse(images), everything)
    assert torch.equal(bijection(bijection.inverse(everything)), everything)


@pytest.mark.parametrize("counts", [range(first, first + 100) for first in range(1, 601, 100)], ids=str)
def test_every_small_count_is_permuted(counts):
    for count in counts:
        for seed in range(3):
            assert_bijective(Bijection.keyed(count, seed, PERMUTE, 0))


def test_a_cycle_that_lies_among_the_holes_is_never_walked():
    """Five elements on Z_2 x Z_3, where seed 0 maps the one hole to itself."""
    assert SlowBijection.keyed(5, 0, PERMUTE, 0).step(5) == 5
    for count in range(4, 40):
        for seed in range(20):
            assert_bijective(Bijection.keyed(count, seed, PERMUTE, 0))


@EXAMPLES
@given(st.integers(1, 200_000), SEEDS)
def test_every_count_is_permuted(count, seed):
    assert_bijective(Bijection.keyed(count, seed, PERMUTE))


@settings(EXAMPLES, max_examples=40)
@given(st.integers((1 << 31) + 1, 1 << 40), SEEDS)
def test_huge_counts_are_permuted(count, seed):
    bijection = Bijection.keyed(count, seed, PERMUTE)
    drawn = torch.randint(count, (2000,), generator=fixed(seed % (1 << 63)))
    points = torch.cat([torch.tensor([0, 1, count - 2, count - 1]), drawn]).unique()
    images = bijection(points)
    assert 0 <= images.min() <= images.max() < count
    assert len(images.unique()) == len(points)
    assert torch.equal(bijection.inverse(images), points)
    assert torch.equal(bijection(bijection.inverse(points)), points)


def check_factors(count: int) -> int:
    """The excess a*b - count, after what must hold of the factors."""
    a, b = Bijection(count, ()).factors
    assert count <= a * b
    assert a <= b
    assert a >= (2 if count >= 4 else 1)
    assert math.isqrt(count) <= 2 * a <= 2 * math.isqrt(count) or count < 4
    return a * b - count


def test_the_least_excess_is_small():
    excesses = [check_factors(count) for count in range(1, 20_001)]
    assert max(excesses) == 11
    assert sum(excesses) / len(excesses) < 2


@EXAMPLES
@given(st.integers(1, 1 << 40))
def test_the_least_excess_stays_small(count):
    assert check_factors(count) < 32  # 26 is the most among the first million counts (at 960,535)


@EXAMPLES
@given(st.integers(1, 1 << 24), st.integers(1, 50))
def test_the_factors_do_not_depend_on_the_searchs_chunks(count, chunk):
    assert hashing._factors(count, chunk) == SlowBijection(count, ()).factors


# The same bits however they are evaluated.


def evaluations() -> dict[str, Callable[[Tensor], Tensor]]:
    bijection = Bijection.keyed(200_003, 9, PERMUTE)
    return {
        "words": lambda x: words_at(x, 9, SIGN, 2),
        "forward": bijection,
        "inverse": bijection.inverse,
        "near_normal": lambda x: near_normal(len(x), 9, INIT),
    }


@pytest.mark.parametrize("name", evaluations())
def test_threads_change_nothing(name):
    evaluate, points = evaluations()[name], torch.arange(200_003)
    with threads(1):
        alone = evaluate(points)
    with threads(2):
        assert torch.equal(evaluate(points), alone)


@pytest.mark.parametrize("name", ["words", "forward", "inverse"])
def test_pieces_and_shapes_change_nothing(name):
    evaluate, points = evaluations()[name], torch.arange(200_002)
    whole = evaluate(points)
    assert torch.equal(torch.cat([evaluate(piece) for piece in points.split(7_919)]), whole)
    assert torch.equal(evaluate(points.view(-1, 2).t()), whole.view(-1, 2).t())
    assert torch.equal(evaluate(points.flip(0)), whole.flip(0))


def test_near_normal_does_not_depend_on_its_chunks_or_length():
    whole = near_normal(1000, 3, INIT)
    assert torch.equal(near_normal(1000, 3, INIT, chunk=7), whole)
    assert torch.equal(near_normal(10, 3, INIT), whole[:10])


# Statistics of a permutation: z values, near N(0, 1) for a random one. They can fail: see the affine map.


def chi_square_z(counts: Tensor, expected: float, dof: int) -> float:
    found = (counts.double() - expected).square().sum().item() / expected
    return (found - dof) / math.sqrt(2 * dof)


def usage_spread(images: Tensor, ring: int) -> int:
    """How many times more the most used cell of a ring is used than the least used one."""
    used = torch.bincount(images % ring, minlength=ring)
    return int(used.max() - used.min())


def position_image_z(images: Tensor) -> float:
    """Whether stretches of positions prefer stretches of images."""
    n = len(images)
    bins = min(64, math.isqrt(n // 16))
    where = torch.arange(n) * bins // n * bins + images * bins // n
    return chi_square_z(torch.bincount(where, minlength=bins**2), n / bins**2, (bins - 1) ** 2)


def residue_z(images: Tensor, columns: int = 48, cells: int = 32) -> float:
    """Whether columns of a matrix prefer cells of a small ring."""
    where = torch.arange(len(images)) % columns * cells + images % cells
    return chi_square_z(torch.bincount(where, minlength=columns * cells), len(images) / columns / cells, 47 * 31)


def lag_correlation_z(images: Tensor, lag: int) -> float:
    """Correlation between the images of x and x + lag."""
    f = images.double() - (len(images) - 1) / 2
    product = (f[lag:] * f[:-lag]).mean() / f.square().mean()
    return product.item() * math.sqrt(len(images) - lag)


def lag_difference_z(images: Tensor, lag: int, bins: int = 128) -> float:
    """Whether the images of x and x + lag prefer some distances."""
    n = len(images)
    distances = (images[lag:] - images[:-lag]) % n
    return chi_square_z(torch.bincount(distances * bins // n, minlength=bins), len(distances) / bins, bins - 1)


def repeated_pairs_z(images: Tensor, lag: int) -> float:
    """How often the cells of x and x + lag are those of another pair too: birthdays in ten times n days."""
    n = len(images)
    ring = math.isqrt(10 * n)
    cells = images % ring
    times = torch.bincount(cells[lag:] * ring + cells[:-lag])
    repeats = (times * (times - 1)).sum().item() / 2
    alike = (n / ring - 1) / (n - 1)  # that two given positions have the same cell
    expected = (n - lag) * (n - lag - 1) / 2 * alike**2
    return (repeats - expected) / math.sqrt(expected)


def lags(bijection: Bijection) -> list[int]:
    """Neighbours, strides of common layers, and the network's own factors."""
    a, b = bijection.factors
    wanted = {1, 2, 3, 9, 32, 64, 576, 4608, a - 1, a, b, b + 1, 2 * b, a // 2 * b}
    return sorted(lag for lag in wanted if lag < bijection.count * 3 // 4)


LAG_STATISTICS = (lag_correlation_z, lag_difference_z, repeated_pairs_z)
EVEN, ODD, PRIME = 73_728, 177_147, 131_071  # the first: blocks of a 512-channel convolution
FEW_EVEN, FEW_ODD, FEW_PRIME = 16_384, 6_561, 8_191  # the first: the fewest with six rounds
COUNTS = [EVEN, ODD, PRIME, FEW_EVEN, FEW_ODD, FEW_PRIME]


def affine(n: int) -> Tensor:
    """The map x -> (A x + c) mod n with A near the golden ratio of n: a bijection, and a poor one."""
    slope = next(a for a in range(int(n * 0.6180339887), n) if math.gcd(a, n) == 1)
    return (torch.arange(n) * slope + n // 3) % n


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("ring", [7, 64, 1000, 1019, 4608])
def test_cells_are_used_evenly(count, ring):
    images = Bijection.keyed(count, 0, PERMUTE)(torch.arange(count))
    assert usage_spread(images, ring) == (1 if count % ring else 0)


@pytest.mark.parametrize("seed", [0, 1, 12345, (1 << 64) - 1])
@pytest.mark.parametrize("count", COUNTS)
def test_positions_tell_nothing_of_images(count, seed):
    images = Bijection.keyed(count, seed, PERMUTE)(torch.arange(count))
    assert abs(position_image_z(images)) < 4
    assert abs(residue_z(images)) < 4


@pytest.mark.parametrize("statistic", LAG_STATISTICS)
@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("count", COUNTS)
def test_neighbours_tell_nothing_of_images(count, seed, statistic):
    bijection = Bijection.keyed(count, seed, PERMUTE)
    images = bijection(torch.arange(count))
    assert max(abs(statistic(images, lag)) for lag in lags(bijection)) < 5


@pytest.mark.parametrize("statistic", LAG_STATISTICS)
@pytest.mark.parametrize("count", COUNTS)
def test_the_statistics_accept_a_random_permutation(count, statistic):
    images = torch.randperm(count, generator=fixed(count))
    assert max(abs(statistic(images, lag)) for lag in lags(Bijection(count, ()))) < 5


@pytest.mark.parametrize("statistic", LAG_STATISTICS)
@pytest.mark.parametrize("count", COUNTS)
def test_the_statistics_reject_an_affine_map(count, statistic):
    images = affine(count)
    assert usage_spread(images, count) == 0  # a bijection, as ours
    assert abs(position_image_z(images)) > 10
    assert all(abs(statistic(images, lag)) > 10 for lag in (1, 9, 64))


@pytest.mark.parametrize("statistic", LAG_STATISTICS)
def test_the_statistics_reject_two_rounds(statistic):
    weak = Bijection(PRIME, Bijection.keyed(PRIME, 0, PERMUTE).keys[:2])
    images = weak(torch.arange(PRIME))
    assert max(abs(statistic(images, lag)) for lag in lags(weak)) > 10


def test_the_distances_reject_four_rounds():
    weak = Bijection(PRIME, Bijection.keyed(PRIME, 0, PERMUTE).keys[:4])
    images = weak(torch.arange(PRIME))
    assert max(abs(lag_difference_z(images, lag)) for lag in lags(weak)) > 10


@pytest.mark.parametrize("count", [4, 5, 7, 12, 100])
def test_few_elements_go_everywhere(count):
    """Over many seeds every element has every image equally often."""
    everything, seeds = torch.arange(count), 1000
    images = torch.stack([Bijection.keyed(count, seed, PERMUTE)(everything) for seed in range(seeds)])
    times = torch.bincount((everything * count + images).view(-1), minlength=count**2)
    excess = (times - seeds / count).square().sum().item() * (count - 1) / seeds  # rows and columns sum to `seeds`
    assert abs(excess - (count - 1) ** 2) < 4 * math.sqrt(2) * (count - 1)


@pytest.mark.parametrize("other", [(1, PERMUTE, 0), (1 << 32, PERMUTE, 0), (0, PERMUTE, 1), (0, SIGN, 0)])
def test_other_labels_give_an_unrelated_permutation(other):
    x = torch.arange(PRIME)
    one, two = Bijection.keyed(PRIME, 0, PERMUTE, 0)(x), Bijection.keyed(PRIME, *other)(x)
    f, g = (images.double() - (PRIME - 1) / 2 for images in (one, two))
    assert abs((f * g).mean() / f.square().mean()).item() * math.sqrt(PRIME) < 4
    assert int((one == two).sum()) <= 6  # Poisson of mean 1


# Statistics of streams of words and of the values made from them.


def signs(words: Tensor) -> Tensor:
    """32 signs a word, as float64."""
    return 1 - 2 * (words[:, None] >> torch.arange(32, dtype=torch.int32) & 1).double()


def correlation_z(a: Tensor, b: Tensor) -> float:
    """Of two sequences of signs, or of values of unit variance."""
    return (a * b).mean().item() * math.sqrt(a.numel())


def serial_z(values: Tensor) -> float:
    strides = (1, 2, 3, 8, 31, 32, 33, 64, 576, 4608, 32768)
    return max(abs(correlation_z(values[lag:], values[:-lag])) for lag in strides)


def sign_words(seed: int, tensor: int) -> Tensor:
    return random_words(0, 1 << 14, seed, SIGN, tensor)


STREAMS: Sequence[tuple[int, int]] = [(0, 0), (0, 1), (0, 2), (1, 0), (1 << 32, 0), (12345, 7), ((1 << 64) - 1, 0)]


@pytest.mark.parametrize(("seed", "tensor"), STREAMS)
def test_signs_are_balanced_and_serially_independent(seed, tensor):
    found = signs(sign_words(seed, tensor))
    lanes = found.mean(0) * math.sqrt(len(found))
    words = found.sum(1) / math.sqrt(32)
    assert abs(found.mean().item()) * math.sqrt(found.numel()) < 4
    assert lanes.abs().max() < 4
    assert abs(words.square().mean().item() - 1) * math.sqrt(len(found) / 2) < 4  # signs within a word
    assert serial_z(found.view(-1)) < 4.5


def test_streams_are_independent():
    found = [signs(sign_words(seed, tensor)).view(-1) for seed, tensor in STREAMS]
    pairs = [abs(correlation_z(a, b)) for i, a in enumerate(found) for b in found[:i]]
    assert max(pairs) < 4


def test_the_sign_statistics_reject_a_weyl_sequence():
    words = (torch.arange(1 << 14) * 0x9E3779B1).to(torch.int32)
    assert serial_z(signs(words).view(-1)) > 10


def test_near_normal_values_are_independent_and_of_unit_variance():
    n = 1 << 18
    values = near_normal(n, 0, INIT)
    kurtosis = values.pow(4).mean().item()
    assert abs(values.mean().item()) * math.sqrt(n) < 4
    assert abs(values.square().mean().item() - 1) * math.sqrt(n / 1.85) < 4
    assert abs(kurtosis - 2.85) < 0.04  # of eight uniforms: 3 - 1.2 / 8
    assert values.abs().max() < math.sqrt(24)
    assert serial_z(values) < 4
    assert abs(correlation_z(values, near_normal(n, 1, INIT))) < 4
