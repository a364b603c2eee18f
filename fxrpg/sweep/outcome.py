"""What a sweep's runs say together: each size against the dense model, the power law, and which size to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from fxrpg.sweep.law import Gap, PowerLaw, gap, power_law
from fxrpg.sweep.results import Row

Verdict = Literal["yes", "no", "open"]


@dataclass(frozen=True, kw_only=True)
class Size:
    """All runs of one size, or of the dense model (`dof` None, no gap). Accuracies in percent."""

    dof: int | float | None
    accuracies: tuple[float, ...]
    seconds: float
    gap: Gap | None
    within: Verdict | None
    """Whether the gap is at most what was asked for: sure (95%), surely not, or open."""

    @property
    def mean(self) -> float:
        return fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def name(self) -> str:
        return "dense" if self.dof is None else shown(self.dof)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The recommendation: the size, if there is one, and what is known about it in plain words."""

    dof: int | float | None
    certain: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything that table, picture and report show."""

    dense: Size | None
    sizes: tuple[Size, ...]
    law: PowerLaw | None
    advice: Advice
    within: float

    @property
    def all(self) -> list[Size]:
        return [*([self.dense] if self.dense else []), *self.sizes]


def shown(dof: int | float) -> str:
    """A size as people read it: 16,384, 0.01 or 1.0 (all of them)."""
    return f"{dof:,}" if isinstance(dof, int) else repr(dof)


def points(number: float) -> str:
    """Percentage points in words."""
    return f"{number:g} point{'' if number == 1 else 's'}"


def outcome(rows: Sequence[Row], within: float) -> Outcome:
    """Judge one or more rows; `within` is in percentage points."""
    groups: dict[int | float | None, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.dof or 0, row.seed)):
        groups.setdefault(row.dof, []).append(row)
    dense = _size(groups.pop(None), None, within) if None in groups else None
    sizes = tuple(_size(group, dense, within) for group in groups.values())
    law = power_law({size.dof: 100 - size.mean for size in sizes if size.dof is not None})
    return Outcome(dense=dense, sizes=sizes, law=law, advice=advise(dense, sizes, within), within=within)


def _size(rows: Sequence[Row], dense: Size | None, within: float) -> Size:
    accuracies = tuple(100 * row.accuracy for row in rows)
    found = gap(dense.accuracies, accuracies) if dense else None
    verdict: Verdict | None = None
    if found:
        verdict = "yes" if found.high <= within else "no" if found.low > within else "open"
    seconds = fmean(row.seconds for row in rows)
    return Size(dof=rows[0].dof, accuracies=accuracies, seconds=seconds, gap=found, within=verdict)


def advise(dense: Size | None, sizes: Sequence[Size], within: float) -> Advice:
    """The smallest size that is surely within `within` points of dense, and what noise leaves open; or why there is none."""
    if dense is None or not sizes:
        missing = "dense baseline" if dense is None else "small model"
        return Advice(dof=None, certain=False, text=f"No recommendation: there is no {missing} to compare with.")
    near, seeds = f"within {points(within)} of dense", _seeds(dense, sizes)
    sure = next((size for size in sizes if size.within == "yes"), None)
    before = sizes if sure is None else sizes[: sizes.index(sure)]
    left = [size for size in before if size.within == "open"]
    if sure:
        text = f"DoF {sure.name} is the smallest size that is surely {near}: {_measured(sure)}."
        if left:
            text += f" The noise of {seeds} leaves open whether {_names(left)} {'is' if len(left) == 1 else 'are'} too."
    elif left:
        means = [size for size in left if size.gap and size.gap.points <= within]
        by_means = f"the smallest is DoF {means[0].name}: {_measured(means[0])}" if means else "none is"
        text = f"The noise of {seeds} does not allow to say which size is {near}. By the means alone, {by_means}."
        text += f" Open: {_names(left)}. More seeds would tell."
    else:
        best = max(sizes, key=lambda size: size.mean)
        text = f"No size is {near}. DoF {best.name} comes nearest: {_measured(best)}."
        text += " Try larger sizes or another method."
    if all(size.std == 0 for size in (dense, *sizes)):
        text += " Each size gave the same accuracy with all seeds: does the script use --seed?"
    return Advice(dof=sure.dof if sure else None, certain=bool(sure) or not left, text=text)


def _names(sizes: Sequence[Size]) -> str:
    *first, last = (f"DoF {size.name}" for size in sizes)
    return f"{', '.join(first)} and {last}" if first else last


def _seeds(dense: Size, sizes: Sequence[Size]) -> str:
    fewest = min(len(size.accuracies) for size in (dense, *sizes))
    return "a single seed" if fewest == 1 else f"{fewest} seeds"


def _measured(size: Size) -> str:
    assert size.gap is not None
    text = f"{abs(size.gap.points):.2f} points {'below' if size.gap.points >= 0 else 'above'} dense"
    if size.within == "yes":
        most = f"at most {size.gap.high:.2f} below" if size.gap.high >= 0.005 else "not below it"
        text += f" in the mean, and with 95% confidence {most}"
    if size.within == "no":
        text += f" in the mean, and with 95% confidence at least {size.gap.low:.2f} below"
    return text


def law_text(law: PowerLaw) -> str:
    """The law in one line."""
    sure = "no interval from two sizes" if law.low is None else f"95% interval {law.low:.3f} to {law.high:.3f}"
    unused = f"; without {', '.join(map(shown, law.unused))}, which made no error" if law.unused else ""
    return f"error = {law.a:.3g}% * DoF^{-law.b:+.3f} (exponent b = {law.b:.3f}, {sure}{unused})"
