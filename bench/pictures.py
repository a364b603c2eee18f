"""What a table of the bench looks like: the roofline, and every time over its baseline's."""

from __future__ import annotations

import importlib.util
import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, str]
Style = dict[str, Any]

MOST_LINES = 40
"""Names that a picture has room for; more cases are shown as medians of groups."""
MARKERS = "os^DvPX<>*p"
"""One more than there are colours, so that no two of the first hundred contestants look the same."""
COLORS = 10


def plots(rows: Sequence[Row], folder: Path, machine: str) -> list[Path]:
    """Write the roofline and the ratios as pictures. Returns their paths; none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    timed = [row for row in rows if row["milliseconds"]]
    measured = [row for row in timed if not row["case"].startswith("ceiling/")]
    names = dict.fromkeys(row["contestant"] for row in measured)
    styles: dict[str, Style] = {  # the same in both pictures
        name: {"marker": MARKERS[i % len(MARKERS)], "color": f"C{i % COLORS}"} for i, name in enumerate(names)
    }
    title = _title(measured, machine)
    paths = [folder / f"{machine}-roofline.png", folder / f"{machine}-ratios.png"]
    _plot_roofline(measured, _roofs(timed, measured), paths[0], title, styles)
    _plot_ratios([row for row in measured if row["ratio"]], paths[1], title, styles)
    return paths


def _title(rows: Sequence[Row], machine: str) -> str:
    """Where, in which types and when: "cpu-amd-epyc, float32, 2026-01-31"."""
    dates = sorted({row["date"] for row in rows})
    when = " to ".join(dict.fromkeys([*dates[:1], *dates[-1:]]))
    types = " and ".join(sorted({row["dtype"] for row in rows}))
    return ", ".join(part for part in (machine, types, when) if part)


def _figure(height: float) -> Any:
    """A figure without a screen: pyplot is not needed, and its backend not touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(figure: Any, path: Path) -> None:
    """Save with the legend beside the axes, where it covers no point."""
    figure.legend(loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=110)


