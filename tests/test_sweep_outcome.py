"""A sweep's statistics on made-up runs: the law and its interval, the gap and its bounds, and what is recommended."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fxrpg.sweep.law import Gap, gap, power_law
from fxrpg.sweep.outcome import Outcome, law_text, outcome
from fxrpg.sweep.results import Row

SIZES = st.lists(st.integers(1, 10**7), min_size=3, max_size=8, unique=True)


@given(sizes=SIZES, a=st.floats(0.1, 100), b=st.floats(-0.5, 1.5))
def test_an_exact_law_is_recovered(sizes, a, b):
    law = power_law({dof: a * dof**-b for dof in sizes})
    assert law is not None
    assert law.b == pytest.approx(b, abs=1e-6)
    assert law.a == pytest.approx(a, rel=1e-4)
    assert law.low == pytest.approx(b, abs=1e-4)
    assert law.high == pytest.approx(b, abs=1e-4)


@given(sizes=SIZES, noise=st.lists(st.floats(-1, 1), min_size=8, max_size=8))
def test_the_law_is_the_library_s_regression(sizes, noise):
    errors = {dof: 40 * dof**-0.3 * math.exp(e) for dof, e in zip(sizes, noise, strict=False)}
    law = power_law(errors)
    expected = stats.linregress(np.log(list(errors)), np.log(list(errors.values())))
    half = stats.t.ppf(0.975, len(errors) - 2) * expected.stderr
    assert law is not None
    assert law.b == pytest.approx(-expected.slope, abs=1e-8)
    assert law.low == pytest.approx(-expected.slope - half, abs=1e-6)
    assert law.high == pytest.approx(-expected.slope + half, abs=1e-6)


def test_the_interval_holds_the_exponent_in_19_of_20_sweeps():
    draw = np.random.default_rng(0)
    sizes = [2**power for power in range(8, 17, 2)]
    laws = [power_law({dof: 40 * dof**-0.3 * math.exp(draw.normal(0, 0.1)) for dof in sizes}) for _ in range(1000)]
    held = sum(law.low <= 0.3 <= law.high for law in laws)
    assert 930 <= held <= 970


def test_the_law_of_few_sizes():
    assert power_law({}) is None
    assert power_law({10: 3.0}) is None
    assert power_law({10: 3.0, 100: 0.0}) is None, "zero has no logarithm"
    law = power_law({10: 4.0, 1000: 0.04, 4000: 0.0})
    assert law is not None
    assert law[:4] == (pytest.approx(40), pytest.approx(1), None, None)
    assert law_text(law) == (
        "error = 40% * DoF^-1.000 (exponent b = 1.000, no interval from two sizes; without 4,000, which made no error)"
    )


RUNS = st.lists(st.integers(0, 1000).map(lambda n: n / 10), min_size=2, max_size=6).filter(
    lambda runs: len(set(runs)) > 1
)


@given(RUNS, RUNS)
def test_the_gap_is_welch_s(dense, small):
    found = gap(dense, small)
    expected = stats.ttest_ind(dense, small, equal_var=False).confidence_interval(0.90)
    assert found.low == pytest.approx(expected.low, rel=1e-6, abs=1e-6)
    assert found.high == pytest.approx(expected.high, rel=1e-6, abs=1e-6)


@given(st.floats(0, 100), st.floats(0, 1e-10))
def test_differences_by_rounding_are_none(accuracy, rounding):
    found = gap([accuracy, accuracy + rounding], [accuracy - rounding, accuracy])
    assert found.low == found.high == pytest.approx(0, abs=1e-8)


def test_the_gap_without_spread_or_with_a_single_run():
    assert gap([95, 95], [94, 94]) == Gap(1, 1, 1)
    assert gap([95], [94, 93]) == Gap(1.5, -math.inf, math.inf)


def judged(within: float, dense: tuple[float, ...], **sizes: tuple[float, ...]) -> Outcome:
    """The outcome of runs given by accuracy in percent; sizes by name, such as d100."""
    other = {"task": "t", "method": "", "seconds": 1.0, "arguments": "[]", "code": "c", "threads": 1}
    other |= {"fxrpg": "1", "torch": "2", "python": "3", "finished": "2026-01-01T00:00:00+00:00"}
    runs = {None: dense} | {int(name[1:]): found for name, found in sizes.items()}
    rows = [
        Row(**other, dof=dof, seed=seed, accuracy=accuracy / 100)  # type: ignore[arg-type]
        for dof, found in runs.items()
        for seed, accuracy in enumerate(found)
    ]
    return outcome(rows[::-1], within)


def verdicts(found: Outcome) -> str:
    return " ".join(str(size.within) for size in found.sizes)


def test_the_smallest_size_that_is_surely_within():
    found = judged(1, (98, 98.2, 97.8), d10=(90, 90.5, 89.5), d100=(97.8, 97.9, 97.7), d1000=(98.3, 98.2, 98.1))
    assert verdicts(found) == "no yes yes"
    assert found.advice.dof == 100
    assert found.advice.text == (
        "DoF 100 is the smallest size that is surely within 1 point of dense: 0.20 points below dense in the mean, "
        "and with 95% confidence at most 0.51 below."
    )


def test_noise_that_leaves_smaller_sizes_open():
    found = judged(
        2, (98, 98.2, 97.8), d10=(90, 90.5, 89.5), d100=(99, 96, 95), d200=(94, 97, 99.5), d1000=(98.9, 98.9, 98.9)
    )
    assert verdicts(found) == "no open open yes"
    assert found.advice.dof == 1000
    assert "with 95% confidence not below it" in found.advice.text
    assert found.advice.text.endswith("The noise of 3 seeds leaves open whether DoF 100 and DoF 200 are too.")


def test_noise_that_does_not_allow_to_say():
    found = judged(1, (98, 98.2, 97.8), d10=(90, 90.5, 89.5), d100=(99, 97, 97.4), d1000=(99.5, 98, 96))
    assert verdicts(found) == "no open open"
    assert (found.advice.dof, found.advice.certain) == (None, False)
    assert found.advice.text.startswith(
        "The noise of 3 seeds does not allow to say which size is within 1 point of dense."
    )
    assert "the smallest is DoF 100: 0.20 points below dense. Open: DoF 100 and DoF 1,000." in found.advice.text


def test_open_sizes_of_which_none_is_within_by_the_means():
    found = judged(0.5, (98, 98.2, 97.8), d100=(99, 96, 96))
    assert verdicts(found) == "open"
    assert "By the means alone, none is. Open: DoF 100." in found.advice.text


def test_a_single_seed_says_nothing_of_noise():
    found = judged(1, (98,), d100=(98,), d1000=(10,))
    assert verdicts(found) == "open open"
    assert found.advice.text.startswith("The noise of a single seed does not allow to say")


def test_none_is_within():
    found = judged(0.5, (98, 98.2, 97.8), d10=(90, 90.5, 89.5), d100=(91, 91.5, 91.5))
    assert (found.advice.dof, found.advice.certain) == (None, True)
    assert found.advice.text.startswith(
        "No size is within 0.5 points of dense. DoF 100 comes nearest: 6.67 points below"
    )


def test_seeds_that_change_nothing_are_noted():
    found = judged(1, (98, 98), d10=(97, 97), d100=(90, 90))
    assert verdicts(found) == "yes no"
    assert found.advice.text.endswith("Each size gave the same accuracy with all seeds: does the script use --seed?")
    assert "--seed" not in judged(1, (98, 98), d10=(97, 97.5)).advice.text


def test_nothing_to_compare_with():
    assert "no dense baseline" in judged(1, (), d10=(90, 91)).advice.text
    assert "no small model" in judged(1, (90, 91)).advice.text


@given(st.floats(0.1, 5), st.integers(2, 6), st.integers(0, 10**6))
def test_a_recommended_size_is_surely_within_and_no_smaller_one_is(within, seeds, number):
    draw = np.random.default_rng(number)
    accuracies = [tuple(draw.normal(mean, 0.5, seeds).clip(0, 100)) for mean in (98, 92, 96, 97.5, 98)]
    found = judged(within, **dict(zip(("dense", "d10", "d100", "d1000", "d10000"), accuracies, strict=True)))
    sure = [size.dof for size in found.sizes if size.gap is not None and size.gap.high <= within]
    assert found.advice.dof == (sure[0] if sure else None)
    for size in found.sizes:
        assert size.gap is not None
        assert size.gap.low <= size.gap.points <= size.gap.high
