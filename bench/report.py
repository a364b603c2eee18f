"""What the bench leaves behind: one CSV file a machine, tables of it, and two pictures."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.contest import Result
from bench.measure import dtype_name

Row = dict[str, str]

COLUMNS = (
    "case", "device", "direction", "contestant", "status", "milliseconds", "spread", "ratio", "goal", "peak_mib", "bytes",
    "flops", "roofline", "dtype", "path", "timing", "commit", "torch", "triton", "date",
)  # fmt: skip
"""`ratio`: the time over that of the case's first contestant, the dense one, in the same run; `spread`: half the distance
between the quartiles over the median; `roofline`: the least time that this machine could take, over the time taken;
`timing`: "graph" (replays of a CUDA graph), "calls" (with what launching costs) or "host" (a CPU's clock)."""

KEY = ("case", "direction", "device", "dtype")
"""What a run replaces as a whole."""


def row_of(case: str, direction: str, result: Result, stamp: Row) -> Row:
    """A line of the CSV file.

    Args:
        stamp: device, commit, versions and date.
    """
    peak = None if result.peak is None else result.peak / (1 << 20)
    found: dict[str, Any] = {
        "case": case,
        "direction": direction,
        "contestant": result.contestant,
        "status": result.status,
        "milliseconds": _short(result.milliseconds),
        "spread": _short(result.spread),
        "ratio": _short(result.ratio),
        "goal": result.goal,
        "peak_mib": _short(peak),
        "bytes": result.bytes_moved or "",
        "flops": result.flops or "",
        "roofline": _short(result.roofline),
        "dtype": dtype_name(result.dtype),
        "path": result.path,
        "timing": result.timing,
    }
    return {name: "" if (value := found.get(name, stamp.get(name))) is None else str(value) for name in COLUMNS}


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def merged(before: Iterable[Row], rows: Iterable[Row]) -> list[Row]:
    """The rows of a run in place of those of the same cases; what was skipped replaces only what was skipped before."""
    new: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        new.setdefault(tuple(row[name] for name in KEY), []).append(row)
    old: dict[tuple[str, ...], list[Row]] = {}
    for row in before:
        old.setdefault(tuple(row[name] for name in KEY), []).append(row)
    for key, some in new.items():
        if key not in old or not all(row["contestant"] == "" for row in some):
            old[key] = some
    return [row for some in old.values() for row in some]


def read(path: Path) -> list[Row]:
    """The rows of a CSV file; none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(rows)


def tables(rows: Sequence[Row]) -> str:
    """What the machine does at most; then a table for each kind of case: the dense time, and ratios to it."""
    parts = [_ceilings([row for row in rows if row["case"].startswith("ceiling/")])]
    kinds = dict.fromkeys(row["case"].partition("/")[0] for row in rows)
    parts += [
        _ratios([row for row in rows if row["case"].startswith(f"{kind}/")]) for kind in kinds if kind != "ceiling"
    ]
    others = dict.fromkeys(
        f"{row['case']}/{row['direction']} {row['contestant']}: {row['status']}"
        for row in rows
        if row["status"] != "ok" and row["contestant"]
    )
    skipped = sum(row["contestant"] == "" for row in rows)
    parts.append("\n".join(others))
    parts.append(f"{skipped} cases were skipped" if skipped else "")
    return "\n\n".join(part for part in parts if part)


def _ceilings(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        seconds = float(row["milliseconds"]) / 1e3
        flops = int(row["flops"] or 0)
        rate = f"{flops / seconds / 1e12:.4g} TFLOP/s" if flops else f"{int(row['bytes']) / seconds / 1e9:.4g} GB/s"
        body.append([row["case"].removeprefix("ceiling/"), rate])
    return tabulate(body, ["ceiling", "measured"], disable_numparse=True) if body else ""


def _ratios(rows: Sequence[Row]) -> str:
    """One line a case and direction: milliseconds and percent of the roofline of the first contestant, ratios of others."""
    timed = [row for row in rows if row["milliseconds"]]
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in timed:
        cases.setdefault(tuple(row[name] for name in KEY), {})[row["contestant"]] = row
    if not cases:
        return ""
    first = [next(iter(some)) for some in cases.values()]
    names = list(dict.fromkeys(row["contestant"] for row in timed if row["contestant"] not in first))
    body = []
    for (case, direction, _device, dtype), some in cases.items():
        base = next(iter(some.values()))
        line = [f"{case} {direction}", dtype, base["contestant"], base["milliseconds"], _percent(base)]
        for name in names:
            found = some.get(name, {}).get("ratio")
            line.append(f"{float(found):.2f} ({_percent(some[name])})" if found else "")
        body.append(line)
    headers = ["case", "type", "dense", "ms", "roofline", *names]
    return tabulate(
        body, headers, disable_numparse=True, colalign=("left", "left", "left", *["right"] * (2 + len(names)))
    )


def _percent(row: Row) -> str:
    return f"{100 * float(row['roofline']):.0f}%" if row["roofline"] else ""


def plots(rows: Sequence[Row], folder: Path, machine: str) -> list[Path]:
    """Write the roofline and the ratios as pictures. Returns their paths; none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    timed = [row for row in rows if row["milliseconds"]]
    paths = [folder / f"{machine}-roofline.png", folder / f"{machine}-ratios.png"]
    _plot_roofline(timed, paths[0], machine)
    _plot_ratios([row for row in timed if row["ratio"]], paths[1], machine)
    return paths


def _figure(width: float, height: float) -> Any:
    """A figure without a screen: pyplot is not needed, and its backend not touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plot_roofline(rows: Sequence[Row], path: Path, machine: str) -> None:
    """Operations a second over operations a byte, under the ceilings that were measured."""
    figure = _figure(9, 6)
    axes = figure.subplots()
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["flops"] and row["bytes"] and not row["case"].startswith("ceiling/"):
            place = float(row["flops"]) / float(row["bytes"]), float(row["flops"]) / float(row["milliseconds"]) * 1e3
            points.setdefault(row["contestant"], []).append(place)
    for name, some in points.items():
        axes.plot(*zip(*some, strict=True), "o", label=name, markersize=4, alpha=0.7)
    reach = [x for some in points.values() for x, _ in some] or [1.0]
    for name, roof in _roofs(rows, min(reach) / 2, max(reach) * 2).items():
        axes.plot(*roof, label=name)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="operations a second", title=machine)
    if rows:
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def _roofs(rows: Sequence[Row], first: float, last: float) -> dict[str, tuple[list[float], list[float]]]:
    """For each measured product: operations a second that it and the copy allow, over operations a byte."""
    measured = [(row, float(row["milliseconds"]) / 1e3) for row in rows if row["case"].startswith("ceiling/")]
    bandwidth = max((float(row["bytes"]) / seconds for row, seconds in measured if not row["flops"]), default=0.0)
    found = {}
    for row, seconds in measured:
        if row["flops"] and bandwidth:
            top = float(row["flops"]) / seconds
            places = sorted([first, min(max(top / bandwidth, first), last), last])
            found[row["case"].removeprefix("ceiling/")] = places, [min(top, x * bandwidth) for x in places]
    return found


def _plot_ratios(rows: Sequence[Row], path: Path, machine: str) -> None:
    """Every contestant's time over the dense one's, a line for each case."""
    lines = list(dict.fromkeys(f"{row['case']} {row['direction']}" for row in rows))
    figure = _figure(9, 2 + 0.17 * len(lines))
    axes = figure.subplots()
    for name in dict.fromkeys(row["contestant"] for row in rows):
        some = [row for row in rows if row["contestant"] == name]
        places = [lines.index(f"{row['case']} {row['direction']}") for row in some]
        axes.plot([float(row["ratio"]) for row in some], places, "o", label=name, markersize=4)
    goals = [(float(r["goal"]), lines.index(f"{r['case']} {r['direction']}")) for r in rows if r["goal"]]
    if goals:
        axes.plot(*zip(*goals, strict=True), "|", color="black", label="goal", markersize=9)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="time over the dense op's", title=machine)
    axes.set_yticks(range(len(lines)), lines, fontsize=6)
    axes.invert_yaxis()
    if rows:
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