def _log_scale(axes: Any, which: str, values: Iterable[float]) -> None:
    """Make the axis "x" or "y" logarithmic, with ticks such as 1, 10, 100.

    Over less than two decades also 2 and 5, or there would be one tick.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    some = list(values) or [1.0]
    wide = max(some) >= 100 * min(some)
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))


Roofs = dict[str, tuple[list[float], list[float]]]


def _plot_roofline(rows: Sequence[Row], roofs: Roofs, path: Path, title: str, styles: dict[str, Style]) -> None:
    """Operations a second over operations a byte, under the ceilings that were measured."""
    figure = _figure(6.5)
    axes = figure.subplots()
    points: dict[str, list[tuple[float, float]]] = {}
    lines = groups([row for row in rows if row["flops"] and row["bytes"]])
    for some in lines.values():
        for name, own in _by(some, "contestant").items():
            place = statistics.median(map(_intensity, own)), statistics.median(map(_rate, own))
            points.setdefault(name, []).append(place)
    for name, places in points.items():
        axes.plot(*zip(*places, strict=True), linestyle="", label=name, markersize=6, alpha=0.75, **styles[name])
    for (name, roof), dashes in zip(roofs.items(), itertools.cycle(["-", "--", ":", "-."])):
        axes.plot(*roof, dashes, color="black", label=f"limit: {name}")
    every = [
        *itertools.chain(*points.values()),
        *(place for roof in roofs.values() for place in zip(*roof, strict=True)),
    ]
    _log_scale(axes, "x", (x for x, _ in every))
    _log_scale(axes, "y", (y for _, y in every))
    axes.set(
        xlabel="floating-point operations a byte that must move",
        ylabel="GFLOP/s: billions of floating-point operations a second",
        title=f"{title}\nhigher is better{_medians(lines)}; black lines are what this machine was measured to reach",
    )
    axes.grid(alpha=0.3)
    _finish(figure, path)


def _intensity(row: Row) -> float:
    return float(row["flops"]) / float(row["bytes"])


def _rate(row: Row) -> float:
    """GFLOP/s."""
    return float(row["flops"]) / float(row["milliseconds"]) / 1e6


def _roofs(timed: Sequence[Row], measured: Sequence[Row]) -> Roofs:
    """For each product that was measured: the GFLOP/s that it and the copy allow, over operations a byte."""
    reach = [_intensity(row) for row in measured if row["flops"] and row["bytes"]] or [1.0]
    first, last = min(reach) / 2, max(reach) * 2
    found = [row for row in timed if row["case"].startswith("ceiling/")]
    copies = (float(row["bytes"]) / float(row["milliseconds"]) / 1e6 for row in found if not row["flops"])
    bandwidth = max(copies, default=0.0)  # GB/s
    roofs = {}
    for row in found:
        if row["flops"] and bandwidth:
            top = _rate(row)
            places = sorted([first, min(max(top / bandwidth, first), last), last])
            roofs[row["case"].removeprefix("ceiling/")] = places, [min(top, x * bandwidth) for x in places]
    return roofs


def _plot_ratios(rows: Sequence[Row], path: Path, title: str, styles: dict[str, Style]) -> None:
    """Every contestant's time over the baseline's, a line for each case or group of cases."""
    lines = groups(rows)
    figure = _figure(2 + 0.3 * len(lines))
    axes = figure.subplots()
    points: dict[str, list[tuple[float, int]]] = {}
    goals: list[tuple[float, int]] = []
    baselines: list[str] = []
    for place, some in enumerate(lines.values()):
        first = {row["case"]: row["contestant"] for row in reversed(some)}  # a case's rows begin with its baseline
        baselines += first.values()
        others = [row for row in some if row["contestant"] != first[row["case"]]]
        for name, own in _by(others, "contestant").items():
            points.setdefault(name, []).append((statistics.median(float(row["ratio"]) for row in own), place))
        goals += [(float(goal), place) for goal in dict.fromkeys(row["goal"] for row in some) if goal]
    axes.axvline(1, color="black", linewidth=1, label=" or ".join(dict.fromkeys(baselines)) + " (baseline)")
    for name, found in points.items():
        axes.plot(*zip(*found, strict=True), linestyle="", label=name, markersize=7, alpha=0.75, **styles[name])
    if goals:
        axes.plot(*zip(*goals, strict=True), "|", color="black", label="goal", markersize=16, markeredgewidth=4)
    _log_scale(axes, "x", (1.0, *(x for found in points.values() for x, _ in found)))
    xlabel = "time / baseline's time (left is faster)"
    axes.set(xlabel=xlabel, title=f"{title}\nlower is better{_medians(lines, ' (n)')}")
    axes.set_yticks(range(len(lines)), list(lines), fontsize=10)
    axes.set_ylim(max(len(lines), 1) - 0.5, -0.5)  # the first case on top
    axes.grid(alpha=0.3)
    _finish(figure, path)


def _by(rows: Iterable[Row], *columns: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(" ".join(row[column] for column in columns), []).append(row)
    return found


def _medians(lines: dict[str, list[Row]], many: str = "") -> str:
    """What a title says where a point stands for several cases."""
    return f"; medians of{many} cases" if any(_cases(some) > 1 for some in lines.values()) else ""


def _cases(rows: Iterable[Row]) -> int:
    return len(_by(rows, "case", "direction", "dtype"))


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by case or, where these are too many for a picture, by as much of their names as leaves few enough."""
    several = any(_cases(some) > 1 for some in _by(rows, "case", "direction").values())  # each type a line of its own
    deepest = max((row["case"].count("/") + 1 for row in rows), default=1)
    found: dict[str, list[Row]] = {}
    for depth in range(deepest, 0, -1):
        found = {}
        for row in rows:
            name = "/".join(row["case"].split("/")[:depth])
            found.setdefault(" ".join([name, row["direction"], *[row["dtype"]] * several]), []).append(row)
        if len(found) <= MOST_LINES:
            break
    return {f"{name} ({_cases(some)})" if _cases(some) > 1 else name: some for name, some in found.items()}
