"""What the bench leaves behind in words: one CSV file a machine, and tables of it."""

from __future__ import annotations

import csv
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
"""`ratio`: the time over that of the case's first contestant, its baseline, in the same run; `spread`: half the distance
between the quartiles over the median; `roofline`: the least time that this machine could take, over the time taken;
`timing`: "graph" (replays of a CUDA graph), "calls" (with what launching costs) or "host" (a CPU's clock)."""

LEGEND = "The last columns: times the baseline's time (share of the roofline); below 1 is faster."

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


def three_digits(value: str) -> str:
    """A number of the CSV file as people are shown it, in the log as in the tables: "0.0408", "2.88", "11.7", "1234"."""
    number = float(value)
    return f"{number:.0f}" if number >= 100 else f"{number:#.3g}".rstrip(".")


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
    """What the machine does at most; then a table for each kind of case: the baseline's time, and ratios to it."""
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
    """One line a case and direction: milliseconds and percent of the roofline of the baseline, ratios of others."""
    timed = [row for row in rows if row["milliseconds"]]
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in timed:
        cases.setdefault(tuple(row[name] for name in KEY), {})[row["contestant"]] = row
    if not cases:
        return ""
    first = [next(iter(some.values())) for some in cases.values()]
    baselines = list(dict.fromkeys(row["contestant"] for row in first))
    names = list(dict.fromkeys(row["contestant"] for row in timed if row["contestant"] not in baselines))
    several = len(baselines) > 1  # else the header names the only one
    body = []
    for (case, direction, _device, dtype), some in cases.items():
        base = next(iter(some.values()))
        line = [f"{case} {direction}", dtype, *[base["contestant"]] * several]
        line += [three_digits(base["milliseconds"]), _percent(base)]
        for name in names:
            found = some.get(name, {}).get("ratio")
            line.append(f"{three_digits(found)} ({_percent(some[name])})" if found else "")
        body.append(line)
    own = ["baseline", "ms"] if several else [f"{baselines[0]} (baseline), ms"]
    headers = ["case", "type", *own, "roofline", *names]
    sides = *["left"] * (2 + several), *["right"] * (2 + len(names))
    table = tabulate(body, headers, disable_numparse=True, colalign=sides)
    return f"{table}\n{LEGEND}" if names else table


def _percent(row: Row) -> str:
    if not row["roofline"]:
        return ""
    share = 100 * float(row["roofline"])
    return f"{share:.0f}%" if share >= 1 else "<1%"
