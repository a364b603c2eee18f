"""The two estimates that a sweep makes of noisy runs: a power law of the error, and the gap between dense and small models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, variance
from typing import NamedTuple

import numpy as np


class PowerLaw(NamedTuple):
    """error = a * DoF^-b, the error in percent.

    `low` and `high` hold b with 95% confidence; None where only two sizes could be used. `unused` are sizes without errors,
    whose logarithm does not exist.
    """

    a: float
    b: float
    low: float | None
    high: float | None
    unused: tuple[int | float, ...]


class Gap(NamedTuple):
    """Mean accuracy of the dense model minus that of a small one, in percentage points.

    Each of `low` and `high` bounds the true gap with 95% confidence; infinite where one of the two has a single run.
    """

    points: float
    low: float
    high: float


def power_law(errors: Mapping[int | float, float]) -> PowerLaw | None:
    """Fit size -> mean error over seeds, in percent, by least squares on logarithms; None for less than two sizes.

    The interval of b is the regression's own, Student's t with (sizes - 2) degrees of freedom. It is of the means of the
    sizes and not of single runs, so that it also holds what a straight line does not explain, not only the noise of seeds.
    """
    from scipy.special import stdtrit

    used = {dof: error for dof, error in errors.items() if error > 0}
    if len(used) < 2:
        return None
    x, y = np.log(list(used)), np.log(list(used.values()))
    slope, offset = map(float, np.polyfit(x, y, 1))
    unused, free = tuple(dof for dof in errors if dof not in used), len(used) - 2
    if not free:
        return PowerLaw(math.exp(offset), -slope, None, None, unused)
    rest = float(((y - offset - slope * x) ** 2).sum())
    half = float(stdtrit(free, 0.975)) * math.sqrt(rest / free / float(((x - x.mean()) ** 2).sum()))
    return PowerLaw(math.exp(offset), -slope, -slope - half, -slope + half, unused)


def gap(dense: Sequence[float], small: Sequence[float]) -> Gap:
    """The gap between runs' accuracies in percent; its bounds are Welch's (unequal variances, one-sided, 95% each)."""
    from scipy.special import stdtrit

    points = round(fmean(dense) - fmean(small), 9)  # 95 - 94 is not to be more than 1
    if min(len(dense), len(small)) < 2:
        return Gap(points, -math.inf, math.inf)
    parts = [(variance(runs) / len(runs), len(runs) - 1) for runs in (dense, small)]
    total = sum(part for part, _ in parts)
    if total < 1e-18:  # they differ by rounding, if at all
        return Gap(points, points, points)
    free = total**2 / sum(part**2 / n for part, n in parts)
    half = float(stdtrit(free, 0.95)) * math.sqrt(total)
    return Gap(points, points - half, points + half)
