"""What a run of the zoo leaves: a CSV file, a table for people, and totals."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

COLUMNS = (
    "model", "package", "method", "ok", "failed", "eligible", "generated", "fraction", "staged", "fused", "materialized",
    "regions", "left_dense", "why_materialized", "why_no_region", "dof", "difference", "notes", "compiles_plain",
    "compiles_transformed", "exports_plain", "exports_transformed", "seconds",
)  # fmt: skip
"""`eligible`: weights generated, and dense parameters that an op consumes as its weight; `fraction`: generated of those;
`staged`, `fused`, `materialized`, `regions`: of the generated ones; `difference`: the largest relative one from the
materialized model; `notes`: what is told but not wrong; the last but one four: "yes", or what happened."""

Row = Mapping[str, Any]


def write(path: Path, rows: Iterable[Row]) -> None:
    """All rows as a CSV file: yes and no, four digits, "" for what was not measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows({name: _shown(value) for name, value in row.items()} for row in rows)


def _shown(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else value


def table(rows: Sequence[Row]) -> str:
    """A line a row: what is right, and which way the weights go."""
    body = [
        [
            row["model"], row["method"], "ok" if row["ok"] else "WRONG", _count(row, "eligible"),
            *(_percent(row.get(name)) for name in ("fraction", "staged", "fused", "materialized", "regions")),
            _shown(row.get("difference", "")), row.get("seconds", ""),
        ]
        for row in rows
    ]  # fmt: skip
    headers = [
        "model",
        "method",
        "",
        "weights",
        "generated",
        "staged",
        "fused",
        "materialized",
        "regions",
        "difference",
        "s",
    ]
    sides = ("left", "left", "left", *["right"] * 8)
    return tabulate(body, headers, disable_numparse=True, colalign=sides)


def _count(row: Row, name: str) -> str:
    return f"{row[name]:,}" if name in row else ""


def _percent(value: float | None) -> str:
    """Cut, not rounded: 100% is all."""
    return "" if value is None else f"{int(1000 * value) / 10:g}%"


def totals(rows: Sequence[Row]) -> str:
    """For each method: how many models are right, how much of them is generated, how much of all goes through a lowering."""
    body = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        counted = [row for row in own if "fraction" in row]
        least = min(counted, key=lambda row: row["fraction"], default=None)
        every = sum(row["eligible"] for row in counted)
        lowered = sum(row["generated"] * (row.get("staged", 0) + row.get("fused", 0)) for row in counted)
        mean = sum(row["fraction"] for row in counted) / len(counted) if counted else None
        right = f"{sum(row['ok'] for row in own)} of {len(own)}"
        worst = f"{_percent(least['fraction'])} ({least['model']})" if least else ""
        body.append([method, right, _percent(mean), worst, _percent(lowered / every) if every else ""])
    return tabulate(body, ["method", "models right", "mean generated", "least", "of all weights lowered"])
